"""Conditionally parameterized convolution (CondConv; Yang et al., NeurIPS 2019): K kernels, weighted by a routing."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import blocks_of, heads_of, main_layers, select, without_short_cuts
from ..ops import mixture_conv
from .layer import Conv1d, Conv2d, Conv3d, Linear
from .method import Method, Setting, layer_classes
from .relay import BlockLayer, Relay, block_relays
from .settings import KERNEL_NUM


class CondRouting(nn.Linear):
    """Routing weights alpha [B, K] of pooled inputs [B, C]: sigmoid of a linear layer."""

    def forward(self, pooled: Tensor) -> Tensor:
        return super().forward(pooled).sigmoid()


class _CondLayer(BlockLayer):
    def _setup(
        self,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bias: bool,
        *,
        kernel_num: int = 8,
        relay: Relay | None = None,
        layer: str = "",
    ) -> None:
        if kernel_num < 1:
            raise ValueError(f"kernel_num {kernel_num} is below 1")
        kwargs = {"device": device, "dtype": dtype}
        self.kernel_num = kernel_num
        # the layers of a block share the routing of its first layer
        self._join(relay, layer)
        self.routing = CondRouting(self.in_channels, kernel_num, **kwargs) if self.leads else None
        self._make_kernels(bias, kernel_num, **kwargs)

    @torch.no_grad()
    def keep_weight(self, weight: Tensor) -> None:
        """Compute what the static kernel [O, I, *k] does: the routing starts as a constant, 1/2 for each kernel."""
        if self.leads:
            self.routing.weight.zero_()
            self.routing.bias.zero_()
        self.weight.copy_(weight.reshape(self.kernel_shape) * (2.0 / self.kernel_num))

    def mixing_cost(self, positions: int) -> int:
        return self.weight.numel()

    def convolve(self, x: Tensor) -> Tensor:
        alpha = self._shared(x, self.routing).unsqueeze(1)
        return mixture_conv(x, alpha, self.weight, self.kernel_size, self.bias, *self._geometry())

    def method_repr(self) -> str:
        return f"kernel_num={self.kernel_num}" + ("" if self.leads else f", routing of {self._relay.layers[0]}")


class CondConv1d(_CondLayer, Conv1d):
    """`nn.Conv1d` with K kernels that a routing adds up: [B, C_in, L] -> [B, C_out, L'].

    Args:
        kernel_num: K.
        relay: hands the routing from the first layer of a block, which computes it, to the others; None: the layer has
            a routing of its own.
        layer: the name of this layer in the relay.

    Raises:
        ValueError: for settings that do not fit.
    """


class CondConv2d(_CondLayer, Conv2d):
    """`nn.Conv2d` with K kernels that a routing adds up: [B, C_in, H, W] -> [B, C_out, H', W'].

    Arguments and errors as for `CondConv1d`.
    """


class CondConv3d(_CondLayer, Conv3d):
    """`nn.Conv3d` with K kernels that a routing adds up: [B, C_in, D, H, W] -> [B, C_out, D', H', W'].

    Arguments and errors as for `CondConv1d`.
    """


class CondLinear(_CondLayer, Linear):
    """`nn.Linear` with K matrices that a routing adds up: [B, ..., C_in] -> [B, ..., C_out].

    Arguments and errors as for `CondConv1d`.
    """


class CondConvMethod(Method):
    """CondConv replaces the last 3 blocks and the classifier (ODConv, section 3.1).

    In timm's class EfficientNet, to which MobileNetV2 belongs, they are the last 6 blocks; in a network without blocks
    it is the last third of its layers. The down-sampling convolutions of blocks stay static.
    """

    name = "condconv"
    layers = layer_classes("Cond", globals())
    settings = {"kernel_num": Setting(8, KERNEL_NUM)}

    def default_layers(self) -> list[str]:
        blocks = 6 if type(self.model).__name__ == "EfficientNet" else 3
        names = main_layers(self.model)
        if blocks_of(self.model).keys() & set(names):
            last = select(self.model, [f"last_{blocks}_blocks"])
        else:
            last = names[-math.ceil(len(names) / 3) :]
        chosen = {*last, *heads_of(self.model, names)}
        return without_short_cuts(self.model, [name for name, _ in self.model.named_modules() if name in chosen])

    def arguments(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Let the layers of a block share a routing, which the first of them computes from the block's input."""
        relays = block_relays(self.model, self.in_order(names))
        return {name: {**self.given, "relay": relays[name], "layer": name} for name in names}
