"""What the layers of all methods share: the arguments of a convolution, and a linear layer as one over tokens.

A method is a class with `_setup(device, dtype, bias, **settings)`, which makes its parameters, and `convolve(x)` for
x [B, C, *S].  Beside one of the classes below it becomes a drop-in replacement: `class DYConv2d(_DYConv, Conv2d)`.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn


def _tuple(value, dims, what):
    value = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(value) != dims:
        raise ValueError(f"{what} {value} needs {dims} numbers")
    return value


def check_choice(what, values, known):
    """Raises ValueError for a value that is not among the known ones."""
    for value in values:
        if value not in known:
            raise ValueError(f"unknown {what} '{value}', choose from {', '.join(known)}")


def check_reduction(reduction):
    """Raises ValueError for a reduction, the width of a hidden layer over that of its input, outside of (0, 1]."""
    if not 0 < reduction <= 1:
        raise ValueError(f"reduction {reduction} is not in (0, 1]")


def hidden_width(channels, reduction, least=1):
    """Width of a hidden layer: `reduction` of its input's, rounded down, and at least `least`.

    Raises ValueError for a reduction outside of (0, 1].
    """
    check_reduction(reduction)
    return max(int(channels * reduction), least)


def pool(x, dim):
    """Mean over positions.  The gradient of a sum is a view where that of a mean is a tensor as large as x."""
    if x.dtype == torch.float16:
        # the sum could overflow
        return x.mean(dim)
    return x.sum(dim) / x.shape[dim]


def global_pool(x):
    """[B, C] of x [B, C, *S]."""
    return pool(x.flatten(2), dim=2)


def pool_to(x, size):
    """x [B, C, *S] averaged to maps of a size, a number or one for every dimension."""
    operator = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[x.ndim - 2]
    return operator(x, size)


def conv(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """The convolution of x [B, C, *S] with one static kernel, in as many dimensions as S has."""
    operator = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.ndim - 2]
    return operator(x, weight, bias, stride, padding, dilation, groups)


def scaled(x, factors):
    """x [B, C, *S] times the factors of its channels, B * C of them."""
    return x * factors.reshape(*x.shape[:2], *[1] * (x.ndim - 2))


class AttentionNorm(nn.BatchNorm1d):
    """BatchNorm over pooled inputs [B, C] or [B, C, N], with its running statistics for a batch of one sample in train
    mode.

    The statistics of a single sample are degenerate; the running ones are then used, with one warning, and stay.
    """

    def degenerate(self, x):
        return x.shape[0] == 1

    def forward(self, x):
        if not self.training or not self.degenerate(x):
            return super().forward(x)
        if not torch.compiler.is_compiling():
            warnings.warn(
                "a batch of one sample in train mode: the attention's BatchNorm uses its running statistics",
                stacklevel=2,
            )
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class MapNorm(AttentionNorm):
    """BatchNorm over flattened maps [B, C, N]; a single sample has statistics where its map has several positions."""

    def degenerate(self, x):
        return x.numel() == x.shape[1]


def reset_linear(module):
    """Kaiming-normal by fan-out for the linear layers below a module, zero for their biases."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)


class Shared(nn.Module):
    """What layers of a network share, at its root: it counts by itself (see `counting.py`)."""


class DynamicLayer(nn.Module):
    """A convolution or linear layer of any method."""

    # by which `anatomy` knows it
    is_dynamic = True

    def _apply(self, fn, recurse=True):
        # sets of kernels are no images: `.to(memory_format=torch.channels_last)` of a model must pass them by
        return super()._apply(lambda t: fn(t.flatten(1)).view(t.shape) if t.ndim > 3 else fn(t), recurse)

    def _make_kernels(self, bias, *sets, **kwargs):
        """`weight` [*sets, O, I, *k], Kaiming-normal by fan-out, and `bias`: [O] of zeros, or None.

        sets: K where the layer has K kernels, nothing where it has one.
        """
        self.weight = nn.Parameter(torch.empty(*sets, *self.kernel_shape, **kwargs))
        self.bias = nn.Parameter(torch.zeros(self.out_channels, **kwargs)) if bias else None
        for kernel in self.weight if sets else [self.weight]:
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")

    # whether an attention pools the input, which is a multiply-add for each of its values
    pools = True
    # whether the kernel depends on the input, so that it is made anew for every image
    per_sample = True

    def mixing_cost(self, positions):
        """Multiply-adds of a sample besides its convolution and the submodules' (see `counting.py`).

        positions: of the output.
        """
        return 0

    @property
    def kernel_shape(self):
        """[O, I / groups, *kernel_size]; of a linear layer [O, I, 1]."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _geometry(self):
        """The arguments of a convolution after its bias."""
        return self.stride, self.padding, self.dilation, self.groups


class _ConvNd(DynamicLayer):
    """The arguments of a convolution, checked.  x [B, C_in, *S] -> [B, C_out, *S'].

    Raises ValueError for sizes that do not fit.
    """

    dims = None

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        *,
        device=None,
        dtype=None,
        **settings,
    ):
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups {groups} must divide in_channels {in_channels} and out_channels {out_channels}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _tuple(kernel_size, self.dims, "kernel_size")
        self.stride, self.dilation = _tuple(stride, self.dims, "stride"), _tuple(dilation, self.dims, "dilation")
        if padding == "valid":
            padding = 0
        elif padding == "same":
            sizes = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            if any(s != 1 for s in self.stride) or any(size % 2 for size in sizes):
                raise ValueError("padding 'same' needs stride 1 and odd kernels; give the padding in numbers")
            padding = [size // 2 for size in sizes]
        self.padding = _tuple(padding, self.dims, "padding")
        self._setup(device, dtype, bias, **settings)

    def forward(self, x):
        return self.convolve(x)

    def extra_repr(self):
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", 0), ("dilation", 1), ("groups", 1)):
            if getattr(self, name) not in (default, (default,) * self.dims):
                text += f", {name}={getattr(self, name)}"
        return f"{text}, bias={self.bias is not None}, {self.method_repr()}"


class Conv1d(_ConvNd):
    """x [B, C_in, L] -> [B, C_out, L']."""

    dims = 1


class Conv2d(_ConvNd):
    """x [B, C_in, H, W] -> [B, C_out, H', W']."""

    dims = 2


class Conv3d(_ConvNd):
    """x [B, C_in, D, H, W] -> [B, C_out, D', H', W']."""

    dims = 3


class Linear(DynamicLayer):
    """A linear layer as a convolution of kernel size 1 over tokens.  x [B, ..., C_in] -> [B, ..., C_out].

    Attentions pool over all dimensions between the first and the last.
    """

    kernel_size = stride = dilation = (1,)
    padding, groups = (0,), 1

    def __init__(self, in_features, out_features, bias=True, *, device=None, dtype=None, **settings):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._setup(device, dtype, bias, **settings)

    @property
    def in_channels(self):
        return self.in_features

    @property
    def out_channels(self):
        return self.out_features

    def forward(self, x):
        tokens = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        y = self.convolve(tokens.transpose(1, 2))
        return y.transpose(1, 2).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.method_repr()}"
