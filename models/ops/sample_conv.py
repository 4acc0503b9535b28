"""A convolution with a kernel of its own for every sample, assembled by the caller."""

import math

import torch.nn.functional as F

from .control import backend_forced, tell
from .geometry import SMALL_MAP, output_size


def sample_conv(x, kernels, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Convolve every sample with its own kernel.

    x: [B, C, *S] with one to three spatial dimensions; kernels: [B, O, C / groups, *K]; bias: [O] or None; the others
    as in `torch.nn.functional.conv2d`.  Returns [B, O, *S'].
    """
    tell("sample_conv", x, kernels, bias, stride, padding, dilation, groups)
    dims, window = x.ndim - 2, kernels.shape[3:]
    stride, padding, dilation = ([v] * dims if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    out = output_size(x.shape[2:], window, stride, padding, dilation)
    if backend_forced() == "naive":
        return grouped_sample_conv(x, kernels, bias, stride, padding, dilation, groups)
    if groups == 1 and math.prod(window) == 1 and not any(padding):
        patches = x[(..., *(slice(None, None, s) for s in stride))].flatten(2)
    elif groups == 1 and dims == 2 and math.prod(out) <= SMALL_MAP:
        patches = F.unfold(x, window, dilation, padding, stride)
    else:
        return grouped_sample_conv(x, kernels, bias, stride, padding, dilation, groups)
    return with_bias((kernels.flatten(2) @ patches).unflatten(2, out), bias)


def grouped_sample_conv(x, kernels, bias, stride, padding, dilation, groups):
    """`sample_conv` as one grouped convolution over the batch."""
    (batch, c_in), dims = x.shape[:2], x.ndim - 2
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    if batch == 0:
        # a convolution of no groups does not exist; one kernel tells the shape, and the (empty) gradients
        kernel = kernels.new_zeros(kernels.shape[1:]) + kernels.sum()
        return conv(x, kernel, bias, stride, padding, dilation, groups)
    x = x.reshape(1, batch * c_in, *x.shape[2:])
    y = conv(x, kernels.flatten(0, 1), None, stride, padding, dilation, batch * groups)
    return with_bias(y.reshape(batch, kernels.shape[1], *y.shape[2:]), bias)


def with_bias(y, bias):
    """y [B, O, *S] plus the bias, [O] or None, in the type of the convolution, which autocast chooses."""
    return y if bias is None else y + bias.reshape(1, -1, *[1] * (y.ndim - 2)).to(y.dtype)
