"""Dynamic convolution (DY-Conv; Chen et al., CVPR 2020): K kernels per layer, added up by an attention to them."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import mixture_conv
from .base import Conv1d, Conv2d, Conv3d, Linear, global_pool, reset_linear
from .odconv import KERNEL_FUNCTIONS, TEMPERATURES, caf, check_choice, check_temperature


class DYAttention(nn.Module):
    """GAP'ed input [B, C] -> FC -> ReLU -> FC -> softmax at a temperature: alpha [B, K].

    reduction: hidden width over C.  attention_function: "softmax", or "caf" (KernelWarehouse, Table 10).
    """

    def __init__(self, in_channels, kernel_num, *, reduction=1 / 4, attention_function="softmax", device, dtype):
        super().__init__()
        check_choice("attention_function", [attention_function], KERNEL_FUNCTIONS)
        if not 0 < reduction <= 1:
            raise ValueError(f"reduction {reduction} is not in (0, 1]")
        self.attention_function = attention_function
        hidden = max(int(in_channels * reduction), 1)
        self.fc1 = nn.Linear(in_channels, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, kernel_num, device=device, dtype=dtype)
        last = torch.tensor(TEMPERATURES[attention_function][1], device=device, dtype=dtype)
        self.register_buffer("temperature", last, persistent=False)
        reset_linear(self)

    def forward(self, pooled):
        z = self.fc2(F.relu(self.fc1(pooled)))
        if self.attention_function == "caf":
            return caf(z, self.temperature)
        return (z / self.temperature.to(z.dtype)).softmax(dim=1)


class _DYLayer:
    def _setup(self, device, dtype, bias, *, kernel_num=4, **attention):
        if kernel_num < 2:
            raise ValueError(f"kernel_num {kernel_num} is below 2: the attentions to a single kernel are constant")
        kwargs = {"device": device, "dtype": dtype}
        self.kernel_num = kernel_num
        self.attention = DYAttention(self.in_channels, kernel_num, **attention, **kwargs)
        self.weight = nn.Parameter(torch.empty(kernel_num, *self.kernel_shape, **kwargs))
        self.bias = nn.Parameter(torch.zeros(self.out_channels, **kwargs)) if bias else None
        for kernel in self.weight:
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")

    def set_temperature(self, temperature):
        """T of the softmax, from 30 to 1; with the attention function "caf" its tau, from 1 to 0."""
        check_temperature(temperature, self.attention.attention_function)
        self.attention.temperature.fill_(temperature)

    @property
    def temperatures(self):
        """(first, last) temperature of the training schedule."""
        return TEMPERATURES[self.attention.attention_function]

    @torch.no_grad()
    def keep_weight(self, weight):
        """Every kernel is the static one [O, I, *k]: attentions add up to 1."""
        self.weight.copy_(weight.reshape(self.kernel_shape))

    def mixing_cost(self, positions):
        return self.weight.numel()

    def convolve(self, x):
        alpha = self.attention(global_pool(x)).unsqueeze(1)
        return mixture_conv(x, alpha, self.weight, self.kernel_size, self.bias, *self._geometry())

    def method_repr(self):
        return f"kernel_num={self.kernel_num}"


class DYConv1d(_DYLayer, Conv1d):
    """`nn.Conv1d` with K kernels that an attention adds up: [B, C_in, L] -> [B, C_out, L'].

    kernel_num: K, at least 2; attention: reduction and attention_function of `DYAttention`.  Raises ValueError for
    settings that do not fit.
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
