"""Hyper-connections: native kernels against plain PyTorch, `torch.compile`, the PyPI package and the machine's limit.

Four operators: `pre`, what a sublayer reads of the streams; `post`, what it leaves in them; `pre+post`, all that one
sublayer needs, as the two calls; and `boundary`, the post of a sublayer fused with the pre of the next. In a row of the
boundary, `native separate` is the same work as two native calls, timed in the same rounds and held against the same
least bytes: what the fusion is worth.

The package `hyper-connections` computes the kinds `dhc-rms` and `mhc-stream`, on streams packed into the batch; there
its rows have the same weights as ours, and its results are compared with ours before anything is timed. On GPUs
Liger-Kernel and TileKernels compute the kind `mhc` (`peers_cuda.py`).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks.cases import peers_cuda
from benchmarks.harness import cases as harness_cases
from benchmarks.harness.cases import Case, compiled, settled
from benchmarks.harness.measure import PASSES, Unavailable, Work
from xlayer_ext import functional, reference
from xlayer_ext._backend import use_native
from xlayer_ext.functional import Connection
from xlayer_ext.testing import check_oracle, relative_error
from xlayer_ext.types import Form, Norm

Outputs = tuple[Tensor, ...]


class Kind(NamedTuple):
    """Norm and form of the coefficients; without a norm they are static, the same for all tokens."""

    norm: Norm | None = None
    form: Form = "identity"
    biased: bool = False
    peer: str | None = None  # the class of the PyPI package that computes the same

    def weight_shape(self, n: int, d: int) -> tuple[int, int]:
        return (n * (n + 2), n * d) if self.norm == "rms_all" else (n + 2, d)


KINDS = {
    "shc": Kind(),
    "dhc": Kind("layer", "tanh", biased=True),
    "dhc-rms": Kind("rms", "tanh", peer="HyperConnections"),
    "mhc": Kind("rms_all", "sinkhorn_rows"),
    "mhc-stream": Kind("rms", "sinkhorn_columns", peer="ManifoldConstrainedHyperConnections"),
}


class Setting(NamedTuple):
    """Suite, kind, size and layout of a case, for all operators."""

    suite: str
    kind: str
    size: tuple[int, int, int, int]  # B, S, d, n
    packed: bool = False  # n between B and S in memory
    dtype: str | None = None  # instead of those asked for


def settings(cuda: bool) -> dict[str, Setting]:
    b, s, d = (8, 2048, 2048) if cuda else (4, 512, 1024)  # far larger than the caches
    size = (b, s, d, 4)
    return {
        "dhc": Setting("main", "dhc", size),
        "shc": Setting("main", "shc", size),
        "dhc-rms": Setting("main", "dhc-rms", size, packed=True),
        "mhc": Setting("full", "mhc", size),
        "mhc-stream": Setting("full", "mhc-stream", size, packed=True),
        "dhc-n2": Setting("full", "dhc", (b, s, d, 2)),
        "dhc-n8": Setting("full", "dhc", (b, s, d, 8)),
        "dhc-packed": Setting("full", "dhc", size, packed=True),
        "dhc-bf16": Setting("full", "dhc", size, dtype="bfloat16"),
        "toy": Setting("toy", "dhc-rms", (2, 24, 32, 4), packed=True),
    }


# ---- the least work ------------------------------------------------------------------------------------------------


def passes(forward: int, backward: int, pass_: str) -> int:
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[pass_]


def least_bytes(op: str, pass_: str, kind: str, size: Sequence[int], element: int) -> int:
    """Counts each input read once and each output written once; the backward reads the inputs again and the outputs'
    gradients, and writes one gradient per input. It can recompute whatever else it needs, h' too.

    In units of d per token that is n+1 for pre, 2n+1 for post and 2n+2 for the boundary, and 2n+1, 3n+2 and 3n+3
    backward. `pre+post` is two calls, and both give a gradient of the streams: adding them up takes 3n, so that the
    whole backward takes 8n+3. Coefficients, n·(n+2) float32 per token where they are dynamic, are next to nothing.
    """
    b, s, d, n = size
    row, wide = b * s * d * element, max(element, 4)
    streams = n * row
    coefficients = n * (n + 2) * wide
    parameters = coefficients
    if KINDS[kind].norm:
        rows, columns = KINDS[kind].weight_shape(n, d)
        parameters += (rows * columns + (n + 2) * (1 + KINDS[kind].biased)) * wide
        coefficients *= b * s
    made = coefficients if KINDS[kind].norm else 0  # static ones are a parameter and need no computation
    inputs, outputs = {
        "pre": (streams + parameters, row + made),
        "post": (streams + row + coefficients, streams),
        "boundary": (streams + row + coefficients + parameters, streams + row + made),
        "pre+post": (0, 0),
    }[op]
    if op == "pre+post":
        parts = sum(least_bytes(part, pass_, kind, size, element) for part in ("pre", "post"))
        return parts + passes(0, 3 * streams, pass_)
    return passes(inputs + outputs, 2 * inputs + outputs, pass_)


def least_flops(op: str, pass_: str, kind: str, size: Sequence[int]) -> int:
    """Counts two for each multiply-add of the mixing and of the dynamic logits, twice as many in the backward, and the
    post of a boundary once more, whose result its backward has to recompute. Norms and Sinkhorn are left out."""
    b, s, d, n = size
    rows, columns = KINDS[kind].weight_shape(n, d)
    logits = rows * columns * (1 if KINDS[kind].norm == "rms_all" else n) if KINDS[kind].norm else 0
    post = 2 * b * s * (n * n + n) * d
    forward = (2 * b * s * (n * d + logits) if op != "post" else 0) + (post if op != "pre" else 0)
    return passes(forward, 2 * forward + (post if op == "boundary" else 0), pass_)


# ---- inputs and operators ------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Tensors that the operators take; `coefficients` are those of the sublayer that ends."""

    streams: Tensor  # [B, S, n, d]
    branch_output: Tensor  # [B, S, d]
    coefficients: Tensor
    connection: Connection

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        named = self.connection._asdict()
        changed: dict[str, Any] = {name: change(t) for name, t in named.items() if isinstance(t, Tensor)}
        connection = self.connection._replace(**changed)
        return Inputs(change(self.streams), change(self.branch_output), change(self.coefficients), connection)


