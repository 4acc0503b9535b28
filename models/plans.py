"""Which layer takes its kernels from which warehouse, per backbone family (KernelWarehouse, sections 3.3 and A.3).

A plan is an ordered list of (layer, warehouse): module names of timm's model, and names such as
`stage1_layer0_conv2`, whose parts `sharing_range` then joins.  The order of the warehouses is that of the released
checkpoints.  The first layers of a stage are reassigned to the stage before, so that one layer with few channels does
not shrink the greatest common divisors of all others (Table 15).
"""

import fnmatch
import itertools
import math
import re
from collections import Counter

from timm.layers import Attention
from timm.layers import Linear as TimmLinear
from torch import nn

from .layers.base import DynamicLayer
from .layers.kernel_representation import KRClassifier

CONVERTIBLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
SHARED_PARTS = ("layer", "conv", "pwconv", "dwconv", "mlp")


def resnet_plan(model):
    """ResNets: all convolutions but the stem, and in bottlenecks but the first one and its short cut."""
    plan = []
    for stage in range(4):
        for index, block in enumerate(getattr(model, f"layer{stage + 1}")):
            name = f"layer{stage + 1}.{index}"
            bottleneck = hasattr(block, "conv3")
            convs = [c for c in ("conv1", "conv2", "conv3") if hasattr(block, c)]
            # layers reassigned to the stage before are numbered on from its last block, as first convolutions:
            # so they stand alone without sharing, and among their like when blocks share (Table 7: 26.95 M)
            before = len(getattr(model, f"layer{stage}")) if stage else 0
            for i, conv in enumerate(convs):
                if bottleneck and (stage, index, i) == (0, 0, 0):
                    continue
                if stage and (index, i) == (0, 0):
                    plan.append((f"{name}.{conv}", f"stage{stage - 1}_layer{before}_conv0"))
                else:
                    plan.append((f"{name}.{conv}", f"stage{stage}_layer{index}_conv{i}"))
            if block.downsample is not None and stage > 0:
                # the convolution is the only one there, whether or not an average pooling stands before it
                i, _ = next(
                    (i, m)
                    for i, m in block.downsample.named_children()
                    if hasattr(m, "kernel_size") and hasattr(m, "out_channels")
                )
                plan.append((f"{name}.downsample.{i}", f"stage{stage - 1}_layer{before + 1}_conv0"))
    return plan


def mobilenetv2_plan(model):
    """MobileNetV2: all convolutions; depth-wise, expanding and projecting ones apart."""
    plan, numbers = [("conv_stem", "stage0_conv0")], Counter()
    for stage, blocks in enumerate(model.blocks):
        for index, block in enumerate(blocks):
            # the first block of a stage is reassigned to the stage before
            home = max(stage if index == 0 else stage + 1, 1)
            parts = {"conv_pw": "pwconv0", "conv_dw": "dwconv0", "conv_pwl": "pwconv1"}
            if not hasattr(block, "conv_pwl"):
                # without expansion the block is depth-wise, then projecting
                parts = {"conv_dw": "dwconv0", "conv_pw": "pwconv1"}
            for layer, part in parts.items():
                plan.append((f"blocks.{stage}.{index}.{layer}", f"stage{home}_layer{numbers[home]}_{part}"))
            numbers[home] += 1
    last = len(model.blocks) - 1
    return [*plan, ("conv_head", f"stage{last}_layer{numbers[last]}_pwconv1")]


def convnext_plan(model, stages=None):
    """ConvNeXt: all convolutions; stem, down-sampling, depth-wise and point-wise ones apart.

    stages: the number of blocks of every stage after reassignment, the model's own by default.
    """
    plan = [("stem.0", "stagestem_conv0")]
    plan += [(f"stages.{i}.downsample.1", f"stage{i - 1}_layer0_conv0") for i in range(1, len(model.stages))]
    blocks = [f"stages.{i}.blocks.{j}" for i, stage in enumerate(model.stages) for j in range(len(stage.blocks))]
    stages = stages or [len(stage.blocks) for stage in model.stages]
    homes = [(i, j) for i, count in enumerate(stages) for j in range(count)]
    for block, (i, j) in zip(blocks, homes, strict=True):
        plan.append((f"{block}.conv_dw", f"stage{i}_layer{j}_dwconv0"))
        plan.append((f"{block}.mlp.fc1", f"stage{i}_layer{j}_pwconv0"))
        plan.append((f"{block}.mlp.fc2", f"stage{i}_layer{j}_pwconv1"))
    return plan


