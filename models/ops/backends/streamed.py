"""The backend "streamed" of the mixture convolution on the CPU, compiled from `streamed.cpp`.

For few samples: the warehouse is read once, and kernels are mixed, transposed and multiplied in the cache.
"""

import ctypes
import functools

import torch
from torch import Tensor

from ..geometry import Geometry
from ..layout import is_channels_last
from ..scratch import output, scratch, widened
from . import fused
from .compiled import TYPES, compiles, library, run
from .windows import Windows, offsets

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


class _Plan:
    """What follows from the shapes of a call: the part of x that is read, and what `streamed.cpp` reads."""

    def __init__(
        self, size: tuple[int, ...], geo: Geometry, alpha_steps: tuple[int, int], last: bool, threads: int
    ) -> None:
        self.windows = windows = Windows(size, geo)
        # x is used as it is, or else copied to rows; not a power of two apart, which would share the sets of a cache
        direct = last and not windows.padded and geo.c_in % SHARED_SETS != 0
        width = geo.c_in if direct else geo.c_in + SPACE
        with torch.inference_mode(False):
            mixture = offsets(geo.kernel, (1,) * len(size), geo.full_kernel, geo.first_tap) * (geo.g_out * geo.g_in)
            self.tables = (windows.position * width, windows.tap * width, windows.seen, mixture)
        self.rows = None if direct else (geo.batch, windows.rows, width)
        self.call = _Call(
            geo.batch, geo.g_out, geo.g_in, geo.taps, geo.n, *geo.cell[:2], geo.positions, *alpha_steps,
            windows.inputs, windows.rows, width, last, windows.padded, threads,
            *(table.data_ptr() for table in self.tables),
        )  # fmt: skip


_plan = functools.lru_cache(maxsize=1024)(_Plan)


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry) -> Tensor:
    """Mix some output channels of the kernels at a time, and multiply by them at once."""
    dtype, last = TYPES[x.dtype], is_channels_last(x)
    alpha, wide = alpha.to(dtype), cells.to(dtype).contiguous()
    if alpha.stride(2) != 1:
        alpha = alpha.contiguous()
    plan = _plan(x.shape[2:], geo, alpha.stride()[:2], last, torch.get_num_threads())
    source = widened("x", plan.windows.read(x), dtype)
    y = output((geo.batch, geo.c_out, *geo.out), source, x.dtype, last)
    rows = None if plan.rows is None else scratch("rows", plan.rows, source)
    run(library(SOURCE, dtype), "forward", plan.call, source, alpha, wide, rows, y)
    return y.to(x.dtype)


# every backward pass is bound by arithmetic, for which the tiles of "fused" are made
backward = fused.backward
