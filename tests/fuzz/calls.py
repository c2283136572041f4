"""Makes and judges one call, which a seed and a number determine: its target, its arguments, and whether its answer is
right."""

from __future__ import annotations

import ctypes
import functools
import math
import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from fuzz import recipes
from fuzz.draws import (
    FILLS,
    FLOATS,
    HUGE,
    INTS,
    LARGE,
    LAYOUTS,
    MANY_ELEMENTS,
    NUMBERS,
    OTHERS,
    SMALL,
    Draw,
    Memory,
    Spec,
)
from xlayer_ext import backend
from xlayer_ext import functional as XF

# Kinds of calls, and how many of 1000 are of each.
SHARES = {"hostile": 640, "functional": 250, "valid": 65, "functional-valid": 35, "racing": 10}
MODES = tuple(SHARES)
THREADS = (1,) * 17 + (2, 3, 4)
# Exceptions that an operator may raise, and a function of the functional API.
OPERATOR_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, MemoryError)
FUNCTION_ERRORS = (RuntimeError, ValueError, TypeError, MemoryError)
# Messages that do not help a user.
SILENT = re.compile(
    r"INTERNAL ASSERT|API call failed|tuple index out of range|values to unpack|has no attribute|"
    r"object is not (callable|iterable|subscriptable)"
)
# The largest error of a valid call, relative to one more than the largest number of the answer.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}
# Sizes of calls that another thread disturbs: some milliseconds.
DISTURBED = {
    "masked_mean": {"B": 2, "S": 4000, "H": 2},
    "ema_scan": {"L": 8, "N": 500, "d": 3},
    "depth_gru": {"L": 4, "N": 200, "d": 5, "i": 4},
    "depth_attention": {"L": 5, "N": 300, "h": 2, "w": 3, "d": 4},
    "hdim_attention": {"B": 2, "Sq": 40, "Sk": 65, "D": 3, "M": 8, "H": 8},
    "hyper_pre": {"outer": 3, "inner": 100, "n": 4, "d": 9},
    "hyper_post": {"outer": 3, "inner": 100, "n": 4, "d": 9},
    "hyper_post_pre": {"outer": 3, "inner": 100, "n": 4, "d": 9},
    "vq_nearest": {"h": 1, "N": 2000, "K": 65, "D": 4},
    "vq_statistics": {"h": 2, "N": 4000, "D": 2},
    "fsq": {"N": 500, "T": 4, "c": 3},
}


