"""The backend "fused" of the mixture convolution on the CPU, compiled from `fused.cpp`.

A tile of every sample's kernel is mixed and multiplied while it is in the cache.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Geometry, full_alpha, live_alpha
from ..layout import in_layout, is_channels_last
from ..scratch import lent, output, scratch, widened
from .compiled import STORED, TYPES, compiles, library, run
from .windows import Windows

CASTS_CELLS = True
SOURCE = "fused.cpp"


def available(geo: Geometry, dtype: torch.dtype, device: str) -> bool:
    """Whether the backend can evaluate a call."""
    pointwise = geo.kernel == (1,) * len(geo.kernel)
    return (geo.per_tap or pointwise) and geo.foldable and compiles(SOURCE, dtype, device, STORED)


# of `Shape` in tiles.h
SHAPE = "samples g_out g_in taps n c_out c_in groups threads".split()
_NUMBERS = [*SHAPE, *"positions inputs rows x_last y_last".split()]
_TABLES = "position tap seen".split()


def shape(geo: Geometry, threads: int) -> dict[str, int]:
    """The fields of `Shape`."""
    values = (
        geo.batch * geo.groups,
        geo.g_out // geo.groups,
        geo.g_in,
        geo.taps,
        geo.n,
        *geo.cell[:2],
        geo.groups,
        threads,
    )
    return dict(zip(SHAPE, values, strict=True))


class _Call(ctypes.Structure):
    """The shapes of a call, as `fused.cpp` reads them."""

    _fields_ = [*((name, ctypes.c_int64) for name in _NUMBERS), *((name, ctypes.c_void_p) for name in _TABLES)]


class _Pass:
    """What the forward and the backward pass share: the arrays that the compiled functions read."""

    def __init__(self, x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry, y_last: bool) -> None:
        self.dtype = TYPES[x.dtype]
        self.stored, self.like = STORED[x.dtype], alpha.new_empty(0, dtype=self.dtype)
        self.windows, self.call = _call(x.shape[2:], geo, is_channels_last(x), y_last, torch.get_num_threads())
        # samples, blocks, live taps: [B, g * Go, Gi, T, n]
        self.units = live_alpha(alpha, geo).permute(0, 2, 3, 1, 4).to(self.dtype).contiguous()
        self.cells, self.geo = widened("cells", cells, self.dtype).contiguous(), geo
        self.library = library(SOURCE, self.stored)

    def x(self, x: Tensor) -> Tensor:
        """The part of x that is read."""
        return widened("x", self.windows.read(x), self.stored)

    def map(self, slot: str, blocks: int, channels: int, positions: int) -> Tensor:
        """Scratch memory for x or y as a map."""
        lanes = self.library.lanes()
        return scratch(slot, (self.geo.batch, blocks, positions, -(-channels // lanes) * lanes), self.like)

    def x_map(self, slot: str) -> Tensor:
        """Scratch memory for x as a map."""
        return self.map(slot, self.geo.groups * self.geo.g_in, self.geo.cell[1], self.windows.rows)

    def y_map(self) -> Tensor:
        """Scratch memory for y as a map."""
        return self.map("y map", self.geo.g_out, self.geo.cell[0], self.geo.positions)

    def run(self, name: str, *arrays: Tensor | None) -> int:
        """Call a compiled function."""
        return run(self.library, name, self.call, *arrays)


@functools.lru_cache(maxsize=1024)
def _call(size: tuple[int, ...], geo: Geometry, x_last: bool, y_last: bool, threads: int) -> tuple[Windows, _Call]:
    windows = Windows(size, geo)
    call = _Call(
        **shape(geo, threads),
        positions=geo.positions,
        inputs=windows.inputs,
        rows=windows.rows,
        x_last=x_last,
        y_last=y_last,
        position=windows.position.data_ptr(),
        tap=windows.tap.data_ptr(),
        seen=windows.seen.data_ptr() if windows.padded else None,
    )
    return windows, call


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry) -> Tensor:
    """Mix tiles of kernels and multiply by them at once."""
    last = is_channels_last(x)
    own = _Pass(x, alpha, cells, geo, last)
    source = own.x(x)
    y = output((geo.batch, geo.c_out, *geo.out), source, x.dtype, last)
    own.run("forward", source, own.units, own.cells, own.x_map("x map"), own.y_map(), y)
    return y.to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`; the kernels are mixed again."""
    last = is_channels_last(dy)
    own = _Pass(x, alpha, cells, geo, last)
    source, y_map = own.x(x), own.y_map()
    own.run("gradient_rows", in_layout(widened("dy", dy, own.stored), last), y_map)
    dx = dalpha = dcells = None
    if needs[0]:
        dx = torch.empty_like(source)
        own.run("input_gradient", y_map, own.units, own.cells, own.x_map("input gradients"), dx)
        dx = own.windows.unread(dx.to(x.dtype), x)
    if needs[1] or needs[2]:
        parts = own.run("parts_of_alpha")
        sums = scratch("sums", (parts, *own.units.shape), own.like) if needs[1] else None
        dcells = lent(cells.shape, own.like) if needs[2] else None
        own.run("kernel_gradients", y_map, source, own.units, own.cells, own.x_map("x map"), sums, dcells)
        if needs[1]:
            dalpha = full_alpha(sums.sum(0).permute(0, 3, 1, 2, 4), geo).to(alpha.dtype)
        if needs[2]:
            dcells = dcells.to(cells.dtype)
    return dx, dalpha, dcells