def vit_plan(model, groups=2):
    """Vision transformers (Table 11): "weight matrices for value and MLP layers"; query and key stay static.

    groups: of consecutive blocks, which share a warehouse for values and one for MLPs.  The paper gives no groups; two,
    with cells as large as they can be, have its parameters (`configs/deit_tiny/kw1x_deit_tiny.json`).
    """
    per_group = -(-len(model.blocks) // groups)
    parts = {"attn.qkv.value": "value0", "mlp.fc1": "mlp0", "mlp.fc2": "mlp1"}
    return [
        (f"blocks.{i}.{layer}", f"stage{i // per_group}_layer{i}_{part}")
        for i in range(len(model.blocks))
        for layer, part in parts.items()
    ]


def any_plan(model):
    """Any other model: every convolution and linear layer but the first and the last, each with its own warehouse."""
    layers = list(replaceable(model))
    return [(name, name.replace(".", "_")) for name in layers[1:-1]]


# family -> (its plan, what the paper shares in it, the norm of its attention)
FAMILIES = {
    "ResNet": (resnet_plan, ["layer", "conv"], "batch"),
    "MobileNetV2": (mobilenetv2_plan, ["layer", "pwconv"], "batch"),
    "ConvNeXt": (convnext_plan, ["layer", "conv", "pwconv"], "layer"),
    "VisionTransformer": (vit_plan, ["layer", "mlp"], "layer"),
    "other": (any_plan, [], "batch"),
}


def family_name(model):
    """The name of a timm model's family among `FAMILIES`."""
    name = type(model).__name__
    if name == "EfficientNet" and hasattr(model, "conv_head") and not _has_squeeze(model):
        name = "MobileNetV2"
    return name if name in FAMILIES else "other"


def family(model):
    """(plan, sharing range, norm of the attention) of a timm model's family, or those of any model."""
    return FAMILIES[family_name(model)]


def _has_squeeze(model):
    return any("SqueezeExcite" in type(module).__name__ for module in model.modules())


def shared_parts(sharing_range):
    """The name parts that lose their number: a list of them, or a released string.

    The released code matches a string character by character, so that "layer_conv" means layer and conv, and
    "layer_pwconv" means layer, conv and pwconv, but not dwconv.
    """
    if isinstance(sharing_range, str):
        return [part for part in SHARED_PARTS if part[0] in sharing_range]
    unknown = [part for part in sharing_range if part not in SHARED_PARTS]
    if unknown:
        raise ValueError(f"sharing_range: unknown part '{unknown[0]}', choose from {', '.join(SHARED_PARTS)}")
    return list(sharing_range)


def share(plan, sharing_range):
    """Join warehouses: `stage0_layer1_conv2` becomes `stage0_layer_conv` with ["layer", "conv"]."""
    parts = shared_parts(sharing_range)

    def joined(name):
        return "_".join(
            match[1] if (match := re.fullmatch(r"([a-z]+)\d+", part)) and match[1] in parts else part
            for part in name.split("_")
        )

    return [(layer, joined(name)) for layer, name in plan]


def group(plan):
    """Warehouse -> its layers, in the order of the plan."""
    groups = {}
    for layer, warehouse in plan:
        groups.setdefault(warehouse, []).append(layer)
    return groups


# a block of timm's networks: ResNet, MobileNetV2, ConvNeXt and MetaFormer, ViT
_BLOCK = re.compile(r"(layer\d+\.\d+|blocks\.\d+\.\d+|stages\.\d+\.blocks\.\d+|blocks\.\d+)\.")


def block_of(layer):
    """The name of the block that a layer is in, or None."""
    match = _BLOCK.match(layer)
    return match[1] if match else None


def _layers(model):
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
    """Those of `_layers` that a method may replace, or has replaced; other subclasses do something else."""
    layers = _layers(model).items()
    return {name: module for name, module in layers if kind_of(module) in CONVERTIBLE or is_dynamic(module)}


def kind_of(module):
    """The type of a layer; timm's linear layer is PyTorch's, but for a cast under torch.jit."""
    return nn.Linear if type(module) is TimmLinear else type(module)


def is_dynamic(module):
    """Whether a layer has been replaced by a method."""
    return isinstance(module, (DynamicLayer, KRClassifier))


def stem_of(model):
    """The name of the layer that sees the image: the first convolution, or else the first linear layer."""
    layers = _layers(model)
    return next((name for name, module in layers.items() if not hasattr(module, "in_features")), next(iter(layers)))


def heads_of(model, names):
    """The names of the linear layers that end a model: one, two where it is distilled, none where it ends in features.

    names: of layers in its body; a model that does not tell its classifier has one only behind all of them.
    """
    layers = _layers(model)
    linear = [name for name, module in layers.items() if hasattr(module, "in_features")]
    if not callable(getattr(model, "get_classifier", None)):
        last = list(layers)[-1]
        return [last] if last in linear and last not in names else []
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    # of a classifier of several layers, the last one
    inner = [[name for name in linear if any(layers[name] is m for m in head.modules())] for head in heads if head]
    return [found[-1] for found in inner if found]


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
            found = fnmatch.filter(list(_layers(model)), word)
        if not found:
            raise ValueError(
                f"layers: '{word}' means no layer of this model; use all, 1x1, 3x3, last_N_blocks, classifier, or a "
                f"pattern of names such as {', '.join([*every, *modules][:3])}"
            )
        chosen.update(found)
    return [name for name in modules if name in chosen]


def explicit(model, warehouses):
    """Warehouse -> its layers, from the glob patterns of a config's `warehouses`, in module order.

    Raises ValueError for a pattern that matches nothing and for a layer that two warehouses claim.
    """
    names = list(_layers(model))
    owner, groups = {}, {}
    for warehouse, settings in warehouses.items():
        if not settings.get("layers"):
            raise ValueError(f"warehouse '{warehouse}' has no layers; give it a list of names or patterns as 'layers'")
        found = set()
        for pattern in settings["layers"]:
            matches = fnmatch.filter(names, pattern)
            if not matches:
                raise ValueError(
                    f"warehouse '{warehouse}': no convolution or linear layer of the model is named '{pattern}'; "
                    f"the layers are {', '.join(names[:4])}, ..."
                )
            found.update(matches)
        for name in found:
            if name in owner:
                raise ValueError(f"layer '{name}' is claimed by the warehouses '{owner[name]}' and '{warehouse}'")
            owner[name] = warehouse
        groups[warehouse] = [name for name in names if name in found]
    return groups