class Finding(Exception):
    """Raised for a call that came back with a wrong answer or a wrong error."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass
class Call:
    """A call that is ready to be made."""

    mode: str
    target: str
    arguments: dict[str, Any]
    run: Callable[[], str]  # how it ended, "answered" or "refused"; raises Finding
    threads: int = 1

    @property
    def much(self) -> bool:
        """Tells whether the arguments are so large that the call may take long."""
        return any(math.prod(t.shape) > MANY_ELEMENTS for t in self.arguments.values() if isinstance(t, Tensor))

    def description(self) -> str:
        prefix = "xlayer_ext.functional." if self.mode.startswith("functional") else "torch.ops.xlayer."
        given = ", ".join(f"{name}={_told(value)}" for name, value in self.arguments.items())
        return f"{prefix}{self.target}({given})  [{self.mode}, {self.threads} thread(s)]"


def _told(value: Any) -> str:
    if isinstance(value, list) and len(value) > 20:
        return f"<list of {len(value)}: {value[:3]}…>"
    if not isinstance(value, Tensor):
        return repr(value)
    if value.layout != torch.strided:
        return f"<{value.layout} {list(value.shape)}>"
    parts = [str(value.dtype).removeprefix("torch."), str(list(value.shape))]
    if value.dim() and not value.is_contiguous():
        parts.append(f"strides {list(value.stride())}")
    if value.device.type != "cpu":
        parts.append(str(value.device))
    elif 0 < value.numel() <= 4 and not value.dtype.is_complex:
        parts.append(f"= {value.detach().tolist()}")
    if value.is_neg():
        parts.append("negative bit")
    if value.requires_grad:
        parts.append("requires_grad")
    return f"<{' '.join(parts)}>"


class Maker:
    """Makes calls of one process."""

    def __init__(self, seed: int, modes: list[str] | None = None, targets: list[str] | None = None) -> None:
        self.seed = seed
        self._memory = Memory()
        operators, functions = recipes.operators(), recipes.functions()
        of_mode = {
            "hostile": operators,
            "functional": [name for name in functions if name in recipes.FUNCTIONS],
            "valid": list(recipes.OPERATORS),
            "functional-valid": [name for name in functions if name in recipes.FUNCTIONS],
            "racing": [name for name in operators if name.removesuffix("_backward") in DISTURBED],
        }
        self._targets = {}
        for mode in modes or MODES:
            kept = [name for name in of_mode[mode] if not targets or name in targets]
            if kept:
                self._targets[mode] = kept
        if not self._targets:
            raise ValueError(f"nothing to call: no {' or '.join(modes or MODES)} call of {', '.join(targets or [])}")
        self._modes, self._shares = list(self._targets), [SHARES[mode] for mode in self._targets]
        self._overloads = {name: getattr(torch.ops.xlayer, name).default for name in operators}
        self._schemas = {name: overload._schema.arguments for name, overload in self._overloads.items()}
        self._writer: Writer | None = None
        warnings.simplefilter("ignore")

    def make(self, number: int) -> Call:
        """Makes the call of that number."""
        rng = Random(f"{self.seed}/{number}")
        mode = rng.choices(self._modes, self._shares)[0]
        target = rng.choice(self._targets[mode])
        self._memory.begin()
        make = {
            "hostile": self._hostile,
            "functional": self._functional,
            "valid": self._valid,
            "functional-valid": self._functional_valid,
            "racing": self._racing,
        }
        threads = rng.choice(THREADS)
        call = make[mode](target, rng)
        call.threads = threads
        return call

    # ---- wild calls --------------------------------------------------------------------------------------------------

    def _hostile(self, operator: str, rng: Random) -> Call:
        draw = Draw.of(rng, hostile=True)
        drawn = None if rng.random() < 0.15 else recipes.draw_operator(operator, draw)
        if drawn is None:
            drawn = {argument.name: _of_type(str(argument.type), draw) for argument in self._schemas[operator]}
        if rng.random() < 0.8:
            _mutate(drawn, draw)
        arguments = self._built(drawn, rng, gradients=rng.random() < 0.1)
        values = [arguments[argument.name] for argument in self._schemas[operator]]
        overload = self._overloads[operator]
        return Call("hostile", operator, arguments, lambda: _endure(lambda: overload(*values), OPERATOR_ERRORS))

    def _functional(self, function: str, rng: Random) -> Call:
        draw = Draw.of(rng, hostile=True)
        drawn = recipes.FUNCTIONS[function](draw)
        if rng.random() < 0.8:
            _mutate(drawn, draw)
        arguments = self._built(drawn, rng, gradients=rng.random() < 0.3)
        called = getattr(XF, function)
        run = lambda: _endure(lambda: called(**recipes.assembled(arguments)), FUNCTION_ERRORS)  # noqa: E731
        return Call("functional", function, arguments, run)

    def _built(self, drawn: dict[str, Any], rng: Random, gradients: bool = False) -> dict[str, Any]:
        built = {}
        for name, value in drawn.items():
            if isinstance(value, Spec):
                value.requires_grad = gradients and rng.random() < 0.7
                value = value.build(self._memory, rng)
            built[name] = value
        return built

    # ---- valid calls -------------------------------------------------------------------------------------------------

    def _valid(self, operator: str, rng: Random) -> Call:
        recipe = recipes.OPERATORS[operator]
        draw = Draw.of(rng, hostile=False)
        drawn = recipe.draw(draw)
        backward = bool(recipe.gradients) and rng.random() < 0.5
        if backward and "keep" in drawn:
            drawn["keep"] = True
        arguments = self._built(drawn, rng)
        exact = {name: _exact(value) for name, value in arguments.items()}

        def run() -> str:
            outputs = self._overloads[operator](*(arguments[a.name] for a in self._schemas[operator]))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            leaves = {name: exact[name] for name in recipe.gradients if isinstance(exact[name], Tensor)}
            for leaf in leaves.values():
                leaf.requires_grad_(backward)
            expected = recipe.formula(**exact)
            step = 1.0 if recipe.loose else 0.0
            plain = functools.cache(lambda: recipe.formula(**_clean(arguments)))
            for index, (got, wanted) in enumerate(zip(outputs, expected, strict=True)):
                if wanted is not None:
                    _compare(f"output {index}", got, wanted.detach(), step, lambda index=index: plain()[index])
            if backward:
                self._valid_backward(operator, rng, arguments, outputs, expected, leaves)
            return "answered"

        return Call("valid", operator, arguments, run)

    def _valid_backward(
        self, operator: str, rng: Random, forward: dict[str, Any], outputs: tuple[Tensor, ...],
        expected: tuple[Tensor | None, ...], leaves: dict[str, Tensor],
    ) -> None:  # fmt: skip
        recipe = recipes.OPERATORS[operator]
        upstream = {}
        for name, index in recipe.upstream:
            wanted = expected[index]
            if wanted is not None:
                spec = Spec(list(wanted.shape), outputs[index].dtype, layout=rng.choice(LAYOUTS))
                upstream[name] = spec.build(self._memory, rng)
        kept = {}
        for name, index in recipe.kept:
            flat = self._memory.new(outputs[index].numel(), outputs[index].dtype, rng)
            kept[name] = flat.view(outputs[index].shape).copy_(outputs[index])
        rest = {"tokens": forward["x"].shape[1]} if operator == "masked_mean" else {}
        given = forward | upstream | kept | rest
        backward = f"{operator}_backward"
        values = [given.get(argument.name) for argument in self._schemas[backward]]
        results = self._overloads[backward](*values)
        results = results if isinstance(results, tuple) else (results,)
        if not recipe.smooth(forward):
            return
        pairs = [(expected[index], _exact(upstream[name])) for name, index in recipe.upstream if name in upstream]
        pairs = [(wanted, grad) for wanted, grad in pairs if wanted is not None and wanted.requires_grad]
        if not pairs:
            return
        roots, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(roots, list(leaves.values()), grads, allow_unused=True)
        by_name = dict(zip(leaves, found, strict=True))

        @functools.cache
        def plain() -> dict[str, Tensor]:
            given = _clean(forward)
            own = {name: given[name].requires_grad_() for name in leaves}
            formed = recipe.formula(**given)
            used = [(formed[i], upstream[name]) for name, i in recipe.upstream if name in upstream]
            used = [(out, grad) for out, grad in used if out is not None and out.requires_grad]
            ends, pulls = zip(*used, strict=True)
            made = torch.autograd.grad(ends, list(own.values()), pulls, allow_unused=True)
            return dict(zip(own, made, strict=True))

        for name, got in zip(recipe.gradients, results, strict=True):
            wanted = by_name.get(name)
            if wanted is not None:
                _compare(f"gradient of {name}", got, wanted, 0.0, lambda name=name: plain()[name])

    def _functional_valid(self, function: str, rng: Random) -> Call:
        draw = Draw.of(rng, hostile=False)
        arguments = self._built(recipes.FUNCTIONS[function](draw), rng)
        exact = {name: _exact(value) for name, value in arguments.items()}
        loose = function == "fsq"

        def run() -> str:
            called = getattr(XF, function)
            got = called(**recipes.assembled(arguments))

            def by_formula(given: dict[str, Any]) -> Any:
                with backend("reference"):
                    found = called(**recipes.assembled(given))
                return found if isinstance(found, tuple) else (found,)

            got = got if isinstance(got, tuple) else (got,)
            plain = functools.cache(lambda: by_formula(_clean(arguments)))
            for index, (ours, theirs) in enumerate(zip(got, by_formula(exact), strict=True)):
                if ours.is_floating_point():
                    step = 1.0 if loose else 0.0
                    _compare(f"output {index}", ours, theirs, step, lambda index=index: plain()[index])
            return "answered"

        return Call("functional-valid", function, arguments, run)

    # ---- disturbed calls ---------------------------------------------------------------------------------------------

    def _racing(self, operator: str, rng: Random) -> Call:
        draw = Draw.of(rng, hostile=False)
        draw._plain = True
        draw.sizes |= DISTURBED[operator.removesuffix("_backward")]
        drawn = recipes.draw_operator(operator, draw)
        assert drawn is not None
        arguments = self._built(drawn, rng)
        values = [arguments[argument.name] for argument in self._schemas[operator]]
        overload = self._overloads[operator]
        other = {}
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.numel() > 0 and value.is_contiguous():
                spec = Spec(list(value.shape), value.dtype, rng.choice(("wild", "special", "valid", "one")))
                other[name] = _bytes(spec.build(self._memory, rng))

        def run() -> str:
            if self._writer is None:  # threads do not survive a fork: every process starts its own
                self._writer = Writer()
            ours = [(arguments[name], _bytes(arguments[name]), wild) for name, wild in other.items()]
            with self._writer.disturbing(ours):
                for _ in range(4):
                    _endure(lambda: overload(*values), OPERATOR_ERRORS)
            return "answered"

        return Call("racing", operator, arguments, run)


def _of_type(kind: str, d: Draw) -> Any:
    """Draws any value of a schema's type."""
    rng = d.rng
    if kind.startswith("Optional[") and rng.random() < 0.5:
        return None
    kind = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional") else kind
    if kind == "Tensor":
        return _any_tensor(d)
    if kind == "bool":
        return d.flag()
    if kind in ("int", "SymInt"):
        return rng.choice(INTS)
    if kind == "float":
        return rng.choice(NUMBERS)
    if kind in ("List[int]", "List[SymInt]"):
        return [rng.choice((2, 3, 5, 8, rng.choice(INTS))) for _ in range(rng.choice((0, 1, 2, 3, 64, 65)))]
    if kind == "List[float]":
        return [rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 2, 3, 64, 65)))]
    if kind == "str":
        return rng.choice(("", "tanh", "\0", "x" * 1000))
    return None


