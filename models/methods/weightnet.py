"""WeightNet (Ma et al., ECCV 2020): a grouped linear layer generates kernels from an attention to the input.

Shapes: x is [B, C, *S], a kernel [O, I, *k] with I = C / groups; T is the number of its taps, the product of k, and H
the width of the reduced input. The kernel of an output channel is cut into G slices. Each slice is a sum of K
vectors, weighted by K entries of the attention: M = K * G entries per output channel (section 3).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import sample_conv
from ..options import Option
from .layer import Conv1d, Conv2d, Conv3d, Linear, hidden_width, reset_linear
from .method import Method, Setting, layer_classes
from .relay import BlockLayer, Relay, block_relays
from .settings import KERNEL_NUM, REDUCTION

# the smallest width H of the reduced input
LEAST_WIDTH = 16


class _WeightNetLayer(BlockLayer):
    def _setup(
        self,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bias: bool,
        *,
        kernel_num: int = 1,
        slices: int = 2,
        reduction: float = 1 / 16,
        hidden: int | None = None,
        relay: Relay | None = None,
        layer: str = "",
    ) -> None:
        hidden = hidden_width(self.in_channels, reduction, LEAST_WIDTH) if hidden is None else hidden
        for name, value in (("kernel_num", kernel_num), ("slices", slices), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} {value} is below 1")
        kwargs = {"device": device, "dtype": dtype}
        self.kernel_num = kernel_num
        # a kernel that cannot be cut into equal slices, such as a depth-wise one, is a single slice
        self.slices = 1 if math.prod(self.kernel_shape[1:]) % slices else slices
        # the layers of a block share the reduced input of its first layer
        self._join(relay, layer)
        self.reduce = nn.Linear(self.in_channels, hidden, **kwargs) if self.leads else None
        self.attend = nn.Linear(hidden, self.out_channels * self.slices * kernel_num, **kwargs)
        reset_linear(self)
        self._make_kernels(bias, kernel_num, **kwargs)

    @torch.no_grad()
    def keep_weight(self, weight: Tensor) -> None:
        """Compute what the static kernel [O, I, *k] does: the attention starts with zero logits, as 1/2."""
        self.weight.copy_(weight.reshape(self.kernel_shape) * (2.0 / self.kernel_num))
        self.attend.weight.zero_()

    def mixing_cost(self, positions: int) -> int:
        """Multiply-adds of the grouped linear layer that generates the kernel."""
        return self.weight.numel()

    def convolve(self, x: Tensor) -> Tensor:
        hidden = self._shared(x, self.reduce)
        # alpha [B, O * G, K], matrices [K, O * G, I * T / G]: the grouped linear layer has a matrix for each group
        alpha = self.attend(hidden).sigmoid().unflatten(1, (-1, self.kernel_num))
        matrices = self.weight.reshape(self.kernel_num, alpha.shape[1], -1).to(alpha.dtype)
        kernels = torch.einsum("bgk,kgn->bgn", alpha, matrices) if self.kernel_num > 1 else alpha * matrices[0]
        return sample_conv(x, kernels.reshape(-1, *self.kernel_shape), self.bias, *self._geometry())

    def method_repr(self) -> str:
        shared = "" if self.leads else f", reduced input of {self._relay.layers[0]}"
        return f"kernel_num={self.kernel_num}, slices={self.slices}{shared}"


class WeightNetConv1d(_WeightNetLayer, Conv1d):
    """`nn.Conv1d` with generated kernels: [B, C_in, L] -> [B, C_out, L'] (section 3).

    Args:
        kernel_num: K.
        slices: G, if it divides the kernel of an output channel; otherwise G is 1.
        reduction: H over C; H is at least 16.
        hidden: H itself; None: `reduction` determines it.
        relay: hands the reduced input from the first layer of a block, which computes it, to the others; all need its
            H. None: the layer reduces its own input.
        layer: the name of this layer in the relay.

    Raises:
        ValueError: for settings that do not fit.
    """


class WeightNetConv2d(_WeightNetLayer, Conv2d):
    """`nn.Conv2d` with generated kernels: [B, C_in, H, W] -> [B, C_out, H', W'].

    Arguments and errors as for `WeightNetConv1d`.
    """


class WeightNetConv3d(_WeightNetLayer, Conv3d):
    """`nn.Conv3d` with generated kernels: [B, C_in, D, H, W] -> [B, C_out, D', H', W'].

    Arguments and errors as for `WeightNetConv1d`.
    """


class WeightNetLinear(_WeightNetLayer, Linear):
    """`nn.Linear` with generated matrices: [B, ..., C_in] -> [B, ..., C_out].

    Arguments and errors as for `WeightNetConv1d`.
    """


class WeightNetMethod(Method):
    """WeightNet replaces all convolutions except the first, and the linear layers of MLPs and self-attention."""

    name = "weightnet"
    layers = layer_classes("WeightNet", globals())
    settings = {
        "kernel_num": Setting(1, KERNEL_NUM),
        "slices": Setting(2, Option(int, None, "WeightNet: slices of a kernel, where that divides it", low=1, high=64)),
        "reduction": Setting(1 / 16, REDUCTION),
    }

    def arguments(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Let the layers of a block share a reduced input, which the first of them computes from the block's input."""
        relays, modules, result = block_relays(self.model, self.in_order(names)), dict(self.model.named_modules()), {}
        for name in names:
            leader = modules[relays[name].layers[0]]
            width = leader.in_features if isinstance(leader, nn.Linear) else leader.in_channels
            hidden = hidden_width(width, self.given["reduction"], LEAST_WIDTH)
            result[name] = {**self.given, "hidden": hidden, "relay": relays[name], "layer": name}
        return result
