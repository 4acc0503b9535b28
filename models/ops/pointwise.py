"""The order "pointwise" of the mixture convolution on the CPU, compiled from `pointwise.cpp`.

For kernels of one tap and maps that are large beside them: kernels are mixed once and stay in the cache.
"""

import ctypes
import functools
import math

import torch

from .compiled import TYPES, address, compiles, library
from .geometry import full_alpha, live_alpha
from .scratch import scratch

SOURCE = "pointwise.cpp"


def pointwise_available(geo, dtype, device):
    """Whether the order can evaluate a call."""
    return (
        math.prod(geo.kernel) == 1
        and geo.foldable
        and all(left == 0 and right <= 0 for left, right in geo.pads)
        and compiles(SOURCE, dtype, device)
    )


class _Call(ctypes.Structure):
    """The shapes of a call, as `pointwise.cpp` reads them."""

    _fields_ = [
        (name, ctypes.c_int64) for name in "samples g_out g_in n c_out c_in positions threads".split()
    ]


@functools.lru_cache(maxsize=1024)
def _call(geo, threads):
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


def _run(name, geo, dtype, *arrays):
    call = _call(geo, torch.get_num_threads())
    return getattr(library(SOURCE, dtype), name)(ctypes.byref(call), *map(address, arrays))


def _seen(geo):
    """Index of what is seen of x."""
    return (..., *(slice(0, (out - 1) * s + 1, s) for out, s in zip(geo.out, geo.stride, strict=True)))


def _inputs(x, alpha, cells, geo):
    """x [B, C, P], alpha [B, Go, Gi, n] and cells as the compiled functions read them, and memory for kernels."""
    dtype = TYPES[x.dtype]
    x, cells = x[_seen(geo)].to(dtype).contiguous(), cells.to(dtype).contiguous()
    rows = live_alpha(alpha, geo).to(dtype).contiguous()
    return x, rows, cells, scratch("kernels", (*rows.shape[:-1], *geo.cell), x)


def pointwise_forward(x, alpha, cells, geo):
    """Mix the kernels of all samples, then multiply blocks of positions by them."""
    source, rows, wide, kernels = _inputs(x, alpha, cells, geo)
    y = source.new_empty(geo.batch, geo.c_out, *geo.out)
    _run("forward", geo, source.dtype, source, rows, wide, kernels, y)
    return y.to(x.dtype)


def pointwise_backward(dy, x, alpha, cells, geo, needs):
    """Gradients of `pointwise_forward`; the kernels are mixed again."""
    source, rows, wide, kernels = _inputs(x, alpha, cells, geo)
    dy = dy.to(source.dtype).contiguous()
    dkernels = scratch("kernel gradients", kernels.shape, kernels) if needs[1] or needs[2] else None
    dx = torch.empty_like(source) if needs[0] else None
    sums = dalpha = None
    if needs[1]:
        sums = scratch("sums", (_run("parts_of_alpha", geo, source.dtype), *rows.shape), source)
    dcells = torch.empty_like(wide) if needs[2] else None
    _run("backward", geo, source.dtype, dy, source, rows, wide, kernels, dkernels, dx, sums, dcells)
    if needs[0] and dx.shape != x.shape:
        seen, dx = dx, torch.zeros_like(x)
        dx[_seen(geo)] = seen
    if needs[1]:
        dalpha = full_alpha(sums[0].clone(), geo)
    return dx, dalpha, dcells
