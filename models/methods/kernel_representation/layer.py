"""Kernel Representation (KR; Zhou and Ng, "Kernel Representation for Dynamic Networks").

A vector d, the kernel representation, travels beside the features and tells layers which kernels the earlier ones used.
A unit (a convolution, or the layers of an MLP or a self-attention together) predicts its kernels from its input and d,
and appends to d an encoding of what it predicted. The first d comes from the image; the classifier sees the last.

No code was released. Some points follow from the text, others from the costs in its tables (which
tests/test_summarize.py checks):

- Layers and units: the text. "Most parameterized layers ... except for the first" (section 3.3) and "two linear layers
  in each residual block" of a vision transformer (4.2). Its self-attention, with query, key and value in one matrix,
  and its MLP are therefore a unit each ("each residual block as one parameterized unit", 4.1; 2 x 32 = 64 dimensions
  "for every Transformer block", Table 7).
- The hidden width (D_i + C) r: the text, and the costs confirm it. r is "the ratio between the dimensions of input to
  output channels for the linear layer before kernel generator" (4.4), whose input is d_i and h. `fusion_width="input"`
  is the other reading, C r. r is 1/8 in MetaFormers (Table 7); in convolutional networks, Table 5 fits ODConv's 1/16.
- The coefficients: the costs alone. Equation 1 has a scalar for every kernel (`attentions=["kernel"]`). In MetaFormers
  the costs fit a coefficient for every kernel and output channel, `attentions=["filter"]` without `attention_sharing`.
  In convolutional networks they fit ODConv's four attentions: Tables 4 and 5 list ODConv's costs plus those of KR.
- What the generator encodes: the costs alone. They leave no room for a linear layer over so many coefficients, so those
  of channels are averaged first. What remains is a number for every kernel, as in equation 1.
- The functions: neither. They are ODConv's: a sigmoid, and a softmax over kernels. There is no temperature.

Shapes: x is [B, C, *S], h the mean of a unit's input [B, C], d_i its representation [B, D_i], H the hidden width, A the
number of coefficients that a unit's generator encodes.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layer import AttentionNorm, Conv1d, Conv2d, Conv3d, Linear, Shared, check_choice, global_pool, hidden_width
from ..odconv import ATTENTIONS, ODHeads, _ODLayer
from ..relay import Relay

# section 3.3: components per colour channel and direction, and the size of d_0
FREQUENCIES, START_SIZE = 8, 64
# smallest hidden width, for narrow layers; those of the paper's networks are wider
LEAST_WIDTH = 8
FUSION_WIDTHS = ("both", "input")


class Step(NamedTuple):
    """What a layer hands to the next one: d_i, and what the unit's generator computes d_{i+1} from."""

    given: Tensor | None = None
    fused: Tensor | None = None
    coefficients: tuple[Tensor, ...] = ()
    generator: nn.Module | None = None

    def representation(self) -> Tensor | None:
        """The newest representation, computed only when a layer reads it."""
        return self.given if self.generator is None else self.generator(self)


class Fusion(nn.Module):
    """Equation 4: h [B, C] and d [B, given] -> h~ [B, H]; d is None if given is 0."""

    def __init__(self, given: int, in_channels: int, hidden: int, **kwargs: Any) -> None:
        super().__init__()
        self.given = given
        self.fuse = nn.Linear(given + in_channels, hidden, **kwargs)

    def forward(self, pooled: Tensor, representation: Tensor | None) -> Tensor:
        return self.fuse(pooled if representation is None else torch.cat([representation, pooled], dim=1))


def encoded_sizes(heads: ODHeads) -> dict[str, int]:
    """Name of an attention -> how many numbers `encoded` makes of it."""
    sizes = {name: getattr(heads, f"{name}_fc").out_features for name in heads.names}
    return {name: heads.sets if name in ("channel", "filter") else size for name, size in sizes.items()}


def encoded(attentions: dict[str, Tensor]) -> Tensor:
    """The attentions of a layer as vectors [B, A]; those of channels and filters are averaged over them."""
    parts = [a.mean(2) if name in ("channel", "filter") else a.flatten(1) for name, a in attentions.items()]
    return torch.cat(parts, dim=1)