def _any_tensor(d: Draw) -> Spec:
    rng = d.rng
    shape = [_any_size(rng) for _ in range(rng.choice((0, 1, 2, 2, 3, 3, 3, 4, 4, 5)))]
    dtype = rng.choice(OTHERS) if rng.random() < 0.3 else d.dtype
    return Spec(shape, dtype, rng.choice((*FILLS, "wild")), rng.choice(LAYOUTS))


def _any_size(rng: Random) -> int:
    chance = rng.random()
    return rng.choice(HUGE) if chance < 0.05 else 0 if chance < 0.15 else rng.choice(LARGE if chance > 0.7 else SMALL)


def _mutate(drawn: dict[str, Any], d: Draw) -> None:
    """Makes one to three of the arguments wrong, or odd."""
    for _ in range(d.rng.choice((1, 1, 1, 2, 3))):
        name = d.rng.choice(list(drawn))
        drawn[name] = _odd(drawn[name], drawn, d)


def _odd(value: Any, drawn: dict[str, Any], d: Draw) -> Any:
    rng = d.rng
    if isinstance(value, Spec):
        return _odd_tensor(value, drawn, d)
    if value is None:
        return _any_tensor(d) if rng.random() < 0.8 else rng.choice((0, "None", []))
    if rng.random() < 0.03:
        return rng.choice((None, "text", [], 1.5, True, -1))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTS)
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    if isinstance(value, str):
        return rng.choice(("", "nonsense", None, 3))
    if isinstance(value, list):
        numbers = NUMBERS if value and isinstance(value[0], float) else INTS
        kind = rng.randrange(4)
        if kind == 0 or not value:
            return []
        if kind == 1:
            return [*value[:-1], rng.choice(numbers)]
        return value * rng.choice((2, 65, 1000)) if kind == 2 else value[1:]
    return value


