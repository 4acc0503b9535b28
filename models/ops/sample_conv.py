"""A convolution in which every sample has its own kernel, assembled by the caller."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .control import backend_forced, tell
from .convolution import conv, with_bias
from .geometry import SMALL_MAP, output_size
from .portable import portable_sample_conv


def sample_conv(
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve every sample with its own kernel.

    The arguments that are not listed are those of `torch.nn.functional.conv2d`.

    Args:
        x: [B, C, *S] with one to three spatial dimensions.
        kernels: [B, O, C / groups, *K].
        bias: [O] or None.

    Returns:
        [B, O, *S'].
    """
    tell("sample_conv", x, kernels, bias, stride, padding, dilation, groups)
    dims, window = x.ndim - 2, kernels.shape[3:]
    stride, padding, dilation = ([v] * dims if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    if backend_forced() == "portable":
        return portable_sample_conv(x, kernels, bias, stride, padding, dilation, groups)
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


def grouped_sample_conv(
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    """`sample_conv` as one grouped convolution over the batch."""
    batch, c_in = x.shape[:2]
    if batch == 0:
        # A convolution needs at least one group.  With one kernel of zeros, the output gets its shape and autograd its
        # (empty) gradients.
        kernel = kernels.new_zeros(kernels.shape[1:]) + kernels.sum()
        return conv(x, kernel, bias, stride, padding, dilation, groups)
    x = x.reshape(1, batch * c_in, *x.shape[2:])
    y = conv(x, kernels.flatten(0, 1), None, stride, padding, dilation, batch * groups)
    return with_bias(y.reshape(batch, kernels.shape[1], *y.shape[2:]), bias)