class RepresentationGenerator(nn.Module):
    """Equations 6 and 7, with BatchNorm: d_i, h~ and the coefficients of a unit -> d_{i+1} [B, D_i + size].

    Args:
        given, coefficients, hidden: D_i, A and H.
        size: number of values that it appends.
        norm: whether to use BatchNorm (Table 6).
    """

    def __init__(self, given: int, coefficients: int, hidden: int, size: int, norm: bool = True, **kwargs: Any) -> None:
        super().__init__()
        self.out_features = given + size
        # this layer needs no bias: BatchNorm would remove it, and without BatchNorm `project` has one
        self.encode = nn.Linear(coefficients, size, bias=False, **kwargs)
        self.project = nn.Linear(hidden + size, size, bias=not norm, **kwargs)
        self.norm = AttentionNorm(size, **kwargs) if norm else nn.Identity()

    def forward(self, step: Step) -> Tensor:
        embedding = self.encode(torch.cat(step.coefficients, dim=1))
        new = self.norm(self.project(torch.cat([step.fused, embedding], dim=1)))
        return torch.cat([step.given, new], dim=1)


def unit_parts(
    geometries: Sequence[tuple[int, int, int, int]],
    kernel_num: int,
    *,
    reduction: float = 1 / 8,
    fusion_width: str = "both",
    attentions: Sequence[str] = ATTENTIONS,
    attention_sharing: bool = True,
    given: int = 0,
    generated: int = 0,
    norm: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[dict[str, nn.Module | None]]:
    """The modules of a unit, a dict for each layer: "fusion" (of the first), "attention", "generator" (of the last).

    Args:
        geometries: (C_in, C_out, taps, groups) of the layers, in their order.
        kernel_num: K.
        reduction: hidden width over D_i + C_in.
        fusion_width: "both", or "input" for a hidden width of C_in * reduction.
        attentions, attention_sharing: as for `ODHeads`.
        given, generated: D_i, and the number of values that the unit appends; 0: none.
        norm: of the generator.

    Raises:
        ValueError: for settings that do not fit.
    """
    if kernel_num < 1:
        raise ValueError(f"kernel_num {kernel_num} is below 1")
    check_choice("fusion_width", [fusion_width], FUSION_WIDTHS)
    kwargs = {"device": device, "dtype": dtype}
    in_channels = geometries[0][0]
    hidden = hidden_width(in_channels + (given if fusion_width == "both" else 0), reduction, LEAST_WIDTH)
    # without sharing, filter attentions may be the only coefficients, so depth-wise kernels keep them
    settings = {"attention_sharing": attention_sharing, "depthwise_filter": not attention_sharing, **kwargs}
    heads = [ODHeads(hidden, *geometry, kernel_num, attentions=attentions, **settings) for geometry in geometries]
    count = sum(sum(encoded_sizes(part).values()) for part in heads)
    if not count:
        raise ValueError(
            f"kernel_num {kernel_num} and attentions {', '.join(attentions)} leave no attention to predict; take more "
            "kernels or attentions, or leave the layer out of `layers`"
        )
    parts = [{"fusion": None, "attention": part, "generator": None} for part in heads]
    parts[0]["fusion"] = Fusion(given, in_channels, hidden, **kwargs)
    if generated:
        parts[-1]["generator"] = RepresentationGenerator(given, count, hidden, generated, norm, **kwargs)
    return parts


class _KRLayer(_ODLayer):
    # without a schedule, so that `set_temperature` of a model skips these layers
    set_temperature = temperatures = None

    def _make_attention(self, *, parts=None, relay: Relay | None = None, layer: str = "", **settings: Any) -> ODHeads:
        if parts is None:
            geometry = self.in_channels, self.out_channels, self.taps, self.groups
            parts = unit_parts([geometry], self.kernel_num, **settings)[0]
        self.layer = layer
        object.__setattr__(self, "_relay", relay or Relay([layer]))
        self.fusion, self.generator = parts["fusion"], parts["generator"]
        return parts["attention"]

    @property
    def pools(self) -> bool:
        """Whether this layer pools its input; only the first one of a unit does."""
        return self.fusion is not None

    def convolve(self, x: Tensor) -> Tensor:
        if self.fusion is not None and not self.fusion.given:
            self._relay.start(Step())
        step = self._relay.take(self.layer)
        if self.fusion is not None:
            given = step.representation()
            step = Step(given, self.fusion(global_pool(x), given))
        # equation 5: a perceptron with one hidden layer, whose first linear layer is that of the fusion
        attentions = self.attention(F.relu(step.fused))
        coefficients = (*step.coefficients, encoded(attentions)) if attentions else step.coefficients
        self._relay.hand_on(step._replace(coefficients=coefficients, generator=self.generator))
        return self.modulated(x, attentions)


class KRConv1d(_KRLayer, Conv1d):
    """`nn.Conv1d` with kernels that depend on a kernel representation: [B, C_in, L] -> [B, C_out, L'].

    Args:
        kernel_num: K.
        reduction, fusion_width, attentions, attention_sharing: as for `unit_parts`.
        parts: this layer's dict of `unit_parts`; None: the layer is a unit of its own and sees its input only.
        relay, layer: what hands the representation from layer to layer, and the name of this one in it.

    Raises:
        ValueError: for settings that do not fit.
        RuntimeError: in a forward pass that calls the layer out of order.
    """


class KRConv2d(_KRLayer, Conv2d):
    """`nn.Conv2d` with kernels that depend on a kernel representation: [B, C_in, H, W] -> [B, C_out, H', W'].

    Arguments and errors as for `KRConv1d`.
    """


class KRConv3d(_KRLayer, Conv3d):
    """`nn.Conv3d` with kernels that depend on a kernel representation: [B, C_in, D, H, W] -> [B, C_out, D', H', W'].

    Arguments and errors as for `KRConv1d`.
    """


class KRLinear(_KRLayer, Linear):
    """`nn.Linear` with weights that depend on a kernel representation: [B, ..., C_in] -> [B, ..., C_out].

    Arguments and errors as for `KRConv1d`.
    """


class KRClassifier(nn.Linear):
    """A linear layer of the feature and the last representation (section 3.3): [B, ..., C_in] -> [B, ..., C_out].

    Args:
        representation: size of the last d.
        relay, layer: what hands over the last d, and the name of this layer in it.

    Raises:
        RuntimeError: in a forward pass in which the layers before did not run.
    """

    is_dynamic = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        representation: int,
        relay: Relay,
        layer: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features + representation, out_features, bias, device=device, dtype=dtype)
        self.layer, self.representation = layer, representation
        object.__setattr__(self, "_relay", relay)

    @torch.no_grad()
    def keep_weight(self, weight: Tensor) -> None:
        """Compute what the static classifier [C_out, C_in] does: the weights of the representation start at 0."""
        self.weight.zero_()[:, : weight.shape[1]].copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        step = self._relay.take(self.layer)
        self._relay.hand_on(step)
        d = step.representation()
        d = d.reshape(d.shape[0], *[1] * (x.ndim - 2), d.shape[-1]).expand(*x.shape[:-1], -1)
        return super().forward(torch.cat([x, d], dim=-1))


