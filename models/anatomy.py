"""The parts of a network: its replaceable layers, blocks, stem, classifiers, residual units and short cuts.

The functions work on timm's networks and on any other. Methods call them; none of them depends on a method.
"""

import fnmatch
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable

from torch import nn

CONVERTIBLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# families of timm's networks of which the papers' authors released dynamic versions
FAMILIES = ("ResNet", "MobileNetV2", "ConvNeXt", "VisionTransformer")


def family_name(model: nn.Module) -> str:
    """The family of a model, by the layers of its blocks: one of `FAMILIES`, or "other"."""
    kinds = (_is_resnet, _is_mobilenetv2, _is_convnext, _is_vision_transformer)
    return next((family for family, matches in zip(FAMILIES, kinds, strict=True) if matches(model)), "other")


def _is_resnet(model: nn.Module) -> bool:
    stages = [_children(model, f"layer{i}") for i in range(1, 5)]
    return all(
        blocks and all(_has_layers(b, "conv1", "conv2", *["conv3"] * hasattr(b, "conv3")) for b in blocks)
        for blocks in stages
    ) and all(hasattr(block, "downsample") for blocks in stages for block in blocks)


def _is_mobilenetv2(model: nn.Module) -> bool:
    blocks = [block for stage in _children(model, "blocks") for block in stage.children()]
    return (
        bool(blocks)
        and _has_layers(model, "conv_stem", "conv_head")
        and all(_has_layers(block, "conv_dw", "conv_pw") for block in blocks)
        and not any("SqueezeExcite" in type(module).__name__ for module in model.modules())
    )


def _is_convnext(model: nn.Module) -> bool:
    stages = _children(model, "stages")
    blocks = [block for stage in stages for block in _children(stage, "blocks")]
    return (
        bool(blocks)
        and _has_layers(model, "stem.0")
        and all(_has_layers(stage, "downsample.1") for stage in stages[1:])
        and all(_has_layers(block, "conv_dw", "mlp.fc1", "mlp.fc2") for block in blocks)
    )


def _is_vision_transformer(model: nn.Module) -> bool:
    blocks = _children(model, "blocks")
    return bool(blocks) and all(
        _is_timms(getattr(block, "attn", None), "Attention") and _has_layers(block, "mlp.fc1", "mlp.fc2")
        for block in blocks
    )


def _children(module: nn.Module, name: str) -> list[nn.Module]:
    child = getattr(module, name, None)
    return list(child.children()) if isinstance(child, nn.Module) else []


def _has_layers(module: nn.Module, *names: str) -> bool:
    """Whether a module has convolutions or linear layers, static or dynamic, of these names."""
    layers = dict(module.named_modules())
    return all(name in layers and (kind_of(layers[name]) in CONVERTIBLE or is_dynamic(layers[name])) for name in names)


# names of blocks in timm's networks: ResNet, MobileNetV2, ConvNeXt and MetaFormer, ViT
_BLOCK = re.compile(r"(layer\d+\.\d+|blocks\.\d+\.\d+|stages\.\d+\.blocks\.\d+|blocks\.\d+)\.")


def blocks_of(model: nn.Module) -> dict[str, str]:
    """Name of a layer -> name of the block that contains it; layers outside of blocks are left out.

    A block has one of the names that timm's best known networks give them, or is found by structure: it is an instance
    of a class of which a container holds several, has two layers or more, and has no other block in it.
    """
    layers, modules = layers_of(model), dict(model.named_modules())
    sizes = Counter(above for name in layers for above in _above(name))
    kinds = {type(modules[name]) for name, size in sizes.items() if size > 1 and _repeats(modules, name)}
    found = {name for name, size in sizes.items() if size > 1 and type(modules[name]) in kinds}
    found -= {above for name in found for above in _above(name)}
    blocks = {}
    for name in layers:
        known = _BLOCK.match(name)
        inside = [known[1]] if known else [above for above in _above(name) if above in found]
        if inside:
            blocks[name] = inside[0]
    return blocks


