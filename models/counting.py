"""Parameters and multiply-adds of models, counted as the papers do (ODConv, section A.1).

Of one image, in evaluation mode:

- convolution: positions of the output x size of the kernel, for linear layers tokens x size of the matrix; the two
  matrix products of a self-attention, 2 x tokens^2 x width;
- attention: pooling a map, one for every input channel and position of the output (equations 3 and 4 there have one
  h w for both; means over tokens are not counted, as Kernel Representation does not count them), and its linear layers,
  with Kernel Representation also its start and its part of the classifier; for squeeze-and-excitation, CBAM and ECA
  in place of a kernel's attention also scaling the features, one for every value (CBAM: pooling and scaling twice);
- mixing: assembling the kernel of the sample (`mixing_cost` of the layers): n x |W| for n kernels of a size |W|
  (DY-Conv, CondConv), m x n x the size of a cell (KernelWarehouse), ODConv's equations 3 and 4; the gates or the
  generator of a kernel (CGC, WeightNet); the low-rank branch (DCD).  Nothing where kernels depend on no input (WE);
- norm: layer and group normalisation, five for every value, as fvcore counts and Kernel Representation's tables do.

Biases, BatchNorm, activations, sums of features, maxima and the network's own pooling are not counted.  A dynamic layer
of any method counts what its linear layers and convolutions do, even if it has no `mixing_cost` of its own.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import Attention, EcaModule, SEModule
from timm.layers.cbam import ChannelAttn, SpatialAttn
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn

from .methods.layer import DynamicLayer, Shared
from .methods.layer import Linear as DynamicLinear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# attention to features: a mean over all values, and a product with all of them
FEATURE_ATTENTIONS = (SEModule, SqueezeExcite, EcaModule, ChannelAttn, SpatialAttn)
# modules that all of their parts belong to
HOMES = (DynamicLayer, Shared, *FEATURE_ATTENTIONS)
NORMS = (nn.LayerNorm, nn.GroupNorm)
OTHERS = "(norms and others)"


@dataclass
class LayerCount:
    """Parameters of a layer, and its multiply-adds for one image."""

    name: str
    kind: str
    parameters: int = 0
    attention: int = 0
    mixing: int = 0
    convolution: int = 0
    norm: int = 0

    @property
    def multiply_adds(self):
        return self.attention + self.mixing + self.convolution + self.norm


def count_layers(model, image_size=224, channels=3):
    """A `LayerCount` for every layer that does anything, for every warehouse, and a last one for all other parameters.

    image_size: side of the image, in pixels.  The model may be on the device "meta", where counting takes no memory.
    """
    modules = dict(model.named_modules())
    counts, homes = {}, {}
    for name, module in modules.items():
        # the parts of a dynamic layer, or of an attention to features, belong to it
        home = next((homes[above] for above in _above(name) if above in homes), None)
        if home is None and isinstance(module, HOMES):
            home = homes[name] = name
        row = name if home is None else home
        counted = isinstance(module, (*HOMES, *CONVOLUTIONS, Attention))
        row = row if counted or home is not None else OTHERS
        if row != OTHERS or row not in counts:
            counts.setdefault(row, LayerCount(row, "" if row == OTHERS else type(modules[row]).__name__))
        counts[row].parameters += sum(p.numel() for p in module.parameters(recurse=False))
    counts[OTHERS] = counts.pop(OTHERS, LayerCount(OTHERS, ""))

    handles = []
    for name, module in modules.items():
        if isinstance(module, DynamicLayer):
            hook = _dynamic
        elif isinstance(module, FEATURE_ATTENTIONS):
            hook = _feature_attention
        elif isinstance(module, CONVOLUTIONS):
            hook = _static
        elif isinstance(module, Attention):
            hook = _self_attention
        elif isinstance(module, NORMS):
            hook = _norm
        else:
            continue
        home = next((homes[part] for part in (name, *_above(name)) if part in homes), None)
        inside = home is not None and home != name
        if inside and not getattr(modules[home], "per_sample", True):
            continue
        count = counts[OTHERS] if home is None and hook is _norm else counts[home or name]
        handles.append(module.register_forward_hook(partial(hook, count, inside)))
    _run(model, image_size, channels)
    for handle in handles:
        handle.remove()
    return list(counts.values())


def _above(name):
    """The names of the modules that a module is in, outermost first; the root has none of its own."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _run(model, image_size, channels):
    """One image through the model, in evaluation mode, which is then as it was."""
    training = [module for module in model.modules() if module.training]
    parameter = next(model.parameters())
    x = torch.zeros(1, channels, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for module in training:
            module.training = True


def _static(count, inside, module, inputs, y):
    out = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    cost = y.numel() // out * module.weight.numel()
    if inside:
        count.attention += cost
        return
    # with Kernel Representation a part of what the classifier sees is attention
    seen = cost // module.in_features * module.representation if hasattr(module, "representation") else 0
    count.attention += seen
    count.convolution += cost - seen


def _norm(count, inside, module, inputs, y):
    if inside:
        count.attention += 5 * y.numel()
    else:
        count.norm += 5 * y.numel()


def _dynamic(count, inside, layer, inputs, y):
    positions = y.numel() // layer.out_channels
    if layer.pools and not isinstance(layer, DynamicLinear):
        count.attention += positions * layer.in_channels
    count.mixing += layer.mixing_cost(positions)
    count.convolution += positions * math.prod(layer.kernel_shape)


def _feature_attention(count, inside, module, inputs, y):
    count.attention += 2 * inputs[0].numel()


def _self_attention(count, inside, module, inputs, y):
    count.convolution += 2 * inputs[0].shape[1] ** 2 * module.num_heads * module.head_dim
