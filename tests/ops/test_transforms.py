"""The operators under torch.func, under forward-mode differentiation, and where torch.compile traces either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from oracle import draw, fresh_generator, need_native
from transform_tools import NATIVE_GRADIENTS, OPERATORS, Case, make_case
from xlayer_ext import backend, reference
from xlayer_ext import functional as XF
from xlayer_ext.nn import FSQ, VectorQuantizer


@pytest.fixture(params=OPERATORS)
def case(request: pytest.FixtureRequest, device: str) -> Case:
    need_native(request.param, device)
    return make_case(request.param, device)


def loss(case: Case) -> Callable[..., Tensor]:
    return lambda *arguments: case.function(*arguments).square().sum()


def every(case: Case) -> tuple[int, ...]:
    """Returns the positions of all arguments."""
    return tuple(range(len(case.arguments)))


def batch(case: Case) -> tuple[Tensor, ...]:
    return tuple(torch.stack([argument, 1.1 * argument]) for argument in case.arguments)


def tangents(case: Case) -> tuple[Tensor, ...]:
    return tuple((1 + torch.arange(t.numel(), dtype=t.dtype, device=t.device)).reshape(t.shape) for t in case.arguments)


def dual_tangent(function: Callable[..., Tensor], case: Case) -> Tensor:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(case.arguments, tangents(case), strict=True)]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
    assert tangent is not None
    return tangent


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


FORWARD: dict[str, Callable[[Case], Any]] = {
    "jvp": lambda case: jvp(case.function, case.arguments, tangents(case)),
    "jacfwd": lambda case: jacfwd(case.function, every(case))(*case.arguments),
    "make_dual": lambda case: dual_tangent(case.function, case),
    "vmap(jvp)": lambda case: vmap(lambda *a: jvp(case.function, a, tangents(case)))(*batch(case)),
}
BACKWARD: dict[str, Callable[[Case], Any]] = {
    "grad": lambda case: grad(loss(case), every(case))(*case.arguments),
    "vjp": lambda case: vjp(case.function, *case.arguments)[1](case.function(*case.arguments)),
    "jacrev": lambda case: jacrev(case.function, every(case))(*case.arguments),
}
OTHERS: dict[str, Callable[[Case], Any]] = {
    "vmap": lambda case: vmap(case.function)(*batch(case)),
    "vmap(grad)": lambda case: vmap(grad(loss(case), every(case)))(*batch(case)),
    "vmap(jacrev)": lambda case: vmap(jacrev(case.function))(*batch(case)),
    "grad(vmap)": lambda case: grad(lambda *a: vmap(case.function)(*a).square().sum(), every(case))(*batch(case)),
    "hessian": lambda case: hessian(loss(case))(*case.arguments),
    "jacrev(jacrev)": lambda case: jacrev(jacrev(loss(case)))(*case.arguments),
    "grad(grad)": lambda case: grad(lambda *a: grad(loss(case))(*a).square().sum())(*case.arguments),
    "jvp(grad)": lambda case: jvp(grad(loss(case)), case.arguments, tangents(case)),
}


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FORWARD | BACKWARD | OTHERS)
def test_transforms_give_the_reference(case: Case, name: str) -> None:
    transform = (FORWARD | BACKWARD | OTHERS)[name]
    actual = transform(case)
    with backend("reference"):
        expected = transform(case)
    assert_same(actual, expected)
    assert any(tensor.abs().max() > 1e-3 for tensor in torch.utils._pytree.tree_leaves(expected))


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("op", NATIVE_GRADIENTS)
def test_first_gradients_are_the_kernels(device: str, op: str, name: str) -> None:
    need_native(op, device)
    with backend("native"):
        BACKWARD[name](make_case(op, device))


@pytest.mark.parametrize("name", FORWARD | OTHERS)
def test_native_by_name_raises_where_no_kernel_has_a_rule(device: str, name: str) -> None:
    need_native("masked_mean", device)
    case = make_case("masked_mean", device)
    told = r"no native masked_mean for [\w. -]+; it needs xlayer_ext.backend\('reference'\)"
    with backend("native"), pytest.raises(RuntimeError, match=told) as raised:
        (FORWARD | OTHERS)[name](case)
    assert "\n" not in str(raised.value)


COMPILED: dict[str, tuple[Callable[[Case], Any], Callable[[Case], Any]]] = {
    "make_dual": (lambda case: dual_tangent(compiled(case.function), case), FORWARD["make_dual"]),
    "jvp": (lambda case: compiled(lambda *a: jvp(case.function, a, tangents(case)))(*case.arguments), FORWARD["jvp"]),
    "grad": (lambda case: compiled(grad(loss(case), every(case)))(*case.arguments), BACKWARD["grad"]),
    "vmap": (lambda case: compiled(vmap(case.function))(*batch(case)), OTHERS["vmap"]),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("op", ["masked_mean", "fsq"])
def test_transforms_inside_compile(device: str, op: str, name: str) -> None:
    need_native(op, device)
    case = make_case(op, device)
    inside, eager = COMPILED[name]
    actual = inside(case)
    with backend("reference"):
        assert_same(actual, eager(case))


def test_dual_level_makes_one_more_graph(device: str) -> None:
    need_native("masked_mean", device)
    torch._dynamo.reset()
    case, graphs = make_case("masked_mean", device), []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append("xlayer" in graph.code)
        return graph

    function = torch.compile(case.function, fullgraph=True, backend=keep)
    for _ in range(2):
        function(*case.arguments)
        dual_tangent(function, case)
    assert graphs == [True, False]


# ---- the operators themselves ----------------------------------------------------------------------------------------


def test_operators_called_with_tangents_raise(device: str) -> None:
    need_native("masked_mean", device)
    x, tangent = torch.ones(2, 3, 4, device=device), torch.ones(2, 3, 4, device=device)
    told = "has no forward-mode derivative: it needs xlayer_ext.backend"
    with pytest.raises(RuntimeError, match=told):
        jvp(lambda x: torch.ops.xlayer.masked_mean(x, None), (x,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=told):
        torch.ops.xlayer.masked_mean(forward_ad.make_dual(x, tangent), None)
    with forward_ad.dual_level():
        assert torch.equal(torch.ops.xlayer.masked_mean(x, None), torch.ones(2, 4, device=device))


def test_operators_called_inside_of_torch_func_say_where_it_works(device: str) -> None:
    need_native("masked_mean", device)
    with pytest.raises(RuntimeError, match=r"differentiate xlayer::masked_mean only within xlayer_ext\.functional"):
        grad(lambda x: torch.ops.xlayer.masked_mean(x, None).sum())(torch.ones(2, 3, 4, device=device))


@pytest.mark.parametrize("op", NATIVE_GRADIENTS)
def test_derivatives_of_kernels_gradients_raise_one_clear_line(device: str, op: str) -> None:
    """Second derivatives raise one clear line by every way to ask for them: autograd inside torch.func, a cotangent, a
    cotangent's tangent."""
    need_native(op, device)
    case = make_case(op, device)
    leaves = [argument.clone().requires_grad_() for argument in case.arguments]
    outer = grad(loss(case))(*leaves)
    output, pull = vjp(case.function, *case.arguments)
    ways: list[Callable[[], Any]] = [
        lambda: outer.sum().backward(),
        lambda: grad(lambda cotangent: pull(cotangent)[0].square().sum())(output),
        lambda: jvp(lambda cotangent: pull(cotangent)[0], (output,), (output,)),
    ]
    for way in ways:
        with pytest.raises(RuntimeError, match=r"xlayer_ext.backend\('reference'\)") as raised:
            way()
        assert "\n" not in str(raised.value) and f"xlayer::{op}_backward" in str(raised.value)


