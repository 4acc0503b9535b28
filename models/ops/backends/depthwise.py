"""The backend "depthwise" of the mixture convolution on the CPU, compiled from `depthwise.cpp`.

For convolutions with one input channel per group: every channel of a sample is convolved by itself.
"""

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Geometry, full_alpha, live_alpha
from ..layout import in_layout, is_channels_last
from ..scratch import output, scratch, widened
from .compiled import STORED, TYPES, compiles, library, run

CASTS_CELLS = True
SOURCE = "depthwise.cpp"


def available(geo: Geometry, dtype: torch.dtype, device: str) -> bool:
    """Whether the backend can evaluate a call."""
    return geo.c_in == 1 and len(geo.kernel) <= 2 and compiles(SOURCE, dtype, device, STORED)


class _Call(ctypes.Structure):
    """The shapes of a call, as `depthwise.cpp` reads them."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "channels", "multiplier")),
        *((name, ctypes.c_int64 * 2) for name in ("size", "out", "kernel", "stride", "dilation", "left")),
        *((name, ctypes.c_int64) for name in ("last", "n", "width", "tap_step", "channel_step", "threads")),
    ]


@functools.lru_cache(maxsize=1024)
def _call(geo: Geometry, size: tuple[int, ...], last: bool, threads: int) -> _Call:
    def pair(values, fill=1):
        return (ctypes.c_int64 * 2)(*[fill] * (2 - len(values)), *values)

    return _Call(
        samples=geo.batch,
        channels=geo.groups,
        multiplier=geo.c_out // geo.groups,
        size=pair(size),
        out=pair(geo.out),
        kernel=pair(geo.kernel),
        stride=pair(geo.stride),
        dilation=pair(geo.dilation),
        left=pair([left for left, _ in geo.pads], 0),
        last=last,
        n=geo.n,
        width=math.prod(geo.cell),
        tap_step=geo.c_out if geo.per_tap else 1,
        channel_step=1 if geo.per_tap else math.prod(geo.cell[1:]),
        threads=threads,
    )


def _run(name: str, geo: Geometry, x: Tensor, last: bool, *arrays: Tensor | None) -> int:
    """Call a compiled function; x: as the operator gets it."""
    call = _call(geo, x.shape[2:], last, torch.get_num_threads())
    return run(library(SOURCE, STORED[x.dtype]), name, call, *arrays)


def _last(x: Tensor, geo: Geometry) -> bool:
    """Whether to keep channels innermost in memory."""
    return is_channels_last(x) and geo.c_out == geo.groups


def _rows(alpha: Tensor, geo: Geometry) -> Tensor:
    """alpha [B, m, n] -> [B, T, Go, 1, n]: a row for every mixed cell."""
    return live_alpha(alpha, geo).to(TYPES[alpha.dtype]).contiguous()


def _kernels(slot: str, geo: Geometry, like: Tensor) -> Tensor:
    """Scratch memory for the kernels of all samples, [B, T, Go, *cell]."""
    return scratch(slot, (geo.batch, geo.taps, geo.g_out, *geo.cell), like)


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry) -> Tensor:
    """Convolve every channel of every sample with its own small kernel."""
    last = _last(x, geo)
    source = in_layout(widened("x", x, STORED[x.dtype]), last)
    y = output((geo.batch, geo.c_out, *geo.out), source, x.dtype, last)
    rows = _rows(alpha, geo)
    cells = cells.to(rows.dtype).contiguous()
    _run("forward", geo, x, last, source, rows, cells, _kernels("kernels", geo, rows), y)
    return y.to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`; the kernels are mixed again."""
    last = _last(x, geo)
    source, dy = (in_layout(tensor.to(TYPES[x.dtype]), last) for tensor in (x, dy))
    rows, cells = _rows(alpha, geo), cells.to(source.dtype).contiguous()
    dx = dalpha = dcells = sums = dkernels = None
    if needs[0]:
        cropped = any(side < 0 for sides in geo.pads for side in sides)
        dx = torch.zeros_like(source) if cropped else torch.empty_like(source)
    if needs[1] or needs[2]:
        dkernels = _kernels("kernel gradients", geo, source)
    if needs[1]:
        sums = scratch("sums", (_run("parts_of_alpha", geo, x, last), *rows.shape), source)
    if needs[2]:
        dcells = torch.empty_like(cells)
    kernels = _kernels("kernels", geo, source)
    _run("backward", geo, x, last, dy, source, rows, cells, kernels, dkernels, dx, sums, dcells)
    if needs[1]:
        dalpha = full_alpha(sums[0].clone(), geo)
    return dx, dalpha, dcells
