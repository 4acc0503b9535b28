"""Weight excitation (WE; Quader et al., ECCV 2020): weights, modified by attentions to the weights themselves.

Kernels depend on no input.  Shapes: x is [B, C, *S], a kernel [O, I, *k] with I = C / groups.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..options import Option
from .layer import Conv1d, Conv2d, Conv3d, Linear, check_choice, conv, hidden_width, reset_linear
from .method import Method, Setting, layer_classes
from .settings import REDUCTION

EXCITATIONS = ("location", "magnitude")
# the largest magnitude over the one at which the activation would be infinite is 1 / (1 + MARGIN)
MARGIN = 0.1


def activate(weight):
    """Magnitude-based excitation: M artanh(w / M), with M a little above the largest |w| of the layer.

    Its derivative, 1 / (1 - (w / M)^2) at constant M, is the larger, the larger the weight.
    """
    limit = (1 + MARGIN) * weight.detach().abs().amax().clamp_min(torch.finfo(weight.dtype).tiny)
    return limit * torch.atanh(weight / limit)


def deactivate(weight):
    """The weights that `activate` turns into these."""
    limit = weight.abs().amax().clamp_min(torch.finfo(weight.dtype).tiny) / math.atanh(1 / (1 + MARGIN))
    return limit * torch.tanh(weight / limit)


def standardised(weight):
    """Mean 0 and variance 1 for the kernel of every output channel of weights [O, I, *k]."""
    centred = weight.flatten(1) - weight.flatten(1).mean(1, keepdim=True)
    return (centred / (centred.std(1, keepdim=True) + 1e-5)).view_as(weight)


class LocationExcitation(nn.Module):
    """Weights [O, I, *k] -> attention to the input channels of every output channel, [O, I].

    A squeeze-and-excitation of the kernels, averaged over their positions: FC to I * reduction, at least 16, ReLU, FC
    to I, sigmoid, the same for all output channels.
    """

    def __init__(self, channels, reduction, *, device, dtype):
        super().__init__()
        hidden = hidden_width(channels, reduction, 16)
        self.fc1 = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, channels, device=device, dtype=dtype)
        reset_linear(self)

    def forward(self, weight):
        return self.fc2(F.relu(self.fc1(weight.flatten(2).mean(2)))).sigmoid()


class _WELayer:
    def _setup(self, device, dtype, bias, *, excitations=EXCITATIONS, standardise=True, reduction=1 / 16):
        check_choice("excitation", excitations, EXCITATIONS)
        if not excitations:
            raise ValueError(f"excitations is empty; name at least one of {', '.join(EXCITATIONS)}")
        kwargs = {"device": device, "dtype": dtype}
        self.excitations = tuple(name for name in EXCITATIONS if name in excitations)
        # the few weights of a depth-wise kernel would lose what sets them apart
        self.standardise = standardise and self.kernel_shape[1] > 1
        located = "location" in excitations
        self.attention = LocationExcitation(self.kernel_shape[1], reduction, **kwargs) if located else None
        self._make_kernels(bias, **kwargs)

    @torch.no_grad()
    def keep_weight(self, weight):
        """Computes what the static kernel [O, I, *k] does.  Raises ValueError for a layer that standardises kernels."""
        if self.standardise:
            raise ValueError("keep_weights needs standardise false: static kernels have a mean and a variance")
        weight = weight.reshape(self.kernel_shape)
        if "magnitude" in self.excitations:
            weight = deactivate(weight)
        if self.attention is not None:
            weight = weight * 2
            self.attention.fc2.weight.zero_()
            self.attention.fc2.bias.zero_()
        self.weight.copy_(weight)

    def kernel(self):
        """The modified weights [O, I, *k]."""
        weight = standardised(self.weight) if self.standardise else self.weight
        if self.attention is not None:
            attention = self.attention(weight)
            weight = weight * attention.reshape(*attention.shape, *[1] * len(self.kernel_size))
        if "magnitude" in self.excitations:
            weight = activate(weight)
        # a constant, to which a norm after the layer is blind: outputs are of the scale of inputs, as without
        return weight * math.prod(self.kernel_shape[1:]) ** -0.5 if self.standardise else weight

    # kernels are made once
    pools = per_sample = False

    def convolve(self, x):
        return conv(x, self.kernel(), self.bias, *self._geometry())

    def method_repr(self):
        return f"excitations={'+'.join(self.excitations)}, standardise={self.standardise}"


class WEConv1d(_WELayer, Conv1d):
    """`nn.Conv1d` with weights that excite themselves: [B, C_in, L] -> [B, C_out, L'] (section 3).

    excitations: "location" (LWE), "magnitude" (MWE), or both, one after the other.  standardise: first give the kernel
    of every output channel mean 0 and variance 1, but for depth-wise ones.  reduction: of the location-based one.
    Raises ValueError for settings that do not fit.
    """


class WEConv2d(_WELayer, Conv2d):
    """`nn.Conv2d` with weights that excite themselves: [B, C_in, H, W] -> [B, C_out, H', W'].

    Arguments and errors as for `WEConv1d`.
    """


class WEConv3d(_WELayer, Conv3d):
    """`nn.Conv3d` with weights that excite themselves: [B, C_in, D, H, W] -> [B, C_out, D', H', W'].

    Arguments and errors as for `WEConv1d`.
    """


class WELinear(_WELayer, Linear):
    """`nn.Linear` with weights that excite themselves: [B, ..., C_in] -> [B, ..., C_out].

    Arguments and errors as for `WEConv1d`.
    """


class WEMethod(Method):
    """All convolutions but the first, and the linear layers of MLPs and self-attention."""

    name = "we"
    layers = layer_classes("WE", globals())
    settings = {
        "excitations": Setting(
            EXCITATIONS, Option(str, None, "WE: excitations of the weights", nargs="*", choices=EXCITATIONS)
        ),
        "standardise": Setting(True, Option(bool, None, "WE: kernels with mean 0 and variance 1")),
        "reduction": Setting(1 / 16, REDUCTION),
    }