def test_jacobian_of_nothing(device: str) -> None:
    need_native("masked_mean", device)
    assert jacrev(XF.masked_mean)(torch.ones(0, 3, 4, device=device)).shape == (0, 4, 0, 3, 4)


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_jvp_of_modules(device: str) -> None:
    z = draw(fresh_generator(), 5, 4).to(device)
    quantizer = VectorQuantizer(4, 6).to(device, torch.float64).eval()
    modules = {"fsq": FSQ([5, 4, 3, 3]), "vq": quantizer}
    for name, module in modules.items():
        actual = jvp(lambda z, m=module: m(z).quantized, (z,), (z,))
        with backend("reference"):
            assert_same(actual, jvp(lambda z, m=module: m(z).quantized, (z,), (z,)))
        assert actual[1].any(), name


def test_vmap_of_quantizers(device: str) -> None:
    z = draw(fresh_generator(), 3, 5, 4).to(device)
    for module in (FSQ([5, 4, 3, 3]), VectorQuantizer(4, 6).to(device, torch.float64).eval()):
        mapped = vmap(module)(z)
        assert_same(mapped.quantized, torch.stack([module(row).quantized for row in z]))
        assert torch.equal(mapped.indices, torch.stack([module(row).indices for row in z]))
    module = FSQ([5, 4, 3, 3])
    assert_same(tuple(compiled(vmap(module))(z)), tuple(module(z)))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return XF.masked_mean(self.linear(x))


def test_functional_call_and_grad(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_native("masked_mean", device)
    module = Pooled().to(device, torch.float64)
    x = draw(fresh_generator(), 2, 3, 4).to(device)

    def square(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(module, parameters, (x,)).square().sum()
        return output

    parameters = dict(module.named_parameters())
    expected = torch.autograd.grad(square(parameters, x), list(parameters.values()))
    per_sample = vmap(grad(square), (None, 0))(parameters, x.unsqueeze(1))
    assert_same(tuple(g.sum(0) for g in per_sample.values()), expected)
    monkeypatch.setattr(reference, "masked_mean", None)  # the kernel serves
    actual = grad(square)({name: p.detach() for name, p in parameters.items()}, x)
    assert_same(tuple(actual.values()), expected)
