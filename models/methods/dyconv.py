"""Dynamic convolution (DY-Conv; Chen et al., CVPR 2020): a sum of K kernels, weighted by an attention to them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import mixture_conv
from .attention_functions import KERNEL_FUNCTIONS, Annealed, caf, last_temperature
from .layer import Conv1d, Conv2d, Conv3d, Linear, check_choice, global_pool, hidden_width, reset_linear
from .method import Method, Setting, layer_classes
from .settings import ATTENTION_FUNCTION, KERNEL_NUM, REDUCTION


class DYAttention(nn.Module):
    """Globally pooled input [B, C] -> FC -> ReLU -> FC -> softmax with a temperature: alpha [B, K].

    Args:
        in_channels: C.
        kernel_num: K.
        reduction: hidden width over C.
        attention_function: "softmax", or "caf" (KernelWarehouse, Table 10).

    Raises:
        ValueError: for settings that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_num: int,
        *,
        reduction: float = 1 / 4,
        attention_function: str = "softmax",
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_choice("attention_function", [attention_function], KERNEL_FUNCTIONS)
        self.attention_function = attention_function
        hidden = hidden_width(in_channels, reduction)
        self.fc1 = nn.Linear(in_channels, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, kernel_num, device=device, dtype=dtype)
        self.register_buffer(
            "temperature", last_temperature(attention_function, device=device, dtype=dtype), persistent=False
        )
        reset_linear(self)

    def forward(self, pooled: Tensor) -> Tensor:
        z = self.fc2(F.relu(self.fc1(pooled)))
        if self.attention_function == "caf":
            return caf(z, self.temperature)
        return (z / self.temperature.to(z.dtype)).softmax(dim=1)


class _DYLayer(Annealed):
    def _setup(
        self,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bias: bool,
        *,
        kernel_num: int = 4,
        **attention: Any,
    ) -> None:
        if kernel_num < 2:
            raise ValueError(f"kernel_num {kernel_num} is below 2: the attentions to a single kernel are constant")
        kwargs = {"device": device, "dtype": dtype}
        self.kernel_num = kernel_num
        self.attention = DYAttention(self.in_channels, kernel_num, **attention, **kwargs)
        self._make_kernels(bias, kernel_num, **kwargs)

    @torch.no_grad()
    def keep_weight(self, weight: Tensor) -> None:
        """Make every kernel the static one [O, I, *k]: the attentions add up to 1."""
        self.weight.copy_(weight.reshape(self.kernel_shape))

    def mixing_cost(self, positions: int) -> int:
        return self.weight.numel()

    def convolve(self, x: Tensor) -> Tensor:
        alpha = self.attention(global_pool(x)).unsqueeze(1)
        return mixture_conv(x, alpha, self.weight, self.kernel_size, self.bias, *self._geometry())

    def method_repr(self) -> str:
        return f"kernel_num={self.kernel_num}"


class DYConv1d(_DYLayer, Conv1d):
    """`nn.Conv1d` with K kernels that an attention adds up: [B, C_in, L] -> [B, C_out, L'].

    Args:
        kernel_num: K, at least 2.
        **attention: `reduction` and `attention_function` of `DYAttention`.

    Raises:
        ValueError: for settings that do not fit.
    """


class DYConv2d(_DYLayer, Conv2d):
    """`nn.Conv2d` with K kernels that an attention adds up: [B, C_in, H, W] -> [B, C_out, H', W'].

    Arguments and errors as for `DYConv1d`.
    """


class DYConv3d(_DYLayer, Conv3d):
    """`nn.Conv3d` with K kernels that an attention adds up: [B, C_in, D, H, W] -> [B, C_out, D', H', W'].

    Arguments and errors as for `DYConv1d`.
    """


class DYLinear(_DYLayer, Linear):
    """`nn.Linear` with K matrices that an attention adds up: [B, ..., C_in] -> [B, ..., C_out].

    Arguments and errors as for `DYConv1d`.
    """


class DYConvMethod(Method):
    """DY-Conv replaces all convolutions except the first, and the linear layers of MLPs and self-attention."""

    name = "dyconv"
    layers = layer_classes("DY", globals())
    settings = {
        "kernel_num": Setting(4, KERNEL_NUM),
        "reduction": Setting(1 / 4, REDUCTION),
        "attention_function": Setting("softmax", ATTENTION_FUNCTION),
    }