def _waves(size: int, first: int, like: Tensor) -> Tensor:
    """Cosines, then sines, of 8 frequencies from `first` on, at `size` positions: [16, size]."""
    index = torch.arange(first, first + FREQUENCIES, device=like.device)
    # The modulo removes whole turns while the numbers are still integers. Its divisor is a tensor, since ONNX exporters
    # take no number for it that depends on the input's size.
    whole = torch.full((), size, dtype=index.dtype, device=like.device)
    turns = index.unsqueeze(1) * torch.arange(size, device=like.device) % whole
    angle = turns.to(like.dtype) * (2 * math.pi / size)
    return torch.cat([angle.cos(), angle.sin()])


def low_frequencies(image: Tensor) -> Tensor:
    """Magnitudes of the 8x8 lowest components of the discrete Fourier transform of images (section 3.3).

    [B, C, H, W] -> [B, 64 C], divided by H W: for each channel the vertical frequencies -4 to 3, and for each of these
    the horizontal ones 0 to 7 (negative ones add only conjugates). Computed in float32 or wider, by two small matrices.
    """
    x = image.to(torch.promote_types(image.dtype, torch.float32))
    height, width = x.shape[-2:]
    rows, columns = _waves(height, -FREQUENCIES // 2, x), _waves(width, 0, x)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            sums = rows @ (x @ columns.T)
    else:
        sums = rows @ (x @ columns.T)
    (cc, cs), (sc, ss) = (half.chunk(2, dim=-1) for half in (sums / (height * width)).chunk(2, dim=-2))
    # at 0 the gradient of this norm is 0, that of a square root would not be finite
    return torch.linalg.vector_norm(torch.stack([cc - ss, cs + sc]), dim=0).flatten(1)


class FrequencyStart(nn.Linear):
    """d_0 [B, 64] of images [B, C, H, W]: a linear layer of `low_frequencies` (section 3.3)."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(FREQUENCIES**2 * channels, START_SIZE, **kwargs)

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(low_frequencies(image).to(self.weight.dtype))


class LearnedStart(nn.Module):
    """A learned d_0 [B, 64] that is the same for all inputs [B, ...] (Table 6)."""

    def __init__(
        self, channels: int | None = None, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(START_SIZE, device=device, dtype=dtype))

    def forward(self, image: Tensor) -> Tensor:
        return self.vector.expand(image.shape[0], -1)


STARTS = {"frequency": FrequencyStart, "learned": LearnedStart}


class KernelRepresentation(Shared):
    """Starts every forward pass of a model with d_0; it is a child of the model's root.

    Args:
        relay, channels: of the model's layers, and of its images.
        start: "frequency" or "learned".
    """

    def __init__(self, relay: Relay, channels: int | None, start: str = "frequency", **kwargs: Any) -> None:
        super().__init__()
        object.__setattr__(self, "_relay", relay)
        self.start = STARTS[start](channels, **kwargs)
        self.handles = ()

    def forward(self, x: Tensor) -> Tensor:
        # an nn.Sequential at the root calls this, its last child
        return x

    def attach(self, model: nn.Module, stem: nn.Module, last: nn.Module) -> None:
        """Register the hooks that start the representation in a forward pass, and drop it at the end.

        Args:
            stem: the first layer that sees the image; d_0 comes from its input.
            last: the last layer before the classifier; a pass outside of the model's `forward` ends there.
        """
        # the hooks are bound methods, so that a copy of the model calls those of the copy; an unpickled model does not
        # reuse the numbers of handles that are kept
        self.handles = (
            model.register_forward_pre_hook(self._enter, prepend=True),
            stem.register_forward_pre_hook(self._begin),
            last.register_forward_hook(self._end_of_features),
            model.register_forward_hook(self._leave, always_call=True),
        )
        for name in ("forward_features", "forward_head"):
            if hasattr(type(model), name):
                setattr(model, name, _Half(model, name))

    def _enter(self, model: nn.Module, inputs: tuple) -> None:
        self._relay.enter()

    def _begin(self, stem: nn.Module, inputs: tuple) -> None:
        self._relay.start(Step(self.start(inputs[0])))

    def _end_of_features(self, last: nn.Module, inputs: tuple, output: Tensor) -> None:
        if not self._relay.outer:
            self._relay.clear()

    def _leave(self, model: nn.Module, inputs: tuple, output: Any) -> None:
        self._relay.leave()


class _Half:
    """timm's `forward_features` or `forward_head` of a model.

    If they are called by themselves, the features carry the representation from the first to the second.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = functools.partial(getattr(type(self.model), self.name), self.model, x, *args, **kwargs)
        relay, features = self.model.kernel_representation._relay, self.name == "forward_features"
        carried = getattr(x, "kernel_representation", None)
        # a call by the model's own forward: of the features before d_0 is there, or of the head after the features
        if relay.outer and carried is None and features == (relay.value is None):
            return call()
        relay.enter()
        try:
            if carried is not None:
                relay.value, relay.position = carried
            result = call()
            if features and relay.value is not None:
                result.kernel_representation = relay.value, relay.position
            return result
        finally:
            relay.leave()