def make_inputs(kind: str, size: Sequence[int], packed: bool, dtype: str, device: str) -> Inputs:
    """Draws inputs, the same for every implementation: coefficients far from the identity, logits of unit variance."""
    b, s, d, n = size
    generator = torch.Generator().manual_seed(0)
    element = getattr(torch, dtype)
    wide = torch.promote_types(element, torch.float32)
    norm, form, biased, _ = KINDS[kind]

    def normal(*shape: int, gain: float = 1.0, to: torch.dtype = wide) -> Tensor:
        return (gain * torch.randn(shape, generator=generator)).to(device=device, dtype=to)

    streams = normal(b, n, s, d, to=element).transpose(1, 2) if packed else normal(b, s, n, d, to=element)
    coefficients = normal(b, s, n, n + 2) if norm else normal(n, n + 2)
    connection = Connection(normal(n, n + 2))
    if norm:
        shape = KINDS[kind].weight_shape(n, d)
        weight, bias = normal(*shape, gain=shape[1] ** -0.5), normal(n + 2, gain=0.3) if biased else None
        scale = torch.full((n + 2,), 0.5, device=device, dtype=wide)  # one scale for α, as the PyPI package has it
        scale[-1] = 0.8
        connection = Connection(connection.base, weight, bias, scale, norm, form)
    return Inputs(streams, normal(b, s, d, to=element), coefficients, connection)


def pre(api: Any, given: Inputs) -> Outputs:
    x, coefficients = api.hyper_pre(given.streams, given.connection)
    return x, *_made(coefficients, given)


def post(api: Any, given: Inputs) -> Outputs:
    return (api.hyper_post(given.streams, given.branch_output, given.coefficients),)


def pre_post(api: Any, given: Inputs) -> Outputs:
    x, coefficients = api.hyper_pre(given.streams, given.connection)
    return x, api.hyper_post(given.streams, given.branch_output, coefficients)


def boundary(api: Any, given: Inputs) -> Outputs:
    streams, x, coefficients = api.hyper_post_pre(*given)
    return streams, x, *_made(coefficients, given)


def separate_boundary(api: Any, given: Inputs) -> Outputs:
    streams = api.hyper_post(*given[:3])
    x, coefficients = api.hyper_pre(streams, given.connection)
    return streams, x, *_made(coefficients, given)


