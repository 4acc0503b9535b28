"""Weight excitation (WE; Quader et al., ECCV 2020): an attention to the weights modifies them.

The kernels do not depend on the input. Shapes: x is [B, C, *S], a kernel [O, I, *k] with I = C / groups.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import conv
from ..options import Option
from .layer import Conv1d, Conv2d, Conv3d, Linear, check_choice, hidden_width, reset_linear
from .method import Method, Setting, layer_classes
from .settings import REDUCTION

EXCITATIONS = ("location", "magnitude")
# the activation is infinite at 1 + MARGIN times the largest magnitude of a layer
MARGIN = 0.1


def activate(weight: Tensor) -> Tensor:
    """Magnitude-based excitation: M artanh(w / M), with M a little above the largest |w| of the layer.

    Its derivative at constant M, 1 / (1 - (w / M)^2), grows with the magnitude of the weight.
    """
    limit = (1 + MARGIN) * weight.detach().abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    return limit * torch.atanh(weight / limit)


def deactivate(weight: Tensor) -> Tensor:
    """The inverse of `activate`: the weights that it maps to these."""
    limit = weight.abs().amax().clamp_min(torch.finfo(weight.dtype).tiny) / math.atanh(1 / (1 + MARGIN))
    return limit * torch.tanh(weight / limit)


def standardised(weight: Tensor) -> Tensor:
    """Weights [O, I, *k], shifted and scaled so that the kernel of every output channel has mean 0 and variance 1."""
    centred = weight.flatten(1) - weight.flatten(1).mean(1, keepdim=True)
    return (centred / (centred.std(1, keepdim=True) + 1e-5)).view_as(weight)


class LocationExcitation(nn.Module):
    """Weights [O, I, *k] -> attention to the input channels of every output channel, [O, I].

    Squeeze-and-excitation of kernels: mean over their positions, FC to I * reduction (at least 16), ReLU, FC to I,
    sigmoid. All output channels share the FC layers.

    Args:
        channels: I.
        reduction: hidden width over I.
    """

    def __init__(
        self, channels: int, reduction: float, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction, 16)
        self.fc1 = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, channels, device=device, dtype=dtype)
        reset_linear(self)

    def forward(self, weight: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(weight.flatten(2).mean(2)))).sigmoid()


class _WELayer:
    def _setup(
        self,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bias: bool,
        *,
        excitations: Sequence[str] = EXCITATIONS,
        standardise: bool = True,
        reduction: float = 1 / 16,
    ) -> None:
        check_choice("excitation", excitations, EXCITATIONS)
        if not excitations:
            raise ValueError(f"excitations is empty; name at least one of {', '.join(EXCITATIONS)}")
        kwargs = {"device": device, "dtype": dtype}
        self.excitations = tuple(name for name in EXCITATIONS if name in excitations)
        # standardising the few weights of a depth-wise kernel would remove what distinguishes it from others
        self.standardise = standardise and self.kernel_shape[1] > 1
        located = "location" in excitations
        self.attention = LocationExcitation(self.kernel_shape[1], reduction, **kwargs) if located else None
        self._make_kernels(bias, **kwargs)

    @torch.no_grad()
    def keep_weight(self, weight: Tensor) -> None:
        """Compute what the static kernel [O, I, *k] does. Raises ValueError for a layer that standardises kernels."""
        if self.standardise:
            raise ValueError("keep_weights needs standardise false: standardising would change the static kernels")
        weight = weight.reshape(self.kernel_shape)
        if "magnitude" in self.excitations:
            weight = deactivate(weight)
        if self.attention is not None:
            weight = weight * 2
            self.attention.fc2.weight.zero_()
            self.attention.fc2.bias.zero_()
        self.weight.copy_(weight)

    def kernel(self) -> Tensor:
        """The modified weights [O, I, *k]."""
        weight = standardised(self.weight) if self.standardise else self.weight
        if self.attention is not None:
            attention = self.attention(weight)
            weight = weight * attention.reshape(*attention.shape, *[1] * len(self.kernel_size))
        if "magnitude" in self.excitations:
            weight = activate(weight)
        # this constant gives outputs the scale of inputs, as without standardising; a norm after the layer cancels it
        return weight * math.prod(self.kernel_shape[1:]) ** -0.5 if self.standardise else weight

    # the kernel is the same for all inputs, and no input is pooled
    pools = per_sample = False

    def convolve(self, x: Tensor) -> Tensor:
        return conv(x, self.kernel(), self.bias, *self._geometry())

    def constant_kernel(self) -> Tensor:
        return self.kernel()

    def method_repr(self) -> str:
        return f"excitations={'+'.join(self.excitations)}, standardise={self.standardise}"


class WEConv1d(_WELayer, Conv1d):
    """`nn.Conv1d` whose weights excite themselves: [B, C_in, L] -> [B, C_out, L'] (section 3).

    Args:
        excitations: "location" (LWE), "magnitude" (MWE), or both, which then follow each other in this order.
        standardise: first give the kernel of every output channel mean 0 and variance 1, except in depth-wise layers.
        reduction: hidden width of the location-based excitation over I.

    Raises:
        ValueError: for settings that do not fit.
    """


class WEConv2d(_WELayer, Conv2d):
    """`nn.Conv2d` whose weights excite themselves: [B, C_in, H, W] -> [B, C_out, H', W'].

    Arguments and errors as for `WEConv1d`.
    """


class WEConv3d(_WELayer, Conv3d):
    """`nn.Conv3d` whose weights excite themselves: [B, C_in, D, H, W] -> [B, C_out, D', H', W'].

    Arguments and errors as for `WEConv1d`.
    """


class WELinear(_WELayer, Linear):
    """`nn.Linear` whose weights excite themselves: [B, ..., C_in] -> [B, ..., C_out].

    Arguments and errors as for `WEConv1d`.
    """


class WEMethod(Method):
    """WE replaces all convolutions except the first, and the linear layers of MLPs and self-attention."""

    name = "we"
    layers = layer_classes("WE", globals())
    settings = {
        "excitations": Setting(
            EXCITATIONS, Option(str, None, "WE: excitations of the weights", nargs="*", choices=EXCITATIONS)
        ),
        "standardise": Setting(True, Option(bool, None, "WE: kernels with mean 0 and variance 1")),
        "reduction": Setting(1 / 16, REDUCTION),
    }
