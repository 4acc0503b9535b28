"""Kernel Representation (KR; Zhou and Ng, "Kernel Representation for Dynamic Networks").

Layers tell the next ones which kernels they took.

A vector d, the kernel representation, travels beside the features.  A unit (a convolution, or the layers of an MLP or a
self-attention together) predicts its kernels from its input and from d, and appends to d what it predicted; the
classifier sees the last d.  The first one comes from the image.

What the text says, and what the costs in its tables say (no code was released; tests/test_summarize.py compares them):

- Layers and units: the text.  "Most parameterized layers ... except for the first" (section 3.3) and "two linear layers
  in each residual block" of a vision transformer (4.2), so that its self-attention, with query, key and value in one
  matrix, and its MLP are a unit each ("each residual block as one parameterized unit", 4.1; 2 x 32 = 64 dimensions "for
  every Transformer block", Table 7).
- The hidden width (D_i + C) r: the text calls r "the ratio between the dimensions of input to output channels for the
  linear layer before kernel generator" (4.4), and its input is d_i and h; the costs confirm it.  `fusion_width="input"`
  is the other reading, C r.  r is 1/8 in MetaFormers (Table 7); the costs in Table 5 speak for ODConv's 1/16 in
  convolutional networks.
- The coefficients: the costs alone.  Equation 1 has a scalar for every kernel (`attentions=["kernel"]`).  In
  MetaFormers the costs fit a coefficient of every kernel for every output channel, `attentions=["filter"]` without
  `attention_sharing`; in convolutional networks all four attentions of ODConv, whose costs Tables 4 and 5 exceed by
  those of this path.
- What the generator encodes: the costs alone.  They leave no room for a linear layer of that many coefficients, so that
  those of channels are averaged first, which leaves what equation 1 has: a number for every kernel.
- The functions: neither.  Coefficients are ODConv's, a sigmoid, and a softmax over kernels.  There is no temperature.

Shapes: x is [B, C, *S], h the mean of a unit's input [B, C], d_i its representation [B, D_i], H the hidden width, A the
number of coefficients that a unit's generator encodes.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..layer import AttentionNorm, Conv1d, Conv2d, Conv3d, Linear, Shared, check_choice, global_pool, hidden_width
from ..odconv import ATTENTIONS, ODHeads, _ODLayer
from ..relay import Relay

# section 3.3: components per colour channel and direction, and the size of d_0
FREQUENCIES, START_SIZE = 8, 64
# a floor for narrow layers; the paper's networks are wider
LEAST_WIDTH = 8
FUSION_WIDTHS = ("both", "input")


class Step(NamedTuple):
    """What a layer hands to the next one: d_i, and what the generator of the unit makes d_{i+1} from."""

    given: torch.Tensor | None = None
    fused: torch.Tensor | None = None
    coefficients: tuple = ()
    generator: nn.Module | None = None

    def representation(self):
        """The newest representation; it is made when it is asked for, so that nobody computes what nobody reads."""
        return self.given if self.generator is None else self.generator(self)


class Fusion(nn.Module):
    """Equation 4: h [B, C] and d [B, given] (None where given is 0) -> h~ [B, H]."""

    def __init__(self, given, in_channels, hidden, **kwargs):
        super().__init__()
        self.given = given
        self.fuse = nn.Linear(given + in_channels, hidden, **kwargs)

    def forward(self, pooled, representation):
        return self.fuse(pooled if representation is None else torch.cat([representation, pooled], dim=1))


def encoded_sizes(heads):
    """Numbers that `encoded` gives of every attention of `ODHeads`."""
    sizes = {name: getattr(heads, f"{name}_fc").out_features for name in heads.names}
    return {name: heads.sets if name in ("channel", "filter") else size for name, size in sizes.items()}


def encoded(attentions):
    """The attentions of a layer [B, A], those along channels averaged over them."""
    parts = [a.mean(2) if name in ("channel", "filter") else a.flatten(1) for name, a in attentions.items()]
    return torch.cat(parts, dim=1)


class RepresentationGenerator(nn.Module):
    """Equations 6 and 7, with BatchNorm: d_i, h~ and the coefficients of a unit -> d_{i+1} [B, D_i + size].

    norm False leaves out BatchNorm (Table 6).
    """

    def __init__(self, given, coefficients, hidden, size, norm=True, **kwargs):
        super().__init__()
        self.out_features = given + size
        # what follows takes a constant off (BatchNorm), or adds one itself
        self.encode = nn.Linear(coefficients, size, bias=False, **kwargs)
        self.project = nn.Linear(hidden + size, size, bias=not norm, **kwargs)
        self.norm = AttentionNorm(size, **kwargs) if norm else nn.Identity()

    def forward(self, step):
        embedding = self.encode(torch.cat(step.coefficients, dim=1))
        new = self.norm(self.project(torch.cat([step.fused, embedding], dim=1)))
        return torch.cat([step.given, new], dim=1)


def unit_parts(
    geometries,
    kernel_num,
    *,
    reduction=1 / 8,
    fusion_width="both",
    attentions=ATTENTIONS,
    attention_sharing=True,
    given=0,
    generated=0,
    norm=True,
    device=None,
    dtype=None,
):
    """The modules of a unit, one dict for every layer of it: fusion (the first's), attention, generator (the last's).

    geometries: (C_in, C_out, taps, groups) of the layers, in their order.  given: D_i; generated: what the unit
    appends; 0 for none.  fusion_width: the hidden width is (D_i + C_in) reduction, or with "input" C_in reduction.
    Raises ValueError for settings that do not fit.
    """
    if kernel_num < 1:
        raise ValueError(f"kernel_num {kernel_num} is below 1")
    check_choice("fusion_width", [fusion_width], FUSION_WIDTHS)
    kwargs = {"device": device, "dtype": dtype}
    in_channels = geometries[0][0]
    hidden = hidden_width(in_channels + (given if fusion_width == "both" else 0), reduction, LEAST_WIDTH)
    # coefficients of every output channel are the only ones that a depth-wise kernel may have
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
    # no schedule: `set_temperature` of a model passes these layers by
    set_temperature = temperatures = None

    def _make_attention(self, *, parts=None, relay=None, layer="", **settings):
        if parts is None:
            geometry = self.in_channels, self.out_channels, self.taps, self.groups
            parts = unit_parts([geometry], self.kernel_num, **settings)[0]
        self.layer = layer
        object.__setattr__(self, "_relay", relay or Relay([layer]))
        self.fusion, self.generator = parts["fusion"], parts["generator"]
        return parts["attention"]

    @property
    def pools(self):
        """Whether this layer pools its input, as the first one of a unit does."""
        return self.fusion is not None

    def convolve(self, x):
        if self.fusion is not None and not self.fusion.given:
            self._relay.start(Step())
        step = self._relay.take(self.layer)
        if self.fusion is not None:
            given = step.representation()
            step = Step(given, self.fusion(global_pool(x), given))
        # equation 5: with the linear layer of the fusion a perceptron of one hidden layer
        attentions = self.attention(F.relu(step.fused))
        coefficients = (*step.coefficients, encoded(attentions)) if attentions else step.coefficients
        self._relay.hand_on(step._replace(coefficients=coefficients, generator=self.generator))
        return self.modulated(x, attentions)


class KRConv1d(_KRLayer, Conv1d):
    """`nn.Conv1d` with kernels that depend on a kernel representation: [B, C_in, L] -> [B, C_out, L'].

    kernel_num: K kernels; reduction and fusion_width: of `unit_parts`; attentions and attention_sharing: of `ODHeads`.
    parts, relay, layer: this layer's part of its unit (`unit_parts`), the layers that pass the representation on, and
    this one's name among them.  Without them the layer is a unit of its own, that sees its input only.
    Raises ValueError for settings that do not fit, and RuntimeError in a forward pass that calls it out of order.
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

    representation: size of the last d; relay, layer: where it comes from, and this layer's name there.
    Raises RuntimeError in a forward pass in which the layers before did not run.
    """

    is_dynamic = True

    def __init__(self, in_features, out_features, bias=True, *, representation, relay, layer, device=None, dtype=None):
        super().__init__(in_features + representation, out_features, bias, device=device, dtype=dtype)
        self.layer, self.representation = layer, representation
        object.__setattr__(self, "_relay", relay)

    @torch.no_grad()
    def keep_weight(self, weight):
        """Compute what a static classifier [C_out, C_in] does, whatever the representation is."""
        self.weight.zero_()[:, : weight.shape[1]].copy_(weight)

    def forward(self, x):
        step = self._relay.take(self.layer)
        self._relay.hand_on(step)
        d = step.representation()
        d = d.reshape(len(d), *[1] * (x.ndim - 2), d.shape[-1]).expand(*x.shape[:-1], -1)
        return super().forward(torch.cat([x, d], dim=-1))


def _waves(size, first, like):
    """Cosines, then sines, of 8 frequencies from `first` on, at `size` positions: [16, size]."""
    index = torch.arange(first, first + FREQUENCIES, device=like.device)
    # whole turns are taken off while the numbers are whole
    turns = index.unsqueeze(1) * torch.arange(size, device=like.device) % size
    angle = turns.to(like.dtype) * (2 * math.pi / size)
    return torch.cat([angle.cos(), angle.sin()])


def low_frequencies(image):
    """Magnitudes of the 8x8 lowest components of the discrete Fourier transform of images (section 3.3).

    [B, C, H, W] -> [B, 64 C], channel by channel: frequencies -4 to 3 vertically and, in each, 0 to 7 horizontally
    (those left out of a real image's spectrum are conjugates), over H W.  Computed in float32 at least, as products
    with two small matrices.
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
    # the gradient of this norm is 0 where it is 0, that of a square root is not finite
    return torch.linalg.vector_norm(torch.stack([cc - ss, cs + sc]), dim=0).flatten(1)


class FrequencyStart(nn.Linear):
    """d_0 of images [B, C, H, W]: [B, 64], a linear layer of `low_frequencies` (section 3.3).  channels: C."""

    def __init__(self, channels, **kwargs):
        super().__init__(FREQUENCIES**2 * channels, START_SIZE, **kwargs)

    def forward(self, image):
        return super().forward(low_frequencies(image).to(self.weight.dtype))


class LearnedStart(nn.Module):
    """A learned d_0 that is the same for all inputs [B, ...]: [B, 64] (Table 6)."""

    def __init__(self, channels=None, *, device=None, dtype=None):
        super().__init__()
        self.vector = nn.Parameter(torch.randn(START_SIZE, device=device, dtype=dtype))

    def forward(self, image):
        return self.vector.expand(len(image), -1)


STARTS = {"frequency": FrequencyStart, "learned": LearnedStart}


class KernelRepresentation(Shared):
    """Starts every forward pass of a model, at whose root it stands, with d_0.

    relay: of the model's layers; channels: of its images; start: "frequency" or "learned".
    """

    def __init__(self, relay, channels, start="frequency", **kwargs):
        super().__init__()
        object.__setattr__(self, "_relay", relay)
        self.start = STARTS[start](channels, **kwargs)
        self.handles = ()

    def forward(self, x):
        # at the end of an nn.Sequential it is called
        return x

    def attach(self, model, stem, last):
        """Start at the input of a layer, the first that sees the image, and forget all when the model is through.

        last: the last layer before the classifier; where that is called by itself, nobody will ask for more.
        """
        # the hooks are methods, so that those of a copy are the copy's; the handles keep their numbers from being
        # given to others, once a model is unpickled
        self.handles = (
            model.register_forward_pre_hook(self._enter, prepend=True),
            stem.register_forward_pre_hook(self._begin),
            last.register_forward_hook(self._end_of_features),
            model.register_forward_hook(self._leave, always_call=True),
        )
        for name in ("forward_features", "forward_head"):
            if hasattr(type(model), name):
                setattr(model, name, _Half(model, name))

    def _enter(self, model, inputs):
        self._relay.enter()

    def _begin(self, stem, inputs):
        self._relay.start(Step(self.start(inputs[0])))

    def _end_of_features(self, last, inputs, output):
        if not self._relay.outer:
            self._relay.clear()

    def _leave(self, model, inputs, output):
        self._relay.leave()


class _Half:
    """timm's `forward_features` or `forward_head` of a model.

    Called alone, the first one's features carry the representation that the second one's classifier asks for.
    """

    def __init__(self, model, name):
        self.model, self.name = model, name

    def __call__(self, x, *args, **kwargs):
        call = functools.partial(getattr(type(self.model), self.name), self.model, x, *args, **kwargs)
        relay, features = self.model.kernel_representation._relay, self.name == "forward_features"
        carried = getattr(x, "kernel_representation", None)
        # the model's own call, in a pass that has begun, or has come from its features
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