def _odd_tensor(spec: Spec, drawn: dict[str, Any], d: Draw) -> Any:
    rng, shape = d.rng, list(spec.shape)
    odd = Spec(shape, spec.dtype, spec.fill, spec.layout, spec.device)
    kind = rng.randrange(13)
    if kind <= 2 and shape:
        shape[rng.randrange(len(shape))] = rng.choice(HUGE) if kind == 0 else _any_size(rng)
    elif kind == 3:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((0, 1, 1, 2, 2**40)))
    elif kind == 4 and shape:
        del shape[rng.randrange(len(shape))]
    elif kind == 5:
        odd.dtype = rng.choice((*FLOATS, *OTHERS))
    elif kind == 6:
        odd.fill = rng.choice((*FILLS, "wild", "one"))
    elif kind == 7:
        odd.layout = rng.choice(LAYOUTS)
    elif kind == 8:
        odd.wrap = rng.choice(("negative", "real", "parameter", "sparse", "number", "list", "text"))
    elif kind == 9:
        return None
    elif kind == 10:
        return rng.choice(list(drawn.values()))
    elif kind == 11:  # all of them: a call for shapes alone
        others = drawn.values() if rng.random() < 0.7 else []
        for other in (*others, odd):
            if isinstance(other, Spec):
                other.device = "meta"
    else:
        return _any_tensor(d)
    return odd


# ---- answers ---------------------------------------------------------------------------------------------------------


