"""The base classes of all dynamic layers, and functions that methods share.

A method's layer is a class with `_setup(device, dtype, bias, **settings)`, which makes its parameters, `convolve(x)`
for x [B, C, *S], and `method_repr()`, the method's part of the layer's repr. Together with one of the classes below it
becomes a drop-in replacement of PyTorch's layer: `class DYConv2d(_DYLayer, Conv2d)`. A linear layer is a convolution
over tokens.

Shapes: x is [B, C, *S], with one to three spatial dimensions S; a kernel is [O, I, *k] with I = C / groups.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.control import backend_forced
from ..ops.portable import portable_pool_to


def _tuple(value: int | Sequence[int], dims: int, what: str) -> tuple[int, ...]:
    value = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(value) != dims:
        raise ValueError(f"{what} {value} needs {dims} numbers")
    return value


def check_choice(what: str, values: Iterable[str], known: Sequence[str]) -> None:
    """Check the values of a setting.

    Args:
        what: the setting, for the error message.
        values: the given values.
        known: the accepted values.

    Raises:
        ValueError: a given value is not accepted.
    """
    for value in values:
        if value not in known:
            raise ValueError(f"unknown {what} '{value}', choose from {', '.join(known)}")


def check_reduction(reduction: float) -> None:
    """Raise ValueError unless a reduction, the width of a hidden layer relative to its input's, is in (0, 1]."""
    if not 0 < reduction <= 1:
        raise ValueError(f"reduction {reduction} is not in (0, 1]")


def hidden_width(channels: int, reduction: float, least: int = 1) -> int:
    """The width of a hidden layer: `channels * reduction`, rounded down, and at least `least`.

    Raises:
        ValueError: the reduction is not in (0, 1].
    """
    check_reduction(reduction)
    return max(int(channels * reduction), least)


def pool(x: Tensor, dim: int) -> Tensor:
    """The mean over a dimension of positions, computed as a sum.

    The gradient of a sum is a view, while the gradient of a mean is a tensor as large as x.
    """
    if x.dtype == torch.float16:
        # the sum could overflow
        return x.mean(dim)
    return x.sum(dim) / x.shape[dim]


def global_pool(x: Tensor) -> Tensor:
    """The mean [B, C] of x [B, C, *S] over all positions."""
    return pool(x.flatten(2), dim=2)


def pool_to(x: Tensor, size: int | Sequence[int]) -> Tensor:
    """x [B, C, *S], averaged to maps of a size that is one number, or one for every dimension."""
    if backend_forced() == "portable":
        return portable_pool_to(x, size)
    operator = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[x.ndim - 2]
    return operator(x, size)


def scaled(x: Tensor, factors: Tensor) -> Tensor:
    """x [B, C, *S] times one factor per sample and channel; `factors` holds these B * C numbers in any shape."""
    return x * factors.reshape(*x.shape[:2], *[1] * (x.ndim - 2))


class AttentionNorm(nn.BatchNorm1d):
    """BatchNorm over pooled inputs [B, C] or [B, C, N] that accepts a batch of one sample in train mode.

    The statistics of a single sample are degenerate. The running statistics are used instead, with a warning, and are
    not updated.
    """

    def degenerate(self, x: Tensor) -> bool:
        """Whether a batch is too small for statistics of its own."""
        return x.shape[0] == 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.degenerate(x):
            return super().forward(x)
        if not torch.compiler.is_compiling():
            warnings.warn(
                "a batch of one sample in train mode: the attention's BatchNorm uses its running statistics",
                stacklevel=2,
            )
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class MapNorm(AttentionNorm):
    """BatchNorm over flattened maps [B, C, N]; a single sample has statistics if its map has several positions."""

    def degenerate(self, x: Tensor) -> bool:
        return x.numel() == x.shape[1]


def reset_linear(module: nn.Module) -> None:
    """Initialise the linear layers in a module: weights Kaiming-normal by fan-out, biases zero."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)


class _HoldsKernels(nn.Module):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # sets of kernels are 4-D or 5-D but not images; a model's `.to(memory_format=torch.channels_last)` must not
        # reorder them, so it sees them flattened
        return super()._apply(lambda t: fn(t.flatten(1)).view(t.shape) if t.ndim > 3 else fn(t), recurse)


class Shared(_HoldsKernels):
    """A module at the root of a network that several layers share; it is counted as a layer (see `counting.py`)."""


class DynamicLayer(_HoldsKernels):
    """A convolution or linear layer of any method."""

    # `anatomy.is_dynamic` reads it
    is_dynamic = True

    def _make_kernels(self, bias: bool, *sets: int, **kwargs: Any) -> None:
        """Make `weight` [*sets, O, I, *k], Kaiming-normal by fan-out, and `bias`: zeros [O], or None.

        Args:
            bias: whether the layer has one.
            sets: K if the layer has K kernels, nothing if it has one.
            kwargs: device and dtype.
        """
        self.weight = nn.Parameter(torch.empty(*sets, *self.kernel_shape, **kwargs))
        self.bias = nn.Parameter(torch.zeros(self.out_channels, **kwargs)) if bias else None
        for kernel in self.weight if sets else [self.weight]:
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")

    # whether an attention pools the input, which takes a multiply-add for each of its values
    pools = True
    # whether the kernel depends on the input, so that it is made anew for every image
    per_sample = True

    def mixing_cost(self, positions: int) -> int:
        """The multiply-adds of one sample, without its convolution and those of submodules (see `counting.py`).

        `positions` is the number of positions of the output.
        """
        return 0

    def constant_kernel(self) -> Tensor | None:
        """The kernel [O, I, *k] if it is the same for every input and nothing else depends on the input, else None.

        With it the layer computes what a static one does; exported files have that static layer.
        """
        return None

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of one kernel: [O, I, *k], or [O, I, 1] for a linear layer."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        """Stride, padding, dilation and groups: the arguments of a convolution after its bias."""
        return self.stride, self.padding, self.dilation, self.groups


class _ConvNd(DynamicLayer):
    """A dynamic convolution: x [B, C_in, *S] -> [B, C_out, *S'].

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype: as for
            `nn.Conv2d`; a padding of "same" needs stride 1 and odd kernels.
        settings: of the method, for `_setup`.

    Raises:
        ValueError: sizes do not fit.
    """

    dims = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x)

    def extra_repr(self) -> str:
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
    """A dynamic linear layer [B, ..., C_in] -> [B, ..., C_out], computed as a convolution of size 1 over tokens.

    Attentions pool over all dimensions between the first and the last.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        settings: of the method, for `_setup`.
    """

    kernel_size = stride = dilation = (1,)
    padding, groups = (0,), 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._setup(device, dtype, bias, **settings)

    @property
    def in_channels(self) -> int:
        return self.in_features

    @property
    def out_channels(self) -> int:
        return self.out_features

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        y = self.convolve(tokens.transpose(1, 2))
        # contiguous as the output of nn.Linear, of which networks may take a view
        return y.transpose(1, 2).reshape(*x.shape[:-1], self.out_features).contiguous()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.method_repr()}"
