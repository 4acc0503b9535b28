"""The backend "winograd" of the mixture convolution on the CPU, compiled from `winograd.cpp`.

For 3 x 3 kernels with stride 1: Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", CVPR 2016) takes 16 products where the definition takes 36. Rounding errors are of the
same size; an input that is not finite reaches all outputs of the 2 x 2 squares whose windows see it.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Geometry, full_alpha, live_alpha
from ..layout import in_layout, is_channels_last
from ..scratch import lent, output, scratch, widened
from . import fused
from .compiled import STORED, TYPES, compiles, library, run
from .windows import offsets

CASTS_CELLS = True
SOURCE = "winograd.cpp"


def available(geo: Geometry, dtype: torch.dtype, device: str) -> bool:
    """Whether the backend can evaluate a call."""
    return (
        geo.kernel == geo.full_kernel == (3, 3)
        and geo.stride == geo.dilation == (1, 1)
        and all(0 <= side <= 2 for sides in geo.pads for side in sides)
        and fused.available(geo, dtype, device)
        and compiles(SOURCE, dtype, device, STORED)
    )


_NUMBERS = [*fused.SHAPE, *"transposed squares inputs rows width outputs to_rows to_width last to_last".split()]
_TABLES = "corner seen to_corner kept".split()


def squares_of(size: Sequence[int]) -> list[int]:
    """How many squares of 2 positions cover each side of a map."""
    return [-(-length // 2) for length in size]


class _Call(ctypes.Structure):
    """The shapes of a call, as `winograd.cpp` reads them."""

    _fields_ = [*((name, ctypes.c_int64) for name in _NUMBERS), *((name, ctypes.c_void_p) for name in _TABLES)]


class _Plan:
    """What follows from the shapes of a call: tables of positions, and what `winograd.cpp` reads."""

    def __init__(
        self, geo: Geometry, size: tuple[int, ...], last: bool, to_last: bool, transposed: bool, threads: int
    ) -> None:
        # the convolution of dy has the padding that makes its output as large as x
        sizes = (geo.out, size) if transposed else (size, geo.out)
        before = [2 - left if transposed else left for left, _ in geo.pads]
        (height, width), out = sizes
        squares = squares_of(out)
        padded, kept = [2 * count + 2 for count in squares], [2 * count for count in squares]
        ones, twos = (1, 1), (2, 2)
        with torch.inference_mode(False):
            self.tables = (
                offsets(squares, twos, padded),
                offsets((height, width), ones, padded, before),
                offsets(squares, twos, kept),
                offsets(out, ones, kept),
            )
        self.out, self.rows, self.to_rows = tuple(out), padded[0] * padded[1], kept[0] * kept[1]
        corner, seen, to_corner, kept_positions = (table.data_ptr() for table in self.tables)
        self.call = _Call(
            **fused.shape(geo, threads),
            transposed=transposed,
            squares=squares[0] * squares[1],
            inputs=height * width,
            rows=self.rows,
            width=padded[1],
            outputs=out[0] * out[1],
            to_rows=self.to_rows,
            to_width=kept[1],
            last=last,
            to_last=to_last,
            corner=corner,
            seen=seen,
            to_corner=to_corner,
            # a result without padding is copied faster without a table
            kept=None if self.out == tuple(kept) else kept_positions,
        )


_plan = functools.lru_cache(maxsize=1024)(_Plan)


class _Pass:
    """What the forward and the backward pass share: the arrays that the compiled functions read.

    Args:
        size: of the images x.
    """

    def __init__(self, alpha: Tensor, cells: Tensor, geo: Geometry, size: torch.Size, dtype: torch.dtype) -> None:
        self.geo, self.size, self.stored = geo, tuple(size), STORED[dtype]
        self.library = library(SOURCE, self.stored)
        # samples, blocks, taps: [B, g * Go, Gi, 9, n]
        self.units = live_alpha(alpha, geo).permute(0, 2, 3, 1, 4).to(TYPES[dtype]).contiguous()
        self.cells = widened("cells", cells, TYPES[dtype]).contiguous()

    def plan(self, last: bool, to_last: bool, transposed: bool = False) -> _Plan:
        """That of a convolution, by whether channels of its source and of its result are innermost in memory."""
        return _plan(self.geo, self.size, last, to_last, transposed, torch.get_num_threads())

    def maps(self, plan: _Plan, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """Scratch memory for the source and the result of a convolution as maps."""
        geo, lanes = self.geo, self.library.lanes()
        x, y = (geo.groups * geo.g_in, geo.cell[1]), (geo.g_out, geo.cell[0])
        sides = zip(("x map", "y map"), (y, x) if transposed else (x, y), (plan.rows, plan.to_rows), strict=True)
        return tuple(
            scratch(slot, (geo.batch, blocks, rows, -(-channels // lanes) * lanes), self.units)
            for slot, (blocks, channels), rows in sides
        )

    def convolve(self, source: Tensor, last: bool, transposed: bool = False) -> Tensor:
        """x convolved with the mixed kernels, or the gradient of the output with their transposes.

        Args:
            last: whether channels of the result are innermost in memory.
        """
        plan = self.plan(is_channels_last(source), last, transposed)
        channels = self.geo.groups * self.geo.c_in if transposed else self.geo.c_out
        stored = self.as_stored("x", source)
        result = output((self.geo.batch, channels, *plan.out), stored, source.dtype, last)
        self.run("convolve", plan, stored, self.units, self.cells, *self.maps(plan, transposed), result)
        return result.to(source.dtype)

    def as_stored(self, slot: str, source: Tensor) -> Tensor:
        """x, or the gradient of the output, as the compiled functions read it."""
        return widened(slot, in_layout(source, is_channels_last(source)), self.stored)

    def run(self, name: str, plan: _Plan, *arrays: Tensor | None) -> int:
        """Call a compiled function."""
        return run(self.library, name, plan.call, *arrays)


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry) -> Tensor:
    """Mix tiles of kernels, and multiply by their spectra at once."""
    return _Pass(alpha, cells, geo, x.shape[2:], x.dtype).convolve(x, is_channels_last(x))


def backward(
    dy: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`; the kernels are mixed again."""
    own = _Pass(alpha, cells, geo, x.shape[2:], x.dtype)
    dx = dalpha = dcells = None
    if needs[0]:
        dx = own.convolve(dy, is_channels_last(x), transposed=True)
    if needs[1] or needs[2]:
        plan = own.plan(is_channels_last(x), is_channels_last(dy))
        sums = scratch("sums", (own.run("parts_of_alpha", plan), *own.units.shape), own.units) if needs[1] else None
        dcells = lent(cells.shape, own.units) if needs[2] else None
        sides = own.as_stored("x", x), own.as_stored("dy", dy)
        own.run("kernel_gradients", plan, *sides, own.units, own.cells, *own.maps(plan), sums, dcells)
        if needs[1]:
            dalpha = full_alpha(sums.sum(0).permute(0, 3, 1, 2, 4), geo).to(alpha.dtype)
        if needs[2]:
            dcells = dcells.to(cells.dtype)
    return dx, dalpha, dcells
