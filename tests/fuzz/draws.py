"""Tensors and numbers of one call, drawn from one `random.Random`: sizes, memory layouts, dtypes and contents.

Tensors lie against a page that cannot be touched, or in the heap: a kernel that reads beyond them ends the process.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (
    torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.int16,
    torch.float8_e4m3fn,
)  # fmt: skip
SMALL = (1, 2, 3)
LARGE = (7, 8, 16, 17, 63, 64, 65)
HUGE = (2**31, 2**32 + 1, 2**40, 2**61, 2**62, 2**63 - 1)
INTS = (-(2**63), -1, 0, 1, 2, 3, 5, 2**12, 2**31 - 1, 2**31, 2**32, 2**40, 2**61, 2**62, 2**63 - 1)
NUMBERS = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1.0, 1e-320, 1e308, 1.0, 0.5)
FILLS = ("normal", "zeros", "special", "nan", "large", "tiny")
LAYOUTS = ("contiguous", "permuted", "gaps", "expanded", "overlapping", "offset")
MAX_NUMBER = 2**63 - 1
MAX_ELEMENTS = 2**14  # that a tensor holds in memory: dimensions beyond it have stride 0
MANY_ELEMENTS = 2**22  # a call on more elements may take long

ARENA_BYTES = 2**18
_libc = ctypes.CDLL(None, use_errno=True)


class Arena:
    """Memory between two pages that cannot be touched."""

    def __init__(self) -> None:
        page = mmap.PAGESIZE
        self._memory = mmap.mmap(-1, ARENA_BYTES + 2 * page)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for at in (first, first + page + ARENA_BYTES):
            if _libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(page), 0):
                raise OSError(ctypes.get_errno(), "mprotect failed")
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8, count=ARENA_BYTES, offset=page)

    def place(self, count: int, dtype: torch.dtype, last: bool) -> Tensor:
        """Returns ``count`` elements that end (or begin) at a guard page."""
        size = count * dtype.itemsize
        start = ARENA_BYTES - size if last else 0
        return self.bytes[start : start + size].view(dtype)


class Memory:
    """The arenas that the tensors of a call are placed in one after another, and the numbers that fill them."""

    def __init__(self, arenas: int = 32) -> None:
        self._arenas = [Arena() for _ in range(arenas)]
        self._used = 0
        generator = torch.Generator().manual_seed(0)
        count = 2 * MAX_ELEMENTS
        normal = torch.randn(count, generator=generator, dtype=torch.float64)
        special = normal.clone()
        odd = torch.rand(count, generator=generator) < 0.1
        numbers = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e-310, -0.0, 1e300, 1e-40])
        special[odd] = numbers.double()[torch.arange(int(odd.sum())) % len(numbers)]
        self.floats = {
            "normal": normal,
            "zeros": torch.zeros(count, dtype=torch.float64),
            "special": special,
            "nan": torch.full((count,), float("nan"), dtype=torch.float64),
            "large": normal * 1e30,
            "tiny": normal * 1e-42,
        }
        few = torch.randint(-1, 4, (count,), generator=generator)
        wild = torch.tensor(INTS)[torch.randint(len(INTS), (count,), generator=generator)]
        self.ints = {"valid": few, "wild": wild, "zeros": few * 0}
        bits = torch.randint(256, (count,), generator=generator).to(torch.uint8)
        self.bytes = {"valid": bits % 2, "wild": torch.where(bits % 3 > 0, bits, 0), "one": bits * 0 + 1}

    def begin(self) -> None:
        self._used = 0

    def new(self, count: int, dtype: torch.dtype, rng: Random) -> Tensor:
        """Allocates so many elements, in an arena or in the heap."""
        if self._used < len(self._arenas) and count * dtype.itemsize <= ARENA_BYTES and rng.random() < 0.6:
            self._used += 1
            return self._arenas[self._used - 1].place(count, dtype, last=rng.random() < 0.8)
        return torch.empty(count, dtype=dtype)


@dataclass(slots=True)
class Spec:
    """Shape, dtype, contents and layout of one tensor argument."""

    shape: list[int]
    dtype: torch.dtype
    fill: str = "normal"
    layout: str = "contiguous"
    device: str = "cpu"
    wrap: str = ""
    requires_grad: bool = False
    gain: float = 1.0  # of floating-point contents

    def build(self, memory: Memory, rng: Random) -> Tensor:
        if math.prod(max(size, 1) for size in self.shape) > MAX_NUMBER:  # more than a tensor can have
            self.shape = [min(size, 2) for size in self.shape]
        if self.device == "meta":
            return torch.empty(1, device="meta", dtype=self.dtype).as_strided(self.shape, [0] * len(self.shape))
        strides = self._strides(rng)
        skipped = 1 if self.layout == "offset" else 0
        count = skipped + 1 + sum((size - 1) * stride for size, stride in zip(self.shape, strides, strict=True))
        if 0 in self.shape:
            count = skipped
        flat = memory.new(count, self.dtype, rng)
        self._write(flat, memory, rng)
        flat = flat[skipped:]
        tensor = flat.as_strided(self.shape, strides)
        return self._wrapped(tensor)

    def _strides(self, rng: Random) -> list[int]:
        rank = len(self.shape)
        if self.layout == "overlapping":
            return [1 if size <= MAX_ELEMENTS else 0 for size in self.shape]
        order = list(range(rank - 1, -1, -1))
        if self.layout == "permuted":
            rng.shuffle(order)
        step = rng.choice((2, 3)) if self.layout == "gaps" else 1
        strides = [0] * rank
        for axis in order:
            size = self.shape[axis]
            if (self.layout == "expanded" and rng.random() < 0.5) or max(size, 1) * step > 2 * MAX_ELEMENTS - 2:
                continue
            strides[axis] = step
            step *= max(size, 1)
            if self.layout == "gaps" and rng.random() < 0.5:
                step += 1
        return strides

    def _write(self, flat: Tensor, memory: Memory, rng: Random) -> None:
        count = flat.numel()
        if not count:
            return
        start = rng.randrange(MAX_ELEMENTS)
        if self.dtype == torch.bool:
            source = memory.bytes.get(self.fill, memory.bytes["valid"])
            flat.view(torch.uint8).copy_(_cut(source, start, count))
        elif self.dtype.is_floating_point:
            flat.copy_(self.gain * _cut(memory.floats.get(self.fill, memory.floats["normal"]), start, count))
        elif self.dtype.is_complex:
            torch.view_as_real(flat).copy_(_cut(memory.floats["normal"], start, count).unsqueeze(1))
        else:
            flat.copy_(_cut(memory.ints.get(self.fill, memory.ints["valid"]), start, count))

    def _wrapped(self, tensor: Tensor) -> Any:
        if self.wrap == "negative" and tensor.is_floating_point():
            tensor = torch._neg_view(tensor)
        elif self.wrap == "real" and tensor.is_floating_point() and 0 < tensor.numel() <= MAX_ELEMENTS:
            tensor = torch.stack((tensor, tensor), -1)[..., 0]
        elif self.wrap == "sparse" and self.dtype in FLOATS and tensor.numel() <= MAX_ELEMENTS and tensor.dim() > 0:
            tensor = tensor.to_sparse()
        elif self.wrap == "parameter" and tensor.is_floating_point():
            tensor = torch.nn.Parameter(tensor)
        elif self.wrap == "number":
            return 1
        elif self.wrap == "list":
            return [tensor]
        elif self.wrap == "text":
            return "tensor"
        if self.requires_grad and isinstance(tensor, Tensor) and tensor.is_leaf and tensor.dtype in FLOATS:
            tensor = tensor.requires_grad_()
        return tensor


def _cut(source: Tensor, start: int, count: int) -> Tensor:
    """Returns ``count`` elements from ``start``, and starts over where the source ends."""
    if start + count <= len(source):
        return source[start : start + count]
    repeats = -(-(start + count) // len(source))
    return source.repeat(repeats)[start : start + count]


@dataclass
class Draw:
    """Source of sizes and tensors for recipes. A size is drawn at its first use: ``d.B`` is the same number from then
    on.

    ``hostile`` draws may be huge, of any layout and content; others are what the operators promise to serve.
    """

    rng: Random
    hostile: bool = False
    dtype: torch.dtype = torch.float32
    sizes: dict[str, int] = field(default_factory=dict)
    _room: int = 2**9
    _plain: bool = False

    @classmethod
    def of(cls, rng: Random, hostile: bool) -> Draw:
        found = cls(rng, hostile, rng.choice(FLOATS if hostile or rng.random() < 0.4 else FLOATS[:2]))
        found._plain = rng.random() < 0.3  # all tensors contiguous: the most common paths
        if rng.random() < 0.1:
            found._room = 2**13
        return found

    def __getattr__(self, name: str) -> int:
        if name.startswith("_") or not name[0].isalpha():
            raise AttributeError(name)
        if name not in self.sizes:
            self.sizes[name] = self._size()
        return self.sizes[name]

    def size(self, name: str, choices: tuple[int, ...]) -> int:
        """Returns the size of that name, drawn from these choices at its first use."""
        if name not in self.sizes:
            self.sizes[name] = self.rng.choice(choices)
            self._room = max(1, self._room // max(self.sizes[name], 1))
        return self.sizes[name]

    def _size(self) -> int:
        rng = self.rng
        chance = rng.random()
        if self.hostile and chance < 0.04:
            return rng.choice(HUGE)
        if chance < (0.12 if self.hostile else 0.03):
            return 0
        size = rng.choice(LARGE if chance > 0.6 else SMALL)
        if size > self._room:
            size = rng.choice(SMALL)
        self._room = max(1, self._room // max(size, 1))
        return size

    def _layout(self) -> str:
        return "contiguous" if self._plain else self.rng.choice(LAYOUTS)

    def float(self, *shape: int, dtype: torch.dtype | None = None) -> Spec:
        fill = self.rng.choice(FILLS) if self.hostile and self.rng.random() < 0.5 else "normal"
        return Spec(list(shape), dtype or self.dtype, fill, self._layout())

    def weight(self, rows: int, columns: int) -> Spec:
        """Describes a matrix whose product keeps its input's size: a state that grows from layer to layer ends in
        chaos."""
        spec = self.float(rows, columns)
        spec.gain = max(columns, 1) ** -0.5
        return spec

    def wide(self, *shape: int) -> Spec:
        """Describes a tensor of the accumulation type."""
        return self.float(*shape, dtype=torch.promote_types(self.dtype, torch.float32))

    def mask(self, *shape: int) -> Spec:
        fill = "wild" if self.rng.random() < 0.25 else "valid"
        return Spec(list(shape), torch.bool, fill, self._layout())

    def index(self, *shape: int) -> Spec:
        fill = "wild" if self.rng.random() < 0.25 else "valid"
        return Spec(list(shape), torch.int64, fill, self._layout())

    def maybe(self, spec: Any, chance: float = 0.5) -> Any:
        return spec if self.rng.random() < chance else None

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def choice(self, *choices: Any) -> Any:
        return self.rng.choice(choices)