def _made(coefficients: Tensor, given: Inputs) -> Outputs:
    """Returns the coefficients if they are dynamic: static ones are the parameter itself, and no output."""
    return () if given.connection.weight is None else (coefficients,)


Operator = Callable[[Any, Inputs], Outputs]
OPERATORS: dict[str, Operator] = {"pre+post": pre_post, "pre": pre, "post": post, "boundary": boundary}
KERNELS = {
    "pre+post": ("hyper_pre", "hyper_post"),
    "pre": ("hyper_pre",),
    "post": ("hyper_post",),
    "boundary": ("hyper_post_pre",),
}
NOT_READ = {"pre": ("branch_output", "coefficients"), "pre+post": ("coefficients",)}
SEPARATE = "native separate"


def leaves_of(op: str, given: Inputs) -> dict[str, Tensor]:
    """Returns the tensors that gradients are taken of, by name."""
    named = {**given._asdict(), **given.connection._asdict()}
    if op == "post":
        return {name: named[name] for name in Inputs._fields[:3]}
    unread = NOT_READ.get(op, ())
    return {name: t for name, t in named.items() if isinstance(t, Tensor) and name not in unread}


# ---- the PyPI package ----------------------------------------------------------------------------------------------


def peer_call(module: Any, given: Inputs) -> Outputs:
    """Runs one sublayer of the package's module with a given branch output, which computes the same as `pre_post`.

    `width_connection` is pre with the mixing of the streams, `depth_connection` adds β·y to what was mixed. Packed
    streams [(b n), s, d] are a view of ours.
    """
    packed = given.streams.transpose(1, 2).flatten(0, 1)
    x, mixed, beta = module.width_connection(packed)
    streams = module.depth_connection(given.branch_output, mixed, **beta)
    return x, streams.unflatten(0, (-1, given.streams.shape[2])).transpose(1, 2)


def peer_module(kind: str, given: Inputs) -> nn.Module:
    """Makes the package's module with our weights; its norm's own weight stays at its initial value, 1."""
    package = _peer_package()
    n, d = given.streams.shape[2:]
    module = getattr(package, str(KINDS[kind].peer))(n, dim=d).to(given.streams.device, given.streams.dtype)
    base, weight, _, scale = cast(tuple[Tensor, ...], given.connection[:4])
    values = {"static_alpha": base[:, :-1], "static_beta": base[:, -1], "dynamic_alpha_fn": weight[:-1].T}
    values["dynamic_beta_fn"] = weight[-1]
    if KINDS[kind].peer == "HyperConnections":
        values |= {"dynamic_alpha_scale": scale[0], "dynamic_beta_scale": scale[-1]}
    else:
        values |= {"pre_branch_scale": scale[0], "residual_scale": scale[1], "h_post_scale": scale[-1]}
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value.reshape(parameters[name].shape))
    return cast(nn.Module, module)


def _peer_package() -> ModuleType:
    try:
        return importlib.import_module("hyper_connections")
    except ImportError as error:
        raise Unavailable(f"{error}; pip install hyper-connections") from error


def check_peer(kind: str, given: Inputs, module: nn.Module) -> None:
    """Raises `AssertionError` unless the package's outputs and gradients are those of the plain formula."""
    leaves, parameters = leaves_of("pre+post", given), dict(module.named_parameters())
    results = _results(partial(pre_post, reference, given), leaves)
    theirs = _results(partial(peer_call, module, given), leaves_of("post", given) | parameters, unused=True)
    n = given.streams.shape[2]
    alpha, beta = theirs["grad static_alpha"], theirs["grad static_beta"]
    theirs["grad base"] = torch.cat([alpha, beta.unsqueeze(1)], 1)
    alpha, beta = theirs["grad dynamic_alpha_fn"], theirs["grad dynamic_beta_fn"]
    theirs["grad weight"] = torch.cat([alpha.reshape(-1, n + 1).T, beta.unsqueeze(0)])
    # In 16 bits the package rounds its parameters, which ours keep in float32.
    tolerance = 1e-4 if given.streams.element_size() > 2 else 5e-2
    for name, expected in results.items():
        if name == "grad scale":  # one number for several of ours
            continue
        error = relative_error(theirs[name], expected)
        if not error <= tolerance:
            raise AssertionError(f"hyper-connections {kind} {name}: differs by {error:.1e}")


