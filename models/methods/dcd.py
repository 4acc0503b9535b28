"""Dynamic convolution decomposition (DCD; Li et al., ICLR 2021): channels fused in a small space, by the input.

Beside the static convolution W0 a dynamic residual of low rank: W(x) = Lambda(x) W0 + P Phi(x) Q^T, where Lambda scales
the output channels, Q^T maps the input to L channels, Phi [L, L] fuses them, and P maps them to the output.

Shapes: x is [B, C, *S] and S' the size of the output; L is the rank, H the width of the squeezed input.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..anatomy import block_of, family_name, heads_of, main_layers, without_short_cuts
from .layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Linear,
    MapNorm,
    conv,
    global_pool,
    hidden_width,
    pool_to,
    reset_linear,
    scaled,
)
from .method import Method, Setting, layer_classes
from .settings import REDUCTION


def hard_sigmoid(x):
    """relu6(x + 3) / 3: between 0 and 2, and 1 at 0."""
    return F.relu6(x + 3) / 3


def inverted_bottleneck_sizes(in_channels, out_channels):
    """pool and rank of the 1x1 convolutions of MobileNetV2: expanding ones see a 2x2 map of their input."""
    pool, reduction = (2, 8) if in_channels < out_channels else (1, 2)
    inputs = in_channels * pool**2
    while (min(inputs, out_channels) // reduction) ** 2 > 2 * inputs:
        reduction *= 2
    return {"pool": pool, "rank": max(min(inputs, out_channels) // reduction, 4)}


class DCDBranch(nn.Module):
    """Pooled input [B, N] -> Phi [B, L, L] and the scale of the output channels, [B, O].

    A linear layer to H, gated by itself, and a linear layer for each of the two; none has a bias.
    """

    def __init__(self, inputs, out_channels, rank, hidden, *, device, dtype):
        super().__init__()
        kwargs = {"bias": False, "device": device, "dtype": dtype}
        self.rank = rank
        self.fc = nn.Linear(inputs, hidden, **kwargs)
        self.gate_fc = nn.Linear(hidden, hidden, **kwargs)
        self.phi_fc = nn.Linear(hidden, rank**2, **kwargs)
        self.scale_fc = nn.Linear(hidden, out_channels, **kwargs)
        reset_linear(self)

    def forward(self, pooled):
        z = self.fc(pooled)
        z = z * hard_sigmoid(self.gate_fc(z))
        return self.phi_fc(z).unflatten(1, (self.rank, self.rank)), hard_sigmoid(self.scale_fc(z))


class _DCDLayer:
    def _setup(self, device, dtype, bias, *, rank=None, pool=1, reduction=1 / 16, hidden=None):
        dims = len(self.kernel_size)
        inputs = self.in_channels * pool**dims if pool >= 1 else 1
        rank = int(inputs**0.5) if rank is None else rank
        if self.groups != 1:
            raise ValueError(f"groups {self.groups}: channels are fused across all of them; leave such layers static")
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
    def keep_weight(self, weight):
        """Computes what the static kernel [O, I, *k] does: the dynamic residual and the logits of the scale are 0."""
        self.weight.copy_(weight.reshape(self.kernel_shape))
        self.p.zero_()
        self.attention.scale_fc.weight.zero_()

    def _centred(self, x):
        """x where the central taps of the kernel see it, so that 1x1 kernels of its stride give maps of its size."""
        sizes = []
        for p, d, k in zip(self.padding, self.dilation, self.kernel_size, strict=True):
            first = d * ((k - 1) // 2)
            sizes = [p - first, p - d * (k - 1) + first, *sizes]
        return F.pad(x, sizes) if any(sizes) else x

    def mixing_cost(self, positions):
        """The dynamic branch: Q^T, Phi and P at every position, and the scale of the static one."""
        return positions * (self.q.numel() + self.rank**2 + self.p.numel() + self.out_channels)

    def convolve(self, x):
        ones = [1] * len(self.kernel_size)
        pooled = global_pool(x) if self.pool == 1 else pool_to(x, self.pool).flatten(1)
        phi, scale = self.attention(pooled)
        z = conv(self._centred(x), self.q.reshape(*self.q.shape, *ones), None, self.stride)
        size, z = z.shape[2:], self.bn1(z.flatten(2))
        z = self.bn2(phi @ z) + z
        z = conv(z.unflatten(2, size), self.p.reshape(*self.p.shape, *ones))
        y = conv(x, self.weight, self.bias, *self._geometry())
        return scaled(y, scale) + z

    def method_repr(self):
        return f"rank={self.rank}, pool={self.pool}"


class DCDConv1d(_DCDLayer, Conv1d):
    """`nn.Conv1d` as a static convolution and a dynamic residual: [B, C_in, L] -> [B, C_out, L'] (section 3).

    rank: L; by default the square root of the attention's inputs.  pool: side of the map that the attention sees.
    reduction, hidden: H over the larger of the attention's inputs and L^2, at least 4, or H itself.
    Raises ValueError for groups other than 1 and for settings that do not fit.
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
    """Convolutions without groups in blocks, but those in short cuts and the first; 1x1 ones in MobileNetV2; the
    classifier.
    """

    name = "dcd"
    layers = layer_classes("DCD", globals())
    settings = {"reduction": Setting(None, REDUCTION)}

    def default_layers(self):
        names, modules = without_short_cuts(main_layers(self.model)), dict(self.model.named_modules())
        if family_name(self.model) == "MobileNetV2":
            names = [name for name in names if hasattr(modules.get(block_of(name)), "conv_pwl")]
        chosen = {name for name in names if getattr(modules[name], "groups", 1) == 1}
        chosen |= set(heads_of(self.model, names))
        return [name for name in modules if name in chosen]

    def arguments(self, names):
        """The sizes of the released networks: pooling and rank by the kind of block, a classifier of rank 32."""
        modules, family = dict(self.model.named_modules()), family_name(self.model)
        reduction, result = self.given["reduction"], {}
        if reduction is None:
            narrow = family == "MobileNetV2" and self.model.conv_stem.out_channels < 24
            reduction = 1 / 8 if narrow else 1 / 16
        heads = heads_of(self.model, main_layers(self.model))
        for name in names:
            layer, block, own = modules[name], modules.get(block_of(name)), {}
            if name in heads:
                own = {"rank": 32, "hidden": 32}
            elif family == "MobileNetV2":
                own = inverted_bottleneck_sizes(layer.in_channels, layer.out_channels)
            elif family == "ResNet" and block is not None and not hasattr(block, "conv3"):
                own = {"pool": 2}
            result[name] = {"reduction": reduction, **own}
        return result
