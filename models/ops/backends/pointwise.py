"""The backend "pointwise" of the mixture convolution on the CPU, compiled from `pointwise.cpp`.

For kernels of one tap on maps that are large compared with the kernels: these are mixed once and stay in the cache.
"""

import ctypes
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..geometry import Geometry, full_alpha, live_alpha
from ..scratch import lent, output, scratch, widened
from .compiled import STORED, TYPES, compiles, library, run

CASTS_CELLS = True
SOURCE = "pointwise.cpp"
# bytes of the kernels that are mixed at a time, to fit the last cache
KERNEL_BYTES = 16 << 20


def available(geo: Geometry, dtype: torch.dtype, device: str) -> bool:
    """Whether the backend can evaluate a call."""
    return (
        math.prod(geo.kernel) == 1
        and geo.foldable
        and all(left == 0 and right <= 0 for left, right in geo.pads)
        and compiles(SOURCE, dtype, device, STORED)
    )


def samples_at_a_time(geo: Geometry, item_bytes: int) -> int:
    """How many samples have their kernels mixed at a time."""
    return max(1, KERNEL_BYTES // (geo.c_out * geo.c_in * item_bytes))


class _Call(ctypes.Structure):
    """The shapes of a call, as `pointwise.cpp` reads them."""

    _fields_ = [(name, ctypes.c_int64) for name in "samples g_out g_in n c_out c_in positions threads".split()]


@functools.lru_cache(maxsize=1024)
def _call(geo: Geometry, threads: int) -> _Call:
    return _Call(
        samples=geo.batch * geo.groups,
        g_out=geo.g_out // geo.groups,
        g_in=geo.g_in,
        n=geo.n,
        c_out=geo.cell[0],
        c_in=geo.cell[1],
        positions=geo.positions,
        threads=threads,
    )


def _seen(geo: Geometry) -> tuple:
    """Index of the positions of x that the convolution reads."""
    return (..., *(slice(0, (out - 1) * s + 1, s) for out, s in zip(geo.out, geo.stride, strict=True)))


class _Pass:
    """What the forward and the backward pass share: the arrays that the compiled functions read, piece by piece.

    Args:
        types: the data type in which x is passed, for each that it may have.
    """

    def __init__(
        self, x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry, types: Mapping[torch.dtype, torch.dtype]
    ) -> None:
        dtype = TYPES[x.dtype]
        self.library = library(SOURCE, STORED[x.dtype])
        # indexing takes longer than the check
        x = x[_seen(geo)] if x.shape[2:] != geo.out else x
        # fresh pages for a copy would take longer than the copy
        self.x, self.cells = widened("x", x, types[x.dtype]).contiguous(), cells.to(dtype).contiguous()
        self.rows = live_alpha(alpha, geo).to(dtype).contiguous()  # [B, 1, Go, Gi, n]
        self.step = samples_at_a_time(geo, dtype.itemsize)
        self.geo = geo

    def pieces(self) -> Iterator[tuple[slice, Geometry]]:
        """Slices of the batch whose kernels are mixed at a time, and the geometry of each."""
        for first in range(0, self.geo.batch, self.step):
            count = min(self.step, self.geo.batch - first)
            geo = self.geo if count == self.geo.batch else replace(self.geo, batch=count)
            yield slice(first, first + count), geo

    def kernels(self, slot: str, part: slice) -> Tensor:
        """Scratch memory for the kernels of some samples."""
        return scratch(slot, (*self.rows[part].shape[:-1], *self.geo.cell), self.rows)

    def run(self, name: str, geo: Geometry, *arrays: Tensor | None) -> int:
        """Call a compiled function."""
        call = _call(geo, torch.get_num_threads())
        return run(self.library, name, call, *arrays)


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry) -> Tensor:
    """Mix kernels, then multiply blocks of positions by them."""
    own = _Pass(x, alpha, cells, geo, STORED)
    y = output((geo.batch, geo.c_out, *geo.out), own.x, x.dtype)
    for part, some in own.pieces():
        own.run("forward", some, own.x[part], own.rows[part], own.cells, own.kernels("kernels", part), y[part])
    return y.to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`; the kernels are mixed again."""
    own = _Pass(x, alpha, cells, geo, TYPES)
    dy = dy.to(own.x.dtype).contiguous()
    dx = torch.empty_like(own.x) if needs[0] else None
    dalpha = torch.empty_like(own.rows) if needs[1] else None
    dcells = None
    for part, some in own.pieces():
        dkernels = own.kernels("kernel gradients", part) if needs[1] or needs[2] else None
        rows, sums, total = own.rows[part], None, lent(own.cells.shape, own.cells) if needs[2] else None
        if needs[1]:
            sums = scratch("sums", (own.run("parts_of_alpha", some), *rows.shape), own.x)
        dx_part = dx[part] if needs[0] else None
        arrays = dy[part], own.x[part], rows, own.cells, own.kernels("kernels", part), dkernels, dx_part, sums, total
        own.run("backward", some, *arrays)
        if needs[1]:
            dalpha[part] = sums[0]
        if needs[2]:
            dcells = total if dcells is None else dcells.add_(total)
    if needs[0] and dx.shape != x.shape:
        seen, dx = dx, torch.zeros_like(x)
        dx[_seen(geo)] = seen
    return dx, full_alpha(dalpha, geo) if needs[1] else None, dcells