def _endure(call: Callable[[], Any], errors: tuple[type[Exception], ...]) -> str:
    """Makes a call that may be refused, and what can be differentiated of its answer."""
    try:
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        roots = [o.sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        if roots:
            torch.autograd.backward(roots)
    except errors as error:
        _check_message(error)
        return "refused"
    except Exception as error:
        raise Finding("error", f"{type(error).__name__}: {_first_line(error)}") from error
    return "answered"


def _check_message(error: Exception) -> None:
    line = _first_line(error)
    if not line.strip() or len(line) > 2000 or SILENT.search(str(error)):
        at = SILENT.search(str(error))
        told = line if at is None or at.group() in line else f"{line} … {at.group()}"
        raise Finding("message", f"{type(error).__name__}: {told}") from error


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _exact(value: Any) -> Any:
    """Copies the arguments for the formula: in float64, with masks of 0 and 1 whatever bytes they hold."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bool:
        return value.view(torch.uint8) != 0
    return value.detach().double().clone() if value.is_floating_point() else value.clone()


def _clean(arguments: dict[str, Any]) -> dict[str, Any]:
    """Copies the arguments at their own dtypes, with masks of 0 and 1.

    float64 tensors differ in their last bits: what comes of that shows what rounding can do where the formula is as
    exact as the answer that it is asked about. A state that attends to many layers may grow it a billionfold.
    """
    return {name: _copied(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _copied(value: Tensor) -> Tensor:
    if value.dtype == torch.bool:
        return _exact(value)  # type: ignore[no-any-return]
    if value.dtype != torch.float64:
        return value.detach().clone()
    turns = torch.arange(value.numel(), dtype=torch.float64).remainder(3).sub(1).view(value.shape)
    return value.detach() * (1 + 2**-50 * turns)


def _compare(what: str, got: Tensor, wanted: Tensor, step: float, plain: Callable[[], Tensor]) -> None:
    """Raises where the answer is far from the exact one, unless the plain formula at its dtype is as far."""
    if got.shape != wanted.shape:
        raise Finding("wrong", f"{what} has shape {list(got.shape)}, the formula's {list(wanted.shape)}")
    error, bound = _distance(got, wanted, step)
    if error <= bound:
        return
    theirs, _ = _distance(plain().detach().to(got.dtype), wanted, step)
    if error <= 4 * theirs:
        return
    told = "is NaN in other places than the formula's" if error == math.inf else f"is wrong by {error:.1e}"
    raise Finding("wrong", f"{what} {told}, the plain formula by {theirs:.1e} ({got.dtype})")


def _distance(got: Tensor, wanted: Tensor, step: float) -> tuple[float, float]:
    """Returns the largest error, infinite where a NaN is out of place, and the largest error that is tolerated."""
    actual, wanted = got.detach().double(), wanted.detach().to(got.dtype).double()
    if not torch.equal(actual.isnan(), wanted.isnan()):
        return math.inf, 0.0
    both = actual.isfinite() & wanted.isfinite()
    if not both.any():
        return 0.0, 0.0
    actual, wanted = actual[both], wanted[both]
    bound = TOLERANCES[got.dtype] * (1 + float(wanted.abs().max())) + step
    return float((actual - wanted).abs().max()), bound


# ---- another thread --------------------------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


class Writer:
    """A thread that writes two contents into the arguments of a call in turn, as fast as it can."""

    def __init__(self) -> None:
        self._jobs: list[tuple[int, bytes, bytes]] = []
        self._lock = threading.Lock()
        self._start = threading.Event()
        threading.Thread(target=self._write, daemon=True).start()

    def _write(self) -> None:
        move = ctypes.memmove  # without Python's lock
        while True:
            self._start.wait()
            with self._lock:
                for address, ours, wild in self._jobs:
                    move(address, wild, len(wild))
                    move(address, ours, len(ours))

    def disturbing(self, arguments: list[tuple[Tensor, bytes, bytes]]) -> Disturbance:
        return Disturbance(self, [(t.data_ptr(), ours, wild[: len(ours)]) for t, ours, wild in arguments])


class Disturbance:
    """A context during which the writer overwrites the arguments."""

    def __init__(self, writer: Writer, jobs: list[tuple[int, bytes, bytes]]) -> None:
        self._writer, self._jobs = writer, jobs

    def __enter__(self) -> None:
        with self._writer._lock:
            self._writer._jobs = self._jobs
        self._writer._start.set()

    def __exit__(self, *_: object) -> None:
        self._writer._start.clear()
        with self._writer._lock:  # waits until the last write has ended
            self._writer._jobs = []