# ---- one implementation --------------------------------------------------------------------------------------------

Call = Callable[[], Outputs]


def implementation(impl: str, op: str, kind: str, given: Inputs) -> tuple[Call, list[Tensor]]:
    """Returns the function to call and the tensors that its gradients are taken of; raises `Unavailable` where it
    cannot run."""
    leaves = list(leaves_of(op, given).values())
    if impl.startswith("hyper-connections"):
        module = peer_module(kind, given)
        check_peer(kind, given, module)
        function = compiled(peer_call) if impl.endswith("compile") else peer_call
        return partial(function, module, given), [given.streams, given.branch_output, *module.parameters()]
    if impl in peers_cuda.MHC:
        return peers_cuda.mhc(impl, op, *given)
    if impl in ("native", SEPARATE):
        kernels = KERNELS["pre+post" if impl == SEPARATE else op]
        if not all(use_native(kernel, given.streams) for kernel in kernels):
            raise Unavailable("no native kernel is in use; `python -m xlayer_ext.info` says why")
        return partial(separate_boundary if impl == SEPARATE else OPERATORS[op], functional, given), leaves
    operator = compiled(OPERATORS[op]) if impl == "compile" else OPERATORS[op]
    return partial(operator, reference, given), leaves


def build(impl: str, op: str, pass_: str, kind: str, size: list[int], packed: bool, dtype: str, device: str) -> Work:
    """Builds the work of one row, which returns all outputs in a forward pass, and all gradients in a backward pass."""
    given = make_inputs(kind, size, packed, dtype, device).map(Tensor.requires_grad_)
    call, leaves = implementation(impl, op, kind, given)
    work = {"fwd": _forward, "bwd": _backward, "fwd+bwd": _forward_backward}[pass_](call, leaves)
    return settled(work) if impl.endswith("compile") or impl in peers_cuda.MHC else work


def _forward(call: Call, leaves: list[Tensor]) -> Work:
    return torch.no_grad()(call)


def _backward(call: Call, leaves: list[Tensor]) -> Work:
    """Builds a work that runs the backward alone, on one graph that the first call makes and keeps."""

    @functools.cache
    def graph() -> tuple[Outputs, list[Tensor]]:
        # A compiled backward may write into the forward's buffers, unless it is told that they are needed again.
        with torch._functorch.config.patch(donated_buffer=False):
            outputs = call()
        return outputs, cotangents(outputs)

    def backward() -> Outputs:
        outputs, given = graph()
        return torch.autograd.grad(outputs, leaves, given, retain_graph=True)

    return backward


def _forward_backward(call: Call, leaves: list[Tensor]) -> Work:
    with torch.no_grad():
        given = cotangents(call())

    def forward_backward() -> list[Tensor]:
        outputs = call()
        return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, given)]

    return forward_backward


def cotangents(outputs: Outputs, seed: int = 1) -> list[Tensor]:
    """Draws gradients of the outputs, in the outputs' layouts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty_like(output).copy_(torch.randn(output.shape, generator=generator)) for output in outputs]


# ---- the check before the clock ------------------------------------------------------------------------------------


def check(case: Case) -> None:
    """Compares outputs and gradients of the native kernels with float64 (`check_oracle`) on the case's own inputs."""
    a = case.arguments
    _check(case.op, a["kind"], tuple(a["size"]), a["packed"], a["dtype"], a["device"])


@functools.cache  # the passes of a case share their results
def _check(op: str, kind: str, size: tuple[int, ...], packed: bool, dtype: str, device: str) -> None:
    given = make_inputs(kind, size, packed, dtype, device)
    exact, plain = (_draws(OPERATORS[op], op, reference, inputs) for inputs in (given.map(Tensor.double), given))
    operators = [OPERATORS[op], separate_boundary] if op == "boundary" else [OPERATORS[op]]
    for operator in operators:
        sides = (_draws(operator, op, functional, given), exact, plain)
        for name in exact[0].keys() - _few(plain):
            check_oracle(f"hyper {op} {kind} {name}", *(side[0][name] for side in sides))
        if few := _few(plain):
            pools = (_pooled(side, exact, few, _wholes(given)) for side in sides)
            check_oracle(f"hyper {op} {kind} small gradients", *pools)


