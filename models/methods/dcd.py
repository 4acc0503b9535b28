"""Dynamic convolution decomposition (DCD; Li et al., ICLR 2021): a static kernel and a dynamic residual of low rank.

W(x) = Lambda(x) W0 + P Phi(x) Q^T: Lambda scales the output channels of the static convolution W0. In the residual,
Q^T maps the input to L channels, Phi [L, L] fuses them, and P maps them to the output.

Shapes: x is [B, C, *S] and S' the size of the output; L is the rank, H the width of the squeezed input.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import blocks_of, family_name, heads_of, main_layers, without_short_cuts
from ..ops import conv
from .layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Linear,
    MapNorm,
    global_pool,
    hidden_width,
    pool_to,
    reset_linear,
    scaled,
)
from .method import Method, Setting, layer_classes
from .settings import REDUCTION


def hard_sigmoid(x: Tensor) -> Tensor:
    """relu6(x + 3) / 3: between 0 and 2, and 1 at 0."""
    return F.relu6(x + 3) / 3


def inverted_bottleneck_sizes(in_channels: int, out_channels: int) -> dict[str, int]:
    """`pool` and `rank` of a 1x1 convolution of MobileNetV2; the attention of an expanding one sees a 2x2 map."""
    pool, reduction = (2, 8) if in_channels < out_channels else (1, 2)
    inputs = in_channels * pool**2
    while (min(inputs, out_channels) // reduction) ** 2 > 2 * inputs:
        reduction *= 2
    return {"pool": pool, "rank": max(min(inputs, out_channels) // reduction, 4)}


class DCDBranch(nn.Module):
    """Pooled input [B, N] -> Phi [B, L, L] and the scale of the output channels, [B, O].

    A linear layer maps the input to H values, and a second one maps these to their own gates. From the gated values
    one linear layer predicts Phi, another one the scale. None of them has a bias.

    Args:
        inputs: N.
        rank: L.
        hidden: H.
    """

    def __init__(
        self,
        inputs: int,
        out_channels: int,
        rank: int,
        hidden: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        kwargs = {"bias": False, "device": device, "dtype": dtype}
        self.rank = rank
        self.fc = nn.Linear(inputs, hidden, **kwargs)
        self.gate_fc = nn.Linear(hidden, hidden, **kwargs)
        self.phi_fc = nn.Linear(hidden, rank**2, **kwargs)
        self.scale_fc = nn.Linear(hidden, out_channels, **kwargs)
        reset_linear(self)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        z = self.fc(pooled)
        z = z * hard_sigmoid(self.gate_fc(z))
        return self.phi_fc(z).unflatten(1, (self.rank, self.rank)), hard_sigmoid(self.scale_fc(z))


class _DCDLayer:
    def _setup(
        self,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bias: bool,
        *,
        rank: int | None = None,
        pool: int = 1,
        reduction: float = 1 / 16,
        hidden: int | None = None,
    ) -> None:
        dims = len(self.kernel_size)
        inputs = self.in_channels * pool**dims if pool >= 1 else 1
        rank = int(inputs**0.5) if rank is None else rank
        if self.groups != 1:
            raise ValueError(
                f"groups {self.groups}: DCD fuses channels across groups and needs one group; leave such layers static"
            )
        hidden = hidden_width(max(inputs, rank**2), reduction, 4) if hidden is None else hidden
        for name, value in (("pool", pool), ("rank", rank), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} {value} is below 1")
        kwargs = {"device": device, "dtype": dtype}
        self.rank, self.pool = rank, pool
        self.attention = DCDBranch(inputs, self.out_channels, rank, hidden, **kwargs)
        self._make_kernels(bias, **kwargs)
        self.q = nn.Parameter(torch.empty(rank, self.in_channels, **kwargs))
        self.p = nn.Parameter(torch.empty(self.out_channels, rank, **kwargs))
        self.bn1, self.bn2 = MapNorm(rank, **kwargs), MapNorm(rank, **kwargs)
        for parameter in (self.q, self.p):
            nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")

    @torch.no_grad()
    def keep_weight(self, weight: Tensor) -> None:
        """Compute what the static kernel [O, I, *k] does: the residual and the logits of the scale start at 0."""
        self.weight.copy_(weight.reshape(self.kernel_shape))
        self.p.zero_()
        self.attention.scale_fc.weight.zero_()

    def _centred(self, x: Tensor) -> Tensor:
        """x, padded or cropped to what the central tap of the kernel sees.

        A 1x1 kernel with the stride of the layer then gives a map of the size of the layer's output.
        """
        sizes = []
        for p, d, k in zip(self.padding, self.dilation, self.kernel_size, strict=True):
            first = d * ((k - 1) // 2)
            sizes = [p - first, p - d * (k - 1) + first, *sizes]
        return F.pad(x, sizes) if any(sizes) else x

    def mixing_cost(self, positions: int) -> int:
        """Multiply-adds of the dynamic branch: Q^T, Phi and P at every position, and the scale of the static branch."""
        return positions * (self.q.numel() + self.rank**2 + self.p.numel() + self.out_channels)

    def convolve(self, x: Tensor) -> Tensor:
        ones = [1] * len(self.kernel_size)
        pooled = global_pool(x) if self.pool == 1 else pool_to(x, self.pool).flatten(1)
        phi, scale = self.attention(pooled)
        z = conv(self._centred(x), self.q.reshape(*self.q.shape, *ones), None, self.stride)
        size, z = z.shape[2:], self.bn1(z.flatten(2))
        z = self.bn2(phi @ z) + z
        z = conv(z.unflatten(2, size), self.p.reshape(*self.p.shape, *ones))
        y = conv(x, self.weight, self.bias, *self._geometry())
        return scaled(y, scale) + z

    def method_repr(self) -> str:
        return f"rank={self.rank}, pool={self.pool}"


class DCDConv1d(_DCDLayer, Conv1d):
    """`nn.Conv1d` as a static convolution and a dynamic residual: [B, C_in, L] -> [B, C_out, L'] (section 3).

    Args:
        rank: L; None: the square root of the number of the attention's inputs, rounded down.
        pool: side of the map that the attention sees.
        reduction: H over the larger of the number of the attention's inputs and L^2; H is at least 4.
        hidden: H itself; None: `reduction` determines it.

    Raises:
        ValueError: for groups other than 1 and for settings that do not fit.
    """


class DCDConv2d(_DCDLayer, Conv2d):
    """`nn.Conv2d` as a static convolution and a dynamic residual: [B, C_in, H, W] -> [B, C_out, H', W'].

    Arguments and errors as for `DCDConv1d`.
    """


class DCDConv3d(_DCDLayer, Conv3d):
    """`nn.Conv3d` as a static convolution and a dynamic residual: [B, C_in, D, H, W] -> [B, C_out, D', H', W'].

    Arguments and errors as for `DCDConv1d`.
    """


class DCDLinear(_DCDLayer, Linear):
    """`nn.Linear` as a static layer and a dynamic residual: [B, ..., C_in] -> [B, ..., C_out].

    Arguments and errors as for `DCDConv1d`.
    """


class DCDMethod(Method):
    """DCD replaces the `main_layers` without groups, except those in short cuts, and the classifier.

    In MobileNetV2 the former are the 1x1 convolutions of the inverted bottlenecks.
    """

    name = "dcd"
    layers = layer_classes("DCD", globals())
    settings = {"reduction": Setting(None, REDUCTION)}

    def default_layers(self) -> list[str]:
        modules = dict(self.model.named_modules())
        names = without_short_cuts(self.model, main_layers(self.model))
        if family_name(self.model) == "MobileNetV2":
            blocks = blocks_of(self.model)
            names = [name for name in names if hasattr(modules.get(blocks.get(name)), "conv_pwl")]
        chosen = {name for name in names if getattr(modules[name], "groups", 1) == 1}
        chosen |= set(heads_of(self.model, main_layers(self.model)))
        return [name for name in modules if name in chosen]

    def arguments(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The sizes of the released networks: pooling and rank by the kind of block; a classifier has rank 32."""
        modules, family = dict(self.model.named_modules()), family_name(self.model)
        reduction, result, blocks = self.given["reduction"], {}, blocks_of(self.model)
        if reduction is None:
            narrow = family == "MobileNetV2" and self.model.conv_stem.out_channels < 24
            reduction = 1 / 8 if narrow else 1 / 16
        heads = heads_of(self.model, main_layers(self.model))
        for name in names:
            layer, block, own = modules[name], modules.get(blocks.get(name)), {}
            if name in heads:
                own = {"rank": 32, "hidden": 32}
            elif family == "MobileNetV2":
                own = inverted_bottleneck_sizes(layer.in_channels, layer.out_channels)
            elif family == "ResNet" and block is not None and not hasattr(block, "conv3"):
                own = {"pool": 2}
            result[name] = {"reduction": reduction, **own}
        return result
