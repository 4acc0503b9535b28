"""Counts the parameters and multiply-adds of models as the papers do (ODConv, section A.1).

Multiply-adds are those of one image in evaluation mode, in four parts:

- convolution: positions of the output x size of the kernel (transposed: positions of the input); for linear layers
  tokens x size of the matrix; for the two matrix products of a self-attention 2 x tokens^2 x width.
- attention: pooling a map, with one multiply-add for every input channel and position of the output (ODConv's equations
  3 and 4 have one h w for input and output; means over tokens are not counted, since Kernel Representation does not
  count them), and the attention's linear layers. For Kernel Representation also its start and its part of the
  classifier. For squeeze-and-excitation, CBAM and ECA, which attend to features instead of kernels, also scaling the
  features, with one multiply-add for every value (CBAM: pooling and scaling twice).
- mixing: assembling the kernel of the sample (`mixing_cost` of the layers): n x |W| for n kernels of size |W| (DY-Conv,
  CondConv), m x n x the size of a cell (KernelWarehouse), ODConv's equations 3 and 4, the gates or the generator of a
  kernel (CGC, WeightNet), the low-rank branch (DCD). Nothing where kernels do not depend on the input (WE).
- norm: layer and group normalisation, with five multiply-adds for every value, as in fvcore and in Kernel
  Representation's tables.

Biases, BatchNorm, activations, sums of features, maxima and the network's own pooling are not counted. The linear
layers and convolutions inside a dynamic layer are counted for every method, even if it has no `mixing_cost` of its own.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import Attention, EcaModule, SEModule
from timm.layers.cbam import ChannelAttn, SpatialAttn
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from .methods.layer import DynamicLayer, Shared
from .methods.layer import Linear as DynamicLinear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# attention to features: takes a mean over all values, and multiplies all of them
FEATURE_ATTENTIONS = (SEModule, SqueezeExcite, EcaModule, ChannelAttn, SpatialAttn)
# modules whose parts are counted as their own
HOMES = (DynamicLayer, Shared, *FEATURE_ATTENTIONS)
NORMS = (nn.LayerNorm, nn.GroupNorm)
OTHERS = "(norms and others)"


@dataclass
class LayerCount:
    """Parameters of a layer, and its multiply-adds for one image.

    Args:
        name: of the layer, or `OTHERS`.
        kind: class of the layer; empty for `OTHERS`.
        parameters: number of its own parameters.
        attention, mixing, convolution, norm: multiply-adds by kind (see the top of this file).
    """

    name: str
    kind: str
    parameters: int = 0
    attention: int = 0
    mixing: int = 0
    convolution: int = 0
    norm: int = 0

    @property
    def multiply_adds(self) -> int:
        return self.attention + self.mixing + self.convolution + self.norm


def count_layers(
    model: nn.Module, image_size: int = 224, channels: int = 3, shape: tuple[int, ...] | None = None
) -> list[LayerCount]:
    """Count the parameters and multiply-adds of a model, layer by layer.

    Args:
        model: may be on the device "meta", where counting takes no memory.
        image_size: side of the image, in pixels.
        channels: of the image.
        shape: of the input, without the batch, if it is not a square image.

    Returns:
        A `LayerCount` for every layer that is counted and for every warehouse, and at the end one for everything else.
    """
    modules = dict(model.named_modules())
    counts, homes = {}, {}
    for name, module in modules.items():
        # the parts of a dynamic layer, or of an attention to features, are counted as its own
        home = next((homes[above] for above in _above(name) if above in homes), None)
        if home is None and isinstance(module, HOMES):
            home = homes[name] = name
        row = name if home is None else home
        counted = isinstance(module, (*HOMES, *CONVOLUTIONS, *TRANSPOSED, Attention, nn.MultiheadAttention))
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
        elif isinstance(module, TRANSPOSED):
            hook = _transposed
        elif isinstance(module, nn.MultiheadAttention):
            hook = _multihead_attention
        elif isinstance(module, NORMS):
            hook = _norm
        else:
            continue
        home = next((homes[part] for part in (name, *_above(name)) if part in homes), None)
        inside = home is not None and home != name
        if inside and not getattr(modules[home], "per_sample", True):
            continue
        count = counts[OTHERS] if home is None and hook is _norm else counts[home or name]
        with_kwargs = hook is _multihead_attention
        handles.append(module.register_forward_hook(partial(hook, count, inside), with_kwargs=with_kwargs))
    _run(model, shape or (channels, image_size, image_size))
    for handle in handles:
        handle.remove()
    return list(counts.values())


def _above(name: str) -> list[str]:
    """The names of the modules that contain a module, outermost first, without the root, which has no name."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _run(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Run the model on one input in evaluation mode; its modules then return to their own modes."""
    training = [module for module in model.modules() if module.training]
    parameter = next(model.parameters())
    x = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for module in training:
            module.training = True


def _static(count: LayerCount, inside: bool, module: nn.Module, inputs: tuple, y: Tensor) -> None:
    out = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    cost = y.numel() // out * module.weight.numel()
    if inside:
        count.attention += cost
        return
    # in Kernel Representation the classifier also sees the representation, which is counted as attention
    seen = cost // module.in_features * module.representation if hasattr(module, "representation") else 0
    count.attention += seen
    count.convolution += cost - seen


def _norm(count: LayerCount, inside: bool, module: nn.Module, inputs: tuple, y: Tensor) -> None:
    if inside:
        count.attention += 5 * y.numel()
    else:
        count.norm += 5 * y.numel()


def _dynamic(count: LayerCount, inside: bool, layer: DynamicLayer, inputs: tuple, y: Tensor) -> None:
    positions = y.numel() // layer.out_channels
    if layer.pools and not isinstance(layer, DynamicLinear):
        count.attention += positions * layer.in_channels
    count.mixing += layer.mixing_cost(positions)
    count.convolution += positions * math.prod(layer.kernel_shape)


def _feature_attention(count: LayerCount, inside: bool, module: nn.Module, inputs: tuple, y: Tensor) -> None:
    count.attention += 2 * inputs[0].numel()


def _self_attention(count: LayerCount, inside: bool, module: Attention, inputs: tuple, y: Tensor) -> None:
    count.convolution += 2 * inputs[0].shape[1] ** 2 * module.num_heads * module.head_dim


def _transposed(count: LayerCount, inside: bool, module: nn.Module, inputs: tuple, y: Tensor) -> None:
    count.convolution += inputs[0].numel() // module.in_channels * module.weight.numel()


def _multihead_attention(
    count: LayerCount, inside: bool, module: nn.MultiheadAttention, inputs: tuple, kwargs: dict, y: tuple
) -> None:
    """PyTorch's attention, which reads the weights of its projections instead of calling modules."""
    query, key, value = (
        inputs[i] if i < len(inputs) else kwargs[name] for i, name in enumerate(("query", "key", "value"))
    )
    width = module.embed_dim
    tokens, seen = (tensor.numel() // tensor.shape[-1] for tensor in (query, key))
    projections = 2 * tokens * width + seen * (key.shape[-1] + value.shape[-1])
    count.convolution += projections * width + 2 * tokens * seen * width