def _draws(operator: Operator, op: str, api: Any, given: Inputs, pieces: int = 16) -> list[Results]:
    """Computes all results of the whole case, `_wholes` times, and then of a few tokens at a time."""
    length = max(1, given.streams.shape[1] // pieces)
    starts = range(0, given.streams.shape[1] - length + 1, length)
    parts = [given] * _wholes(given) + [_tokens(given, start, start + length) for start in starts]
    leaves = (part.map(lambda tensor: tensor.detach().requires_grad_()) for part in parts)
    return [_results(partial(operator, api, part), leaves_of(op, part), seed) for seed, part in enumerate(leaves)]


def _wholes(given: Inputs) -> int:
    """Returns the number of draws of a whole case: several, as a sum over its tokens may cancel; one for a large case,
    where each takes long."""
    return 6 if given.streams[..., 0].numel() <= 2**12 else 1


def _tokens(given: Inputs, start: int, end: int) -> Inputs:
    shared = given.coefficients.dim() == 2
    coefficients = given.coefficients if shared else given.coefficients[:, start:end]
    return Inputs(given.streams[:, start:end], given.branch_output[:, start:end], coefficients, given.connection)


def _few(draws: list[Results]) -> list[str]:
    """Names the gradients with so few elements that the error of a single draw shows little."""
    return [name for name, value in draws[0].items() if name.startswith("grad") and value.numel() < 1000]


def _pooled(side: list[Results], exact: list[Results], names: list[str], wholes: int) -> Tensor:
    """Concatenates the named gradients of all draws, scaled by their rms over whole cases and over pieces."""
    pool = []
    for name in names:
        for part in (slice(0, wholes), slice(wholes, None)):
            values, true = (torch.stack([draw[name] for draw in draws[part]]) for draws in (side, exact))
            size = true.double().square().mean().sqrt().log2().round().exp2()  # dividing by it is exact
            pool.append((values / size.to(values.dtype)).flatten())
    return torch.cat(pool)


Results = dict[str, Tensor]


def _results(call: Call, leaves: dict[str, Tensor], seed: int = 1, unused: bool = False) -> Results:
    """Returns outputs by their number and gradients by their leaf's name."""
    outputs = call()
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), cotangents(outputs, seed), allow_unused=unused, materialize_grads=unused
    )
    return {f"output {at}": output.detach() for at, output in enumerate(outputs)} | {
        f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


# ---- the cases -----------------------------------------------------------------------------------------------------


def make_cases(options: argparse.Namespace) -> list[Case]:
    named = settings(cuda=torch.device(options.device).type == "cuda")
    return [
        make_case(name, setting, op, pass_, dtype, options.device)
        for op in OPERATORS
        for name, setting in named.items()
        for dtype in ([setting.dtype] if setting.dtype else options.dtype)
        for pass_ in PASSES
    ]


def make_case(name: str, setting: Setting, op: str, pass_: str, dtype: str, device: str) -> Case:
    kind, size = setting.kind, setting.size
    work = (
        least_bytes(op, pass_, kind, size, getattr(torch, dtype).itemsize),
        least_flops(op, pass_, kind, size),
    )
    arguments = {"op": op, "pass_": pass_, "kind": kind, "size": list(size), "packed": setting.packed}
    arguments |= {"dtype": dtype, "device": device}
    what = ("hyper", op, name, pass_, dtype)
    peers = peers_of(op, kind, setting.packed)
    if kind == "mhc" and torch.device(device).type == "cuda":
        peers += peers_cuda.mhc_peers(op, pass_)
    return Case(*what, *work, build, arguments, setting.suite, halve=halve, peers=peers)


def peers_of(op: str, kind: str, packed: bool) -> tuple[str, ...]:
    if op == "boundary":
        return (SEPARATE,)
    same = op == "pre+post" and KINDS[kind].peer and packed
    return ("hyper-connections", "hyper-connections compile") if same else ()


def halve(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the arguments of the same case with half the batch."""
    b, *rest = arguments["size"]
    return None if b % 2 else arguments | {"size": [b // 2, *rest]}


def main(argv: Sequence[str] | None = None) -> int:
    return harness_cases.main("Benchmark of hyper-connections.", make_cases, argv, check)


if __name__ == "__main__":
    sys.exit(main())
