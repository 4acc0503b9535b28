"""Context-gated convolution (CGC; Lin et al., ECCV 2020): the global context gates every weight of a kernel.

Shapes: x is [B, C, *S], a kernel [O, I, *k] with I = C / groups; T is the number of its taps, the product of k, and D
the size of the latent context of a channel.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import replaceable
from ..ops import sample_conv
from .layer import AttentionNorm, Conv1d, Conv2d, Conv3d, pool_to, reset_linear
from .method import Method, layer_classes


def interaction_groups(in_channels: int, out_channels: int, size: int = 16) -> int:
    """The largest number of groups of at least `size` input channels that divides the channels of both sides."""
    most = max(in_channels // size, 1)
    return max(n for n in range(1, most + 1) if in_channels % n == 0 and out_channels % n == 0)


class ContextGate(nn.Module):
    """x [B, C, *S] -> the logits of the gates of input channels [B, C, T] and of output channels [B, O, T].

    Three steps (section 3), whose linear layers have no bias:

    - Context encoding: every channel is pooled to the size of the kernel, and one linear layer maps it to D numbers.
      The input side and the output side each apply a norm of their own, and a ReLU.
    - Channel interacting: one linear layer, the same for all groups, maps groups of 16 or more input channels to output
      channels; norm and ReLU follow.
    - Gate decoding: each side has a linear layer from D to T.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        self.kernel_size, taps = kernel_size, math.prod(kernel_size)
        latent, self.groups = taps // 2 + 1, interaction_groups(in_channels, out_channels)
        self.encode = nn.Linear(taps, latent, bias=False, **kwargs)
        self.in_norm = AttentionNorm(in_channels, **kwargs)
        self.in_decode = nn.Linear(latent, taps, bias=False, **kwargs)
        self.context_norm = AttentionNorm(in_channels, **kwargs)
        self.interact = nn.Linear(in_channels // self.groups, out_channels // self.groups, bias=False, **kwargs)
        self.out_norm = AttentionNorm(out_channels, **kwargs)
        self.out_decode = nn.Linear(latent, taps, bias=False, **kwargs)
        reset_linear(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        context = self.encode(pool_to(x, self.kernel_size).flatten(2))
        into = self.in_decode(F.relu(self.in_norm(context)))
        groups = F.relu(self.context_norm(context)).unflatten(1, (self.groups, -1))
        # BatchNorm's gradient is contiguous, while torch.compile expects it in the layout of BatchNorm's input
        mixed = self.interact(groups.transpose(2, 3)).transpose(2, 3).flatten(1, 2).contiguous()
        return into, self.out_decode(F.relu(self.out_norm(mixed)))


class _CGCLayer:
    def _setup(self, device: torch.device | str | None, dtype: torch.dtype | None, bias: bool) -> None:
        if math.prod(self.kernel_size) == 1:
            raise ValueError("kernel_size 1: CGC needs kernels of several positions; leave such layers static")
        kwargs = {"device": device, "dtype": dtype}
        self.attention = ContextGate(self.in_channels, self.out_channels, self.kernel_size, **kwargs)
        self._make_kernels(bias, **kwargs)

    @torch.no_grad()
    def keep_weight(self, weight: Tensor) -> None:
        """Compute what the static kernel [O, I, *k] does: with zero logits all gates are 1/2, so it is doubled."""
        self.weight.copy_(weight.reshape(self.kernel_shape) * 2)
        self.attention.in_decode.weight.zero_()
        self.attention.out_decode.weight.zero_()

    def mixing_cost(self, positions: int) -> int:
        """Multiply-adds of the product of the kernel and its gates."""
        return self.weight.numel()

    def convolve(self, x: Tensor) -> Tensor:
        into, out = (logits.unflatten(1, (self.groups, -1)) for logits in self.attention(x))
        # [B, groups, O / groups, I, T]
        gates = (into.unsqueeze(2) + out.unsqueeze(3)).sigmoid()
        kernels = self.weight * gates.reshape(-1, *self.kernel_shape)
        return sample_conv(x, kernels, self.bias, *self._geometry())

    def method_repr(self) -> str:
        return f"interaction_groups={self.attention.groups}"


class CGCConv1d(_CGCLayer, Conv1d):
    """`nn.Conv1d` whose weights the global context gates: [B, C_in, L] -> [B, C_out, L'] (section 3).

    Raises ValueError for kernels of one position.
    """


class CGCConv2d(_CGCLayer, Conv2d):
    """`nn.Conv2d` whose weights the global context gates: [B, C_in, H, W] -> [B, C_out, H', W'].

    Raises ValueError for kernels of one position.
    """


class CGCConv3d(_CGCLayer, Conv3d):
    """`nn.Conv3d` whose weights the global context gates: [B, C_in, D, H, W] -> [B, C_out, D', H', W'].

    Raises ValueError for kernels of one position.
    """


class CGCMethod(Method):
    """CGC replaces all convolutions larger than 1x1, the first one too, except those of attention modules (`se`)."""

    name = "cgc"
    layers = layer_classes("CGC", globals())

    def default_layers(self) -> list[str]:
        sizes = {name: getattr(module, "kernel_size", ()) for name, module in replaceable(self.model).items()}
        return [name for name, size in sizes.items() if math.prod(size) > 1 and "se" not in name.split(".")]
