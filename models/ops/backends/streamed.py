"""The backend "streamed" of the mixture convolution on the CPU, compiled from `streamed.cpp`.

For few samples: the warehouse is read once, and kernels are mixed, transposed and multiplied in the cache.
"""

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Geometry, is_channels_last
from ..scratch import output, scratch, widened
from . import fused
from .compiled import TYPES, compiles, library, run

CASTS_CELLS = True
SOURCE = "streamed.cpp"
# rows of x that are a multiple of so many numbers apart share the sets of a cache, and the space that keeps them apart
SHARED_SETS, SPACE = 512, 16


def available(geo: Geometry, dtype: torch.dtype, device: str) -> bool:
    """Whether the backend can evaluate a call."""
    return geo.groups == 1 and fused.available(geo, dtype, device) and compiles(SOURCE, dtype, device)


_NUMBERS = "samples g_out g_in taps n c_out c_in positions alpha_sample alpha_row inputs rows width last padded threads"
_TABLES = "position tap seen mixture"


class _Call(ctypes.Structure):
    """The shapes of a call, as `streamed.cpp` reads them."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS.split()),
        *((name, ctypes.c_void_p) for name in _TABLES.split()),
    ]


def _offsets(
    counts: Sequence[int], steps: Sequence[int], sizes: Sequence[int], width: int, first: Sequence[int] | None = None
) -> Tensor:
    """Offsets of a grid of positions in a map whose positions have `width` numbers each.

    Args:
        counts: size of the grid.
        steps: between two neighbours of the grid, for every dimension.
        sizes: of the map.
        width: numbers of a position.
        first: the first position of the grid; all zeros by default.
    """
    total = torch.zeros(1, dtype=torch.int64)
    lines = [width * math.prod(sizes[d + 1 :]) for d in range(len(sizes))]
    for count, step, line, start in zip(counts, steps, lines, first or [0] * len(lines), strict=True):
        total = (total[:, None] + (start + torch.arange(count) * step) * line).flatten()
    return total.contiguous()


class _Plan:
    """What follows from the shapes of a call: the part of x that is read, and what `streamed.cpp` reads."""

    def __init__(
        self, size: tuple[int, ...], geo: Geometry, alpha_steps: tuple[int, int], last: bool, threads: int
    ) -> None:
        ones = (1,) * len(size)
        # the positions of x that are read, the sizes of x with its padding, strides in it, and the padding before x
        self.seen, sizes, steps, before = (), (), (), ()
        for length, k, s, out, (left, right) in zip(size, geo.kernel, geo.stride, geo.out, geo.pads, strict=True):
            # positions that the stride skips are not copied
            step = s if k == 1 and left <= 0 and right <= 0 else 1
            self.seen += (slice(max(-left, 0), length - max(-right, 0), step),)
            sizes += (out if step == s and k == 1 else length + left + right,)
            steps, before = (*steps, s // step), (*before, max(left, 0))
        read = tuple(len(range(*seen.indices(length))) for seen, length in zip(self.seen, size, strict=True))
        self.all_seen, padded = read == size, sizes != read
        # x is used as it is, or else copied to rows; not a power of two apart, which would share the sets of a cache
        direct = last and not padded and geo.c_in % SHARED_SETS != 0
        width = geo.c_in if direct else geo.c_in + SPACE
        with torch.inference_mode(False):
            self.tables = (
                _offsets(geo.out, steps, sizes, width),
                _offsets(geo.kernel, geo.dilation, sizes, width),
                _offsets(read, ones, sizes, width, before),
                _offsets(geo.kernel, ones, geo.full_kernel, geo.g_out * geo.g_in, geo.first_tap),
            )
        self.rows = None if direct else (geo.batch, math.prod(sizes), width)
        self.call = _Call(
            geo.batch, geo.g_out, geo.g_in, geo.taps, geo.n, *geo.cell[:2], geo.positions, *alpha_steps,
            math.prod(read), math.prod(sizes), width, last, padded, threads,
            *(table.data_ptr() for table in self.tables),
        )  # fmt: skip


_plan = functools.lru_cache(maxsize=1024)(_Plan)


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry) -> Tensor:
    """Mix some output channels of the kernels at a time, and multiply by them at once."""
    dtype, last = TYPES[x.dtype], is_channels_last(x)
    source, alpha, wide = widened("x", x, dtype), alpha.to(dtype), cells.to(dtype).contiguous()
    if alpha.stride(2) != 1:
        alpha = alpha.contiguous()
    plan = _plan(x.shape[2:], geo, alpha.stride()[:2], last, torch.get_num_threads())
    if not plan.all_seen:
        source = source[(..., *plan.seen)]
    source = source.movedim(1, -1).contiguous() if last else source.contiguous()
    y = output((geo.batch, geo.c_out, *geo.out), source, x.dtype, last)
    rows = None if plan.rows is None else scratch("rows", plan.rows, source)
    run(library(SOURCE, dtype), "forward", plan.call, source, alpha, wide, rows, y)
    return y.to(x.dtype)


# every backward pass is bound by arithmetic, for which the tiles of "fused" are made
backward = fused.backward
