"""What a network is made of: its layers that can be replaced, blocks, stem, classifiers, residual units, short cuts.

Of timm's networks and any other.  Methods ask here; nothing here knows a method.
"""

import fnmatch
import itertools
import math
import re

from timm.layers import Attention
from timm.layers import Linear as TimmLinear
from torch import nn

CONVERTIBLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# families of timm's networks that the papers' authors released dynamic ones of
FAMILIES = ("ResNet", "MobileNetV2", "ConvNeXt", "VisionTransformer")


def family_name(model):
    """The name of a timm model's family among `FAMILIES`, or "other"."""
    name = type(model).__name__
    if name == "EfficientNet" and hasattr(model, "conv_head") and not _has_squeeze(model):
        name = "MobileNetV2"
    return name if name in FAMILIES else "other"


def _has_squeeze(model):
    return any("SqueezeExcite" in type(module).__name__ for module in model.modules())


# a block of timm's networks: ResNet, MobileNetV2, ConvNeXt and MetaFormer, ViT
_BLOCK = re.compile(r"(layer\d+\.\d+|blocks\.\d+\.\d+|stages\.\d+\.blocks\.\d+|blocks\.\d+)\.")


def block_of(layer):
    """The name of the block that a layer is in, or None."""
    match = _BLOCK.match(layer)
    return match[1] if match else None


def layers_of(model):
    """Convolutions and linear layers by name, static and dynamic ones, without the parts of dynamic ones."""
    found, inside = {}, ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if is_dynamic(module):
            inside = (*inside, f"{name}.")
        elif not isinstance(module, CONVERTIBLE):
            continue
        found[name] = module
    return found


def replaceable(model):
    """Those of `layers_of` that a method may replace, or has replaced; other subclasses do something else."""
    layers = layers_of(model).items()
    return {name: module for name, module in layers if kind_of(module) in CONVERTIBLE or is_dynamic(module)}


def kind_of(module):
    """The type of a layer; timm's linear layer is PyTorch's, but for a cast under torch.jit."""
    return nn.Linear if type(module) is TimmLinear else type(module)


def kernel_shape_of(module):
    """Shape [O, I, *k] of the kernel of a static layer; of a linear one [O, I, 1]."""
    shape = tuple(module.weight.shape)
    return (*shape, 1) if isinstance(module, nn.Linear) else shape


def is_dynamic(module):
    """Whether a layer is one of a method's (see `DynamicLayer`)."""
    return getattr(module, "is_dynamic", False)


def stem_of(model):
    """The name of the layer that sees the image: the first convolution, or else the first linear layer."""
    layers = layers_of(model)
    return next((name for name, module in layers.items() if not hasattr(module, "in_features")), next(iter(layers)))


def heads_of(model, names):
    """The names of the linear layers that end a model: one, two where it is distilled, none where it ends in features.

    names: of layers in its body; a model that does not tell its classifier has one only behind all of them.
    """
    layers = layers_of(model)
    linear = [name for name, module in layers.items() if hasattr(module, "in_features")]
    if not callable(getattr(model, "get_classifier", None)):
        last = list(layers)[-1]
        return [last] if last in linear and last not in names else []
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    # of a classifier of several layers, the last one
    inner = [[name for name in linear if any(layers[name] is m for m in head.modules())] for head in heads if head]
    return [found[-1] for found in inner if found]


def without_short_cuts(names):
    """Without the convolutions in the short cuts of blocks."""
    return [name for name in names if not (block_of(name) and "downsample" in name.split("."))]


def residual_units(names):
    """Layers, in their order, by unit: those of an MLP or an attention module together, any other one alone."""
    key = lambda name: match[0] if (match := re.match(r"(?:.*\.)?(?:mlp|attn)\.", name)) else name  # noqa: E731
    return [list(unit) for _, unit in itertools.groupby(names, key)]


def is_deep(model):
    """Networks of bottlenecks and MobileNets, whose kernel representations grow by less (KR, section 4.1)."""
    return type(model).__name__.startswith(("EfficientNet", "MobileNet")) or any(
        type(module).__name__ == "Bottleneck" for module in model.modules()
    )


def has_mlps(model):
    """Whether a network's blocks have MLPs, as those of MetaFormers have."""
    return any("mlp" in name.split(".") for name in replaceable(model))


def main_layers(model):
    """What dynamic convolutions replace by default: all convolutions but the first, and the linear layers of residual
    blocks: those of MLPs and of timm's self-attention (KR, section 4.2).

    In order; the parts of attention modules such as squeeze-and-excitation are not among them.
    """
    modules = replaceable(model)
    names = [name for name in modules if "se" not in name.split(".")]
    convolutions = [name for name in names if not hasattr(modules[name], "in_features")]
    # other self-attentions may read the weights of their projections
    attentions = [name for name, module in model.named_modules() if type(module) is Attention]
    linear = {f"{name}.{part}" for name in attentions for part in ("qkv", "proj")}
    chosen = [name for name in names if name in convolutions[1:] or "mlp" in name.split(".") or name in linear]
    return chosen or names[1:-1]


def select(model, words):
    """Names of layers, in the model's order, that the words of a config's `layers` mean together.

    "all": `main_layers`; "1x1" and "3x3": those of them with one tap, and with more; "last_N_blocks": those of the
    last N blocks; "classifier"; anything else is a glob pattern of module names.  Raises ValueError for a word that
    means no layer.
    """
    every, chosen = main_layers(model), set()
    modules = dict(model.named_modules())
    taps = {name: math.prod(getattr(modules[name], "kernel_size", (1,))) for name in every}
    for word in words:
        if word == "all":
            found = every
        elif word == "classifier":
            found = heads_of(model, every)
        elif word in ("1x1", "3x3"):
            found = [name for name in every if (taps[name] == 1) == (word == "1x1")]
        elif match := re.fullmatch(r"last_(\d+)_blocks", word):
            blocks = list(dict.fromkeys(block for name in every if (block := block_of(name))))
            kept = blocks[-int(match[1]) :] if int(match[1]) else []
            found = [name for name in every if block_of(name) in kept]
        else:
            found = fnmatch.filter(list(layers_of(model)), word)
        if not found:
            raise ValueError(
                f"layers: '{word}' means no layer of this model; use all, 1x1, 3x3, last_N_blocks, classifier, or a "
                f"pattern of names such as {', '.join([*every, *modules][:3])}"
            )
        chosen.update(found)
    return [name for name in modules if name in chosen]
