"""The operators in plain operations of PyTorch, for exporters and for runtimes without this project.

Batch and positions may be symbolic: no operation depends on their values. A grouped convolution over the batch would
need a constant number of groups, so kernels are multiplied with patches instead. Letters as in `geometry.py`, g groups;
I = C input channels of a group.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import conv, with_bias
from .geometry import output_size

# up to this many cells, static convolutions with every cell are faster than depth-wise ones with assembled kernels
MOST_OUTPUTS = 8
# up to this many taps, a depth-wise convolution is a sum of slices; exporters take minutes for programs of many slices
MOST_SLICES = 9


def portable_mixture_conv(
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`mixture_conv`; the arguments and the result are the same."""
    (n, co, ci, *window), inputs = cells.shape, x.shape[1] // groups
    taps, g_in = math.prod(kernel_size) // math.prod(window), inputs // ci
    g_out = alpha.shape[1] // (taps * g_in)
    if inputs == 1 and alpha.shape[1] == 1 and n <= MOST_OUTPUTS:
        return with_bias(_mixed_outputs(x, alpha, cells, stride, padding, dilation, groups), bias)
    kernels = (alpha @ cells.flatten(1)).reshape(-1, taps, g_out, g_in, co, ci, math.prod(window))
    if taps > 1 and math.prod(window) == 1:
        # to [B, Go, co, T, Gi, ci]: runs of ci numbers stay together, which makes this copy of all kernels fast
        kernels = kernels.squeeze(6).permute(0, 2, 4, 1, 3, 5).reshape(-1, g_out * co, taps, inputs)
        return with_bias(_product(x, kernels, kernel_size, stride, padding, dilation, groups, taps_first=True), bias)
    # to [B, Go, co, Gi, ci, T, k]; axes of one entry need no reordering
    kernels = kernels.permute(0, 2, 4, 3, 5, 1, 6) if taps > 1 or g_in > 1 else kernels
    kernels = kernels.reshape(-1, g_out * co, inputs, math.prod(kernel_size))
    return with_bias(_product(x, kernels, kernel_size, stride, padding, dilation, groups), bias)


def portable_sample_conv(
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`sample_conv`; the arguments and the result are the same."""
    window = kernels.shape[3:]
    return with_bias(_product(x, kernels.flatten(3), window, stride, padding, dilation, groups), bias)


def portable_pool_to(x: Tensor, size: int | Sequence[int]) -> Tensor:
    """Adaptive average pooling of x [B, C, *S] to maps of a size, as products with matrices [S, size]."""
    dims = x.ndim - 2
    for dim, bins in enumerate([size] * dims if isinstance(size, int) else size, start=2):
        positions = torch.arange(x.shape[dim], device=x.device)
        bin_ = torch.arange(bins, device=x.device).unsqueeze(1)
        # PyTorch's bins overlap where the size does not divide the number of positions
        first = torch.div(bin_ * x.shape[dim], bins, rounding_mode="floor")
        end = torch.div((bin_ + 1) * x.shape[dim] + bins - 1, bins, rounding_mode="floor")
        inside = ((positions >= first) & (positions < end)).to(x.dtype)
        average = inside / (end - first).to(x.dtype)
        x = (x.movedim(dim, -1) @ average.t()).movedim(-1, dim)
    return x


def _mixed_outputs(x, alpha, cells, stride, padding, dilation, groups):
    """Convolve with every cell, of a whole kernel each, and add up the outputs [B, O, *S'] by alpha [B, 1, n]."""
    weights = alpha.reshape(-1, cells.shape[0], *[1] * (x.ndim - 1)).unbind(1)
    outputs = [conv(x, cell, None, stride, padding, dilation, groups) for cell in cells]
    return sum(weight * output for weight, output in zip(weights, outputs, strict=True))


def _product(x, kernels, window, stride, padding, dilation, groups, taps_first=False):
    """Convolve x [B, C, *S] with kernels [B, O, I, T], or [B, O, T, I] with `taps_first`, without a bias."""
    out = output_size(x.shape[2:], window, stride, padding, dilation)
    c_out, taps = kernels.shape[1], math.prod(window)
    inputs = x.shape[1] // groups
    if inputs == 1 and c_out == groups and taps <= MOST_SLICES:
        factors = kernels.reshape(-1, c_out, taps, *[1] * len(out)).unbind(2)
        slices = _slices(x, window, stride, padding, dilation, out)
        return sum(factor * part for factor, part in zip(factors, slices, strict=True))
    rows, seen = [groups, c_out // groups, taps * inputs], [groups, taps * inputs, math.prod(out)]
    if groups == 1:
        rows, seen = rows[1:], seen[1:]
    patches = _patches(x, window, stride, padding, dilation, out)
    if taps_first:
        patches = patches.reshape(-1, groups, inputs, taps, math.prod(out)).transpose(2, 3)
    patches = patches.reshape(-1, *seen)
    return (kernels.reshape(-1, *rows) @ patches).reshape(-1, c_out, *out)


def _patches(x, window, stride, padding, dilation, out):
    """What all taps see, [B, C * T, *S']: a convolution that copies, which runtimes do faster than slicing."""
    taps, channels = math.prod(window), x.shape[1]
    if taps == 1:
        return next(_slices(x, window, stride, padding, dilation, out))
    copy = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(taps, 1, *window)
    return conv(x, copy.repeat(channels, *[1] * (x.ndim - 1)), None, stride, padding, dilation, channels)


def _slices(x, window, stride, padding, dilation, out) -> Iterator[Tensor]:
    """What every tap sees at all positions: [B, C, *S'] for each of T taps."""
    if any(padding):
        x = F.pad(x, [side for p in reversed(padding) for side in (p, p)])
    for tap in itertools.product(*map(range, window)):
        part = x
        for dim, (t, s, d, o) in enumerate(zip(tap, stride, dilation, out, strict=True), start=2):
            if window[dim - 2] > 1 or s > 1:
                part = part.narrow(dim, t * d, (o - 1) * s + 1)
            if s > 1:
                part = part[(slice(None),) * dim + (slice(None, None, s),)]
        yield part
