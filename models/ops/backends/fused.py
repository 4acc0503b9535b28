"""The backend "fused" of the mixture convolution on the CPU, compiled from `fused.cpp`.

A tile of every sample's kernel is mixed and multiplied while it is in the cache.
"""

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Geometry, empty_like_layout, full_alpha, live_alpha
from ..scratch import scratch
from .compiled import TYPES, compiles, library, run

CASTS_CELLS = True
SOURCE = "fused.cpp"


def available(geo: Geometry, dtype: torch.dtype, device: str) -> bool:
    """Whether the backend can evaluate a call."""
    pointwise = geo.kernel == (1,) * len(geo.kernel)
    return (geo.per_tap or pointwise) and geo.foldable and compiles(SOURCE, dtype, device)


# --- a call -----------------------------------------------------------------------------------------------------------

_NUMBERS = "samples g_out g_in taps n c_out c_in positions groups x_image y_image y_step c_out_pad c_in_pad threads"


class _Call(ctypes.Structure):
    """The shapes of a call, as `fused.cpp` reads them."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS.split()),
        ("position", ctypes.c_void_p),
        ("tap", ctypes.c_void_p),
    ]


class _Layout:
    """Arrays of one call: x [B, *S, g * Gi, ci] and y [B, P, g * Go, co], with channels padded to whole vectors."""

    def __init__(
        self, size: tuple[int, ...], geo: Geometry, dtype: torch.dtype, functions: ctypes.CDLL, threads: int
    ) -> None:
        self.geo, self.functions = geo, functions
        with torch.inference_mode(False):
            self.like = torch.empty(0, dtype=dtype)
        lanes = self.functions.lanes()
        co, ci = (-(-c // lanes) * lanes for c in geo.cell[:2])
        # sizes of x with the padding that is read, the part of the padded x that is copied from x, and that part of x
        sizes, strides, self.inside, self.seen = [], [], (), ()
        for length, k, s, out, (left, right) in zip(size, geo.kernel, geo.stride, geo.out, geo.pads, strict=True):
            start, stop = max(-left, 0), length - max(-right, 0)
            if k == 1 and left <= 0 and right <= 0:
                # positions that the stride skips are not copied
                sizes.append(out), strides.append(1)
                self.inside += (slice(0, out),)
                self.seen += (slice(start, stop, s),)
            else:
                sizes.append(length + left + right), strides.append(s)
                self.inside += (slice(start + left, stop + left),)
                self.seen += (slice(start, stop),)
        blocks = geo.groups * geo.g_in
        self.x_shape = (geo.batch, *sizes, blocks, ci)
        self.y_shape = (geo.batch, geo.positions, geo.g_out, co)
        self.all_seen = all(
            part in (slice(0, length), slice(0, length, 1)) for part, length in zip(self.seen, size, strict=True)
        )
        position, tap = self.tables = _tables(
            tuple(sizes), geo.out, tuple(strides), geo.kernel, geo.dilation, blocks * ci
        )
        self.call = _Call(
            samples=geo.batch * geo.groups,
            g_out=geo.g_out // geo.groups,
            g_in=geo.g_in,
            taps=geo.taps,
            n=geo.n,
            c_out=geo.cell[0],
            c_in=geo.cell[1],
            positions=geo.positions,
            groups=geo.groups,
            x_image=math.prod(self.x_shape[1:]),
            y_image=math.prod(self.y_shape[1:]),
            y_step=geo.g_out * co,
            c_out_pad=co,
            c_in_pad=ci,
            threads=threads,
            position=position.data_ptr(),
            tap=tap.data_ptr(),
        )

    def is_direct(self, rows: Tensor, shape: Sequence[int]) -> bool:
        """Whether the compiled functions can use an array of the model without a copy."""
        return rows.shape == shape and rows.is_contiguous() and rows.dtype == self.like.dtype

    def units(self, alpha: Tensor) -> Tensor:
        """alpha [B, m, n] -> [B, g * Go, Gi, T, n]: samples, blocks, live taps."""
        return live_alpha(alpha, self.geo).permute(0, 2, 3, 1, 4).to(self.like.dtype).contiguous()

    def cells(self, cells: Tensor) -> Tensor:
        """The cells as the compiled functions read them."""
        if self.is_direct(cells, cells.shape):
            return cells
        return scratch("cells", cells.shape, self.like).copy_(cells)

    def _split(self, x: Tensor) -> Tensor:
        """A view of x [B, g * Gi * ci, *S] as [B, *S, g * Gi, ci]."""
        return x.unflatten(1, (-1, self.geo.cell[1])).movedim((1, 2), (-2, -1))

    def _from_x(self, rows: Tensor) -> Tensor:
        """The part of the padded rows [B, *S, g * Gi, ci'] that is copied from x."""
        return rows[(slice(None), *self.inside, slice(None), slice(self.geo.cell[1]))]

    def x_rows(self, x: Tensor) -> Tensor:
        """x as the compiled functions read it."""
        rows = self._split(x)[(slice(None), *self.seen)]
        if self.is_direct(rows, self.x_shape):
            return rows
        padded = scratch("padded", self.x_shape, self.like)
        if rows.shape != self.x_shape:
            padded.zero_()
        self._from_x(padded).copy_(rows)
        return padded

    def dx(self, rows: Tensor, x: Tensor) -> Tensor:
        """The gradient of x, from that of its rows."""
        dx = torch.empty_like(x) if self.all_seen else torch.zeros_like(x)
        self._split(dx)[(slice(None), *self.seen)] = self._from_x(rows)
        return dx

    def y_view(self, y: Tensor) -> Tensor:
        """y [B, O, *S'] as [B, P, g * Go, co]; a view where memory allows it."""
        return y.flatten(2).unflatten(1, (self.geo.g_out, -1)).permute(0, 3, 1, 2)

    def y_rows(self, dy: Tensor) -> Tensor:
        """The gradient of y as the compiled functions read it."""
        rows = self.y_view(dy)
        if self.is_direct(rows, self.y_shape):
            return rows
        padded = scratch("rows", self.y_shape, self.like)
        padded[..., : self.geo.cell[0]] = rows
        return padded

    def run(self, name: str, *arrays: Tensor | None) -> int:
        """Call a compiled function."""
        return run(self.functions, name, self.call, *arrays)


@functools.lru_cache(maxsize=1024)
def _tables(sizes, out, stride, kernel, dilation, step):
    """Two tables of offsets: of every output position's window in an image, and of every tap in its window."""

    def offsets(counts, steps):
        total, line = torch.zeros(1, dtype=torch.int64), step
        lines = []
        for size in reversed(sizes):
            lines.append(line)
            line *= size
        for count, by, line in zip(counts, steps, reversed(lines), strict=True):
            total = (total[:, None] + torch.arange(count) * by * line).flatten()
        return total.contiguous()

    with torch.inference_mode(False):
        return offsets(out, stride), offsets(kernel, dilation)


_layout_of = functools.lru_cache(maxsize=1024)(_Layout)


def _layout(x: Tensor, geo: Geometry) -> _Layout:
    dtype = TYPES[x.dtype]
    return _layout_of(x.shape[2:], geo, dtype, library(SOURCE, dtype), torch.get_num_threads())


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry) -> Tensor:
    """Mix tiles of kernels and multiply by them at once."""
    layout, y = _layout(x, geo), empty_like_layout(x, geo.c_out, geo.out)
    target = layout.y_view(y)
    direct = layout.is_direct(target, layout.y_shape)
    rows = target if direct else scratch("rows", layout.y_shape, layout.like)
    layout.run("forward", layout.x_rows(x), layout.units(alpha), layout.cells(cells), rows)
    if not direct:
        target.copy_(rows[..., : geo.cell[0]])
    return y


def backward(
    dy: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`; the kernels are mixed again."""
    layout = _layout(x, geo)
    units, wide, dy = layout.units(alpha), layout.cells(cells), layout.y_rows(dy)
    dx = dalpha = dcells = None
    if needs[0]:
        rows = scratch("input gradients", layout.x_shape, layout.like).zero_()
        layout.run("input_gradient", dy, units, wide, rows)
        dx = layout.dx(rows, x)
    if needs[1] or needs[2]:
        parts = layout.run("parts_of_alpha")
        sums = scratch("sums", (parts, *units.shape), layout.like) if needs[1] else None
        dcells = layout.like.new_empty(cells.shape) if needs[2] else None
        layout.run("kernel_gradients", dy, layout.x_rows(x), units, wide, sums, dcells)
        if needs[1]:
            dalpha = full_alpha(sums.sum(0).permute(0, 3, 1, 2, 4), geo).to(alpha.dtype)
        if needs[2]:
            dcells = dcells.to(cells.dtype)
    return dx, dalpha, dcells
