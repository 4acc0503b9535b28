"""Omni-dimensional dynamic convolution (Li, Zhou and Yao, ICLR 2022): attention along all dimensions of the kernels.

Shapes: x is [B, C, *S], a layer's weight [K, O, I, *k] with I = C / groups; T is the number of taps, the product of k.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import main_layers, without_short_cuts
from ..ops import conv, mixture_conv, sample_conv, with_bias
from ..ops.control import is_plain
from ..ops.geometry import output_size
from ..options import Option
from .attention_functions import KERNEL_FUNCTIONS, Annealed, caf, last_temperature
from .layer import (
    AttentionNorm,
    Conv1d,
    Conv2d,
    Conv3d,
    Linear,
    check_choice,
    global_pool,
    hidden_width,
    pool_to,
    reset_linear,
    scaled,
)
from .method import Method, Setting, layer_classes
from .settings import ATTENTION_FUNCTION, ATTENTION_SHARING, ATTENTIONS_OPTION, KERNEL_NUM, REDUCTION

ATTENTIONS = ("spatial", "channel", "filter", "kernel")
SPATIAL_FUNCTIONS = ("sigmoid", "softmax")


class Head(nn.Linear):
    """A linear layer with the weight of a convolution, [out, in, side, side], as in the released checkpoints."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, side: int = 1, **kwargs: Any) -> None:
        super().__init__(in_features * side**2, out_features, bias, **kwargs)
        self.weight = nn.Parameter(self.weight.detach().reshape(out_features, in_features, side, side))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class ODHeads(nn.Module):
    """The attentions of ODConv from a hidden vector [B, H]: a linear layer and a function for each.

    Args:
        hidden: H.
        taps: T.
        kernel_num: K.
        attentions: any of "spatial" [B, T], "channel" [B, C], "filter" [B, O] and "kernel" [B, K] (Table 7). Those that
            would be constant are left out: spatial for kernels of one tap, filter for depth-wise kernels, and kernel
            for K = 1.
        spatial_function: "sigmoid" or "softmax" (Table 11).
        attention_function: of the kernel attention, "softmax", or "caf" (KernelWarehouse, Table 10), whose temperature
            goes from 1 to 0 and does not affect the other attentions.
        attention_sharing: whether the kernels share the spatial, channel and filter attentions (Table 12).
        depthwise_filter: keep the filter attention of depth-wise kernels.

    Raises:
        ValueError: for settings that do not fit.
    """

    def __init__(
        self,
        hidden: int,
        in_channels: int,
        out_channels: int,
        taps: int,
        groups: int,
        kernel_num: int,
        *,
        attentions: Sequence[str] = ATTENTIONS,
        spatial_function: str = "sigmoid",
        attention_function: str = "softmax",
        attention_sharing: bool = True,
        depthwise_filter: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("attention", attentions, ATTENTIONS)
        check_choice("spatial_function", [spatial_function], SPATIAL_FUNCTIONS)
        check_choice("attention_function", [attention_function], KERNEL_FUNCTIONS)
        if not attentions:
            raise ValueError(f"attentions is empty; name at least one of {', '.join(ATTENTIONS)}")
        if kernel_num > 1 and "kernel" not in attentions and attention_sharing:
            raise ValueError(
                f"kernel_num {kernel_num} without the kernel attention adds up to one kernel; use kernel_num 1, or "
                "attention_sharing false"
            )
        self.spatial_function, self.attention_function = spatial_function, attention_function
        self.sets = 1 if attention_sharing else kernel_num
        depthwise = groups == in_channels == out_channels and not depthwise_filter
        sizes = {
            "channel": in_channels,
            "filter": 0 if depthwise else out_channels,
            "spatial": taps if taps > 1 else 0,
            "kernel": kernel_num if kernel_num > 1 else 0,
        }
        self.names = [name for name, size in sizes.items() if size and name in attentions]
        for name in self.names:
            size = sizes[name] * (1 if name == "kernel" else self.sets)
            self.add_module(f"{name}_fc", Head(hidden, size, device=device, dtype=dtype))
        # not in the state dict, as in released checkpoints: the training schedule determines it
        self.register_buffer(
            "temperature", last_temperature(attention_function, device=device, dtype=dtype), persistent=False
        )
        reset_linear(self)

    def attend(self, hidden: Tensor) -> dict[str, Tensor]:
        """Name -> attention of hidden vectors [B, H].

        The kernel attention is [B, K], the others are [B, 1 or K, size]. Attentions that are left out have no entry.
        """
        result, annealed = {}, self.attention_function == "softmax"
        for name in self.names:
            z = getattr(self, f"{name}_fc")(hidden)
            if name == "kernel" and not annealed:
                result[name] = caf(z, self.temperature)
                continue
            z = z / self.temperature.to(z.dtype) if annealed else z
            if name == "kernel":
                result[name] = z.softmax(dim=1)
                continue
            z = z.unflatten(1, (self.sets, -1))
            softmax = name == "spatial" and self.spatial_function == "softmax"
            result[name] = z.softmax(dim=2) if softmax else z.sigmoid()
        return result

    @torch.no_grad()
    def reset_to_constants(self) -> float:
        """Set all logits to zero.

        Returns the factor of the kernels that compensates for all attentions except the kernel attention.
        """
        factor = 1.0
        for name in self.names:
            head = getattr(self, f"{name}_fc")
            head.weight.zero_()
            head.bias.zero_()
            softmax = name == "spatial" and self.spatial_function == "softmax"
            factor *= 1.0 if name == "kernel" else head.out_features / self.sets if softmax else 2.0
        return factor

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        return self.attend(hidden)

    def product_cost(self, kernel_shape: Sequence[int], groups: int) -> int:
        """Multiply-adds of multiplying the spatial, channel and filter attentions with each other, in this order.

        A product has an element for each part of a kernel [O, I, *k] that its attentions tell apart. These are the
        terms k^2 c_in and k^2 c_in c_out in the last term of equations 3 and 4.
        """
        (c_out, c_in), taps = kernel_shape[:2], math.prod(kernel_shape[2:])
        # a channel attention has values for [groups, I], a filter attention for [groups, O / groups]
        reach = {
            "spatial": {"k": taps},
            "channel": {"g": groups, "i": c_in},
            "filter": {"g": groups, "o": c_out // groups},
        }
        names = [name for name in reach if name in self.names]
        sizes, cost = {}, 0
        for position, name in enumerate(names):
            sizes.update(reach[name])
            cost += math.prod(sizes.values()) if position else 0
        return self.sets * cost


class ODAttention(ODHeads):
    """Global average pooling, FC, norm, ReLU, and the heads (section 3.2): x [B, C, *S] -> {name: attention}.

    Args:
        taps: T.
        kernel_num: K.
        reduction: hidden width over C; the hidden layer is at least 16 wide.
        spatial_pool: side of the map that x is pooled to if there is a spatial attention (Table 16; only for dims 2).
        dims: number of spatial dimensions of x.
        **heads: other arguments of `ODHeads`.

    Raises:
        ValueError: for settings that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        taps: int,
        groups: int,
        kernel_num: int,
        *,
        reduction: float = 1 / 16,
        spatial_pool: int = 1,
        dims: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **heads: Any,
    ) -> None:
        hidden = hidden_width(in_channels, reduction, 16)
        kwargs = {"device": device, "dtype": dtype}
        super().__init__(hidden, in_channels, out_channels, taps, groups, kernel_num, **heads, **kwargs)
        if spatial_pool != 1 and dims != 2 and "spatial" in self.names:
            raise ValueError("spatial_pool is for 2-d convolutions")
        self.side = spatial_pool if "spatial" in self.names else 1
        if not self.names:
            # DistributedDataParallel would wait for the gradient of a parameter that is not used
            self.fc = self.bn = None
            return
        self.fc = Head(in_channels, hidden, bias=False, side=self.side, **kwargs)
        self.bn = AttentionNorm(hidden, **kwargs)
        reset_linear(self.fc)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if not self.names:
            return {}
        pooled = global_pool(x) if self.side == 1 else pool_to(x, self.side).flatten(1)
        return self.attend(F.relu(self.bn(self.fc(pooled))))


class _ODLayer(Annealed):
    """Equation 2: kernels are multiplied by their attentions and added up, and x is convolved with the sum."""

    def _setup(
        self,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bias: bool,
        *,
        kernel_num: int = 1,
        **attention: Any,
    ) -> None:
        if kernel_num < 1:
            raise ValueError(f"kernel_num {kernel_num} is below 1")
        kwargs = {"device": device, "dtype": dtype}
        self.kernel_num, self.taps = kernel_num, math.prod(self.kernel_size)
        self.attention = self._make_attention(**attention, **kwargs)
        self._make_kernels(bias, kernel_num, **kwargs)

    def _make_attention(self, **settings: Any) -> ODHeads:
        sizes = self.in_channels, self.out_channels, self.taps, self.groups, self.kernel_num
        return ODAttention(*sizes, dims=len(self.kernel_size), **settings)

    @torch.no_grad()
    def keep_weight(self, weight: Tensor) -> None:
        """Compute what the static kernel [O, I, *k] does: the kernels compensate for attentions that are constant."""
        heads = self.attention
        scale = heads.reset_to_constants() / (1 if "kernel" in heads.names else self.kernel_num)
        self.weight.copy_(weight.reshape(self.kernel_shape) * scale)

    def constant_kernel(self) -> Tensor | None:
        """The only kernel, where no attention is left: K = 1, and the other ones are not among the settings."""
        return None if self.attention.names or self.kernel_num > 1 else self.weight[0]

    def mixing_cost(self, positions: int) -> int:
        """The last term of equations 3 and 4.

        Every kernel is multiplied by the product of the spatial, channel and filter attentions, then by its kernel
        attention.
        """
        heads = self.attention
        passes = ("kernel" in heads.names) + any(name != "kernel" for name in heads.names)
        return heads.product_cost(self.kernel_shape, self.groups) + passes * self.weight.numel()

    def convolve(self, x: Tensor) -> Tensor:
        return self.modulated(x, self.attention(x))

    def modulated(self, x: Tensor, attentions: dict[str, Tensor]) -> Tensor:
        """The output [B, O, *S'] for x [B, C, *S] and attentions as `ODHeads` returns them."""
        if self.attention.sets > 1 or self._has_small_kernels(x):
            return sample_conv(x, self._separate_kernels(attentions), self.bias, *self._geometry())
        # channel and filter attentions scale the input and the output, so no per-sample kernel is built for them
        if "channel" in attentions:
            x = scaled(x, attentions["channel"])
        alpha, cells = attentions.get("kernel"), self.weight
        if "spatial" in attentions:
            alpha, cells = self._position_by_position(attentions["spatial"], alpha)
        elif alpha is not None:
            alpha = alpha.unsqueeze(1)
        if alpha is None:
            y = conv(x, self.weight[0], None, *self._geometry())
        else:
            y = mixture_conv(x, alpha, cells, self.kernel_size, None, *self._geometry())
        if "filter" in attentions:
            y = scaled(y, attentions["filter"])
        return with_bias(y, self.bias)

    def _has_small_kernels(self, x: Tensor) -> bool:
        """Whether a CPU multiplies the only kernel by its attentions faster than the input and the output."""
        if self.kernel_num > 1 or not self.attention.names or not x.is_cpu or not is_plain(x):
            return False
        sizes = x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation
        maps = math.prod(x.shape[1:]) + self.out_channels * math.prod(output_size(*sizes))
        return self.weight.numel() < maps

    def _position_by_position(self, spatial: Tensor, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
        """alpha [B, T, K T] and cells [K T, O, I, 1...], which mix position t from the kernels' slices at t."""
        # spatial [B, 1, T], alpha [B, K]
        alpha = spatial.flatten(1) if alpha is None else (alpha.unsqueeze(2) * spatial).flatten(1)
        own = torch.eye(self.taps, dtype=alpha.dtype, device=alpha.device)
        alpha = (alpha.unflatten(1, (1, -1, self.taps)) * own.unsqueeze(1)).flatten(2)
        cells = self.weight.flatten(3).movedim(3, 1).flatten(0, 1)
        return alpha, cells.reshape(*cells.shape, *[1] * len(self.kernel_size))

    def _separate_kernels(self, attentions: dict[str, Tensor]) -> Tensor:
        """The kernels of the samples [B, O, I, *k], if every one of the K kernels has attentions of its own.

        They are added one after the other, since a tensor of B K O I T elements would be large.
        """
        if set(attentions) == {"filter"}:
            kernels = torch.einsum("bko,koi->boi", attentions["filter"], self.weight.flatten(2))
            return kernels.reshape(-1, *self.kernel_shape)
        groups, (c_out, c_in) = self.groups, self.kernel_shape[:2]
        total = 0
        for i in range(self.kernel_num):
            kernel = self.weight[i].reshape(1, groups, c_out // groups, c_in, self.taps)
            if "spatial" in attentions:
                kernel = kernel * attentions["spatial"][:, i].reshape(-1, 1, 1, 1, self.taps)
            if "channel" in attentions:
                kernel = kernel * attentions["channel"][:, i].reshape(-1, groups, 1, c_in, 1)
            if "filter" in attentions:
                kernel = kernel * attentions["filter"][:, i].reshape(-1, groups, c_out // groups, 1, 1)
            if "kernel" in attentions:
                kernel = kernel * attentions["kernel"][:, i].reshape(-1, 1, 1, 1, 1)
            total = total + kernel
        return total.reshape(-1, *self.kernel_shape)

    def method_repr(self) -> str:
        return f"kernel_num={self.kernel_num}, attentions={'+'.join(self.attention.names)}"


class ODConv1d(_ODLayer, Conv1d):
    """`nn.Conv1d` as omni-dimensional dynamic convolution: [B, C_in, L] -> [B, C_out, L'] (equation 2).

    Args:
        kernel_num: K.
        **attention: `reduction` and `spatial_pool` of `ODAttention`, and `attentions`, `spatial_function`,
            `attention_function` and `attention_sharing` of `ODHeads`.

    Raises:
        ValueError: for settings that do not fit.
    """


class ODConv2d(_ODLayer, Conv2d):
    """`nn.Conv2d` as omni-dimensional dynamic convolution: [B, C_in, H, W] -> [B, C_out, H', W'].

    Arguments and errors as for `ODConv1d`.
    """


class ODConv3d(_ODLayer, Conv3d):
    """`nn.Conv3d` as omni-dimensional dynamic convolution: [B, C_in, D, H, W] -> [B, C_out, D', H', W'].

    Arguments and errors as for `ODConv1d`.
    """


class ODLinear(_ODLayer, Linear):
    """`nn.Linear` as a 1x1 ODConv over tokens: [B, ..., C_in] -> [B, ..., C_out].

    Arguments and errors as for `ODConv1d`.
    """


class ODConvMethod(Method):
    """ODConv replaces all convolutions except the first one and the short cuts of ResNets, as the released code does.

    It also replaces the linear layers of MLPs and self-attention, as DY-Conv does.
    """

    name = "odconv"
    # the released name
    aliases = ("od",)
    layers = layer_classes("OD", globals())
    settings = {
        "kernel_num": Setting(1, KERNEL_NUM),
        "reduction": Setting(1 / 16, REDUCTION),
        "attentions": Setting(ATTENTIONS, ATTENTIONS_OPTION),
        "spatial_function": Setting(
            "sigmoid",
            Option(str, None, "ODConv: function of the spatial attention (Table 11)", choices=SPATIAL_FUNCTIONS),
        ),
        "attention_function": Setting("softmax", ATTENTION_FUNCTION),
        "attention_sharing": Setting(True, ATTENTION_SHARING),
        "spatial_pool": Setting(
            1, Option(int, None, "ODConv: side of the map that the spatial attention sees (Table 16)", low=1, high=64)
        ),
    }

    def default_layers(self) -> list[str]:
        return without_short_cuts(self.model, main_layers(self.model))
