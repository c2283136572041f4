"""Fake tensors: every operator refuses for them what it refuses for real ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oracle import draw, fresh_generator, need_native
from transform_tools import OPERATORS, make_case
from xlayer_ext import functional as XF

Call = tuple[Any, tuple[Any, ...]]  # an operator and its arguments


class Recorder(TorchDispatchMode):
    """Keeps the calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "xlayer":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def calls_of(op: str) -> list[Call]:
    """Records calls of the operator and its backward with valid arguments."""
    with Recorder() as recorder:
        if op == "vq_nearest":
            indices, _ = XF.vq_nearest(draw(fresh_generator(), 2, 5, 3), draw(fresh_generator(), 2, 4, 3))
            XF.vq_statistics(draw(fresh_generator(), 2, 5, 3), indices, 4)
        else:
            case = make_case(op, "cpu")
            leaves = [argument.requires_grad_() for argument in case.arguments]
            case.function(*leaves).square().sum().backward()
    return recorder.calls


def wrong(value: Any) -> Iterator[Any]:
    """Yields values that cannot be right in place of this argument."""
    if isinstance(value, Tensor):
        value = value.detach()
        yield value.unsqueeze(0)
        yield value.unsqueeze(-1)
        if value.dim():
            yield value[0]
        for dim in range(value.dim()):
            yield torch.cat([value, value.narrow(dim, 0, 1)], dim) if value.shape[dim] else value
        yield value.to(torch.int16)
        yield value.to(torch.float32)
        yield value.to(torch.bool)
    elif isinstance(value, bool):
        return
    elif isinstance(value, int):
        yield from (-1, 0, 1000)
    elif isinstance(value, float):
        yield from (float("nan"), -1.0, 0.0)
    elif isinstance(value, list):
        yield value[:-1]
        yield [1 for _ in value]
        yield [*value, *value]


def meta(value: Any) -> Any:
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def refusal(op: Any, arguments: list[Any]) -> Exception | None:
    try:
        op(*arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        return error
    return None


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("name", [*OPERATORS, "vq_nearest"])
def test_fake_kernels_refuse_what_the_operators_refuse(name: str) -> None:
    need_native(name)
    refused = 0
    for op, good in calls_of(name):
        assert refusal(op, list(map(meta, good))) is None
        for position, argument in enumerate(good):
            for value in wrong(argument):
                bad = list(good)
                bad[position] = value
                real, fake = refusal(op, bad), refusal(op, list(map(meta, bad)))
                told = f"{op}, argument {position} {getattr(value, 'shape', value)} {getattr(value, 'dtype', '')}"
                assert (real is None) == (fake is None), f"{told}: {real} != {fake}"
                if fake is not None:
                    refused += 1
                    assert isinstance(fake, (TypeError, ValueError)) and "\n" not in str(fake), f"{told}: {fake}"
    assert refused > 5


def test_compile_refuses_nonsense() -> None:
    need_native("masked_mean")
    torch._dynamo.reset()
    function = torch.compile(lambda x: torch.ops.xlayer.masked_mean(x, None), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"x must have shape \[\*, \*, \*\], got \[2, 3\]"):
        function(torch.ones(2, 3))


def test_functions_on_meta_tensors_run_no_loop_over_layers() -> None:
    """Functions on meta tensors of 2³¹ layers return at once, while the reference would loop over them."""
    need_native("depth_attention")
    taps, queries, keys, out = (torch.empty(s, device="meta") for s in ((2**31, 65, 0), (3, 2), (3, 0), (2, 3)))
    assert XF.depth_attention(taps, queries, keys, keys, out).shape == (2**31, 65, 2)
    states = XF.depth_gru(taps, *(torch.empty(s, device="meta") for s in ((6, 0), (6, 2))))
    assert states.shape == (2**31, 65, 2)
    wide = torch.empty(2**31, 65, 4, device="meta")
    assert XF.ema_scan(wide, torch.empty(2**31, device="meta")).shape == wide.shape


def test_a_required_tensor_that_is_none_is_named() -> None:
    need_native("hyper_post")
    streams = torch.empty(1, 1, 2, 4, device="meta")
    with pytest.raises(TypeError, match="branch_output must be a tensor, got None"):
        torch.ops.xlayer.hyper_post(streams, None, torch.empty(2, 4, device="meta"))