def _repeats(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a module that is no container itself stands in a container, or beside another of its class."""
    module, parent = modules[name], modules[name.rpartition(".")[0]]
    alone = not any(type(other) is type(module) for other in parent.children() if other is not module)
    return type(module) not in CONTAINERS and (isinstance(parent, CONTAINERS) or not alone)


def _above(name: str) -> list[str]:
    """The names of the modules that contain a module, without the root."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers of a model by name, static and dynamic, but not those inside dynamic ones."""
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


def replaceable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `layers_of` that a method may replace or has replaced, by name.

    Other subclasses of `CONVERTIBLE` are left out, since they compute something else.
    """
    layers = layers_of(model).items()
    return {name: module for name, module in layers if kind_of(module) in CONVERTIBLE or is_dynamic(module)}


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The type of a layer: PyTorch's own for a subclass that computes the same, and the subclass for any other.

    timm's linear layer counts as PyTorch's: they differ only by a cast under torch.jit.
    """
    kind = next((kind for kind in CONVERTIBLE if isinstance(module, kind)), None)
    return kind if kind and (_is_timms(module, "Linear") or _computes_as(module, kind)) else type(module)


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    own = type(module)
    same = all(getattr(own, name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))
    # other parameters, buffers and modules are parts of a parametrisation such as weight norm
    plain = module._parameters.keys() <= {"weight", "bias"} and not module._buffers and not module._modules
    # the weight of this one is read by nn.MultiheadAttention; a lazy layer has no weight yet
    others = (nn.modules.linear.NonDynamicallyQuantizableLinear, nn.modules.lazy.LazyModuleMixin)
    return same and plain and not isinstance(module, others)


def _is_timms(module: nn.Module | None, name: str) -> bool:
    """Whether a module is timm's layer of that name, without importing timm: `main.py --help` need not wait for it."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__.startswith("timm.layers.")


def kernel_shape_of(module: nn.Module) -> tuple[int, ...]:
    """The shape of a static layer's kernel: [O, I, *k], or [O, I, 1] for a linear layer."""
    shape = tuple(module.weight.shape)
    return (*shape, 1) if isinstance(module, nn.Linear) else shape


def is_dynamic(module: nn.Module) -> bool:
    """Whether a layer belongs to a method (see `DynamicLayer`)."""
    return getattr(module, "is_dynamic", False)


def stem_of(model: nn.Module) -> list[str]:
    """The name of the layer that sees the image: the first convolution, or else the first linear layer, if any."""
    layers = layers_of(model)
    convolutions = [name for name, module in layers.items() if not hasattr(module, "in_features")]
    return [*convolutions, *layers][:1]


def heads_of(model: nn.Module, names: Collection[str]) -> list[str]:
    """The names of the linear layers that end a model: one, two if it is distilled, none if it ends in features.

    `names` are layers of the model's body. In a model without `get_classifier`, the classifier is the last layer, if
    that is linear and not among `names`.
    """
    layers = layers_of(model)
    linear = [name for name, module in layers.items() if hasattr(module, "in_features")]
    if not callable(getattr(model, "get_classifier", None)):
        last = list(layers)[-1:]
        return [name for name in last if name in linear and name not in names]
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    # a classifier of several layers ends in the last of them
    inner = [[name for name in linear if any(layers[name] is m for m in head.modules())] for head in heads if head]
    return [found[-1] for found in inner if found]


def tied(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the layers whose weight is a parameter of another module, too, as of an embedding."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    return [name for name in names if owners[id(getattr(modules[name], "weight", None))] > 1]


def without_short_cuts(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The given names of layers without those of the convolutions in the short cuts of blocks."""
    blocks = blocks_of(model)
    return [name for name in names if not (name in blocks and "downsample" in name.split("."))]


def residual_units(names: Iterable[str]) -> list[list[str]]:
    """Group consecutive layers into units: those of an MLP or an attention module together, every other layer alone."""
    key = lambda name: match[0] if (match := re.match(r"(?:.*\.)?(?:mlp|attn)\.", name)) else name  # noqa: E731
    return [list(unit) for _, unit in itertools.groupby(names, key)]


def is_deep(model: nn.Module) -> bool:
    """Whether a network has bottlenecks or is a MobileNet; its representation then grows by less (KR, section 4.1)."""
    return type(model).__name__.startswith(("EfficientNet", "MobileNet")) or any(
        type(module).__name__ == "Bottleneck" for module in model.modules()
    )


def has_mlps(model: nn.Module) -> bool:
    """Whether a network's blocks have MLPs, as in MetaFormers."""
    return any("mlp" in name.split(".") for name in replaceable(model))


def main_layers(model: nn.Module) -> list[str]:
    """The names of the layers that a dynamic convolution replaces by default, in the model's order.

    These are all convolutions but the first, and the linear layers of residual blocks: those of MLPs and of timm's
    self-attention (KR, section 4.2). The parts of attention modules such as squeeze-and-excitation are left out.
    In a model that has none of these layers, they are all layers but the first and the last.
    """
    modules = replaceable(model)
    names = [name for name in modules if "se" not in name.split(".")]
    convolutions = [name for name in names if not hasattr(modules[name], "in_features")]
    # timm's own class only: other self-attentions may read the weights of their projections
    attentions = [name for name, module in model.named_modules() if _is_timms(module, "Attention")]
    linear = {f"{name}.{part}" for name in attentions for part in ("qkv", "proj")}
    chosen = [name for name in names if name in convolutions[1:] or "mlp" in name.split(".") or name in linear]
    return chosen or names[1:-1]


def select(model: nn.Module, words: Iterable[str]) -> list[str]:
    """The names of all layers that the words of a config's `layers` select, in the model's order.

    The words are "all" (`main_layers`), "1x1" and "3x3" (those of `main_layers` with one tap, and with more),
    "last_N_blocks" (those of `main_layers` in the last N blocks), "classifier", and glob patterns of module names.

    Raises:
        ValueError: a word selects no layer.
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
            block_of = blocks_of(model)
            blocks = list(dict.fromkeys(block_of[name] for name in every if name in block_of))
            kept = blocks[-int(match[1]) :] if int(match[1]) else []
            found = [name for name in every if block_of.get(name) in kept]
        else:
            found = fnmatch.filter(list(layers_of(model)), word)
        if not found:
            raise ValueError(
                f"layers: '{word}' means no layer of this model; use all, 1x1, 3x3, last_N_blocks, classifier, or a "
                f"pattern of names such as {', '.join([*every, *modules][:3])}"
            )
        chosen.update(found)
    return [name for name in modules if name in chosen]
