"""PyTorch's convolution in any number of dimensions, and its bias."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve x [B, C, *S] with one kernel [O, I, *k], in as many dimensions as S has.

    The arguments are those of `torch.nn.functional.conv2d`.
    """
    operator = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.ndim - 2]
    return operator(x, weight, bias, stride, padding, dilation, groups)


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Add the bias, [O] or None, to y [B, O, *S] in the data type of y, which autocast may have chosen."""
    return y if bias is None else y + bias.reshape(1, -1, *[1] * (y.ndim - 2)).to(y.dtype)
