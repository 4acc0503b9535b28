"""Which layer takes its kernels from which warehouse, per backbone family (KernelWarehouse, sections 3.3 and A.3).

A plan is an ordered list of (layer, warehouse): module names of timm's model, and names such as
`stage1_layer0_conv2`, whose parts `sharing_range` then joins.  The order of the warehouses is that of the released
checkpoints.  The first layers of a stage are reassigned to the stage before, so that one layer with few channels does
not shrink the greatest common divisors of all others (Table 15).
"""

import fnmatch
import re
from collections import Counter

from ...anatomy import family_name, layers_of, replaceable

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


def convnext_plan(model):
    """ConvNeXt: all convolutions; stem, down-sampling, depth-wise and point-wise ones apart."""
    plan = [("stem.0", "stagestem_conv0")]
    plan += [(f"stages.{i}.downsample.1", f"stage{i - 1}_layer0_conv0") for i in range(1, len(model.stages))]
    for i, stage in enumerate(model.stages):
        for j in range(len(stage.blocks)):
            block, home = f"stages.{i}.blocks.{j}", f"stage{i}_layer{j}"
            plan.append((f"{block}.conv_dw", f"{home}_dwconv0"))
            plan.append((f"{block}.mlp.fc1", f"{home}_pwconv0"))
            plan.append((f"{block}.mlp.fc2", f"{home}_pwconv1"))
    return plan


def vit_plan(model):
    """Vision transformers (Table 11): "weight matrices for value and MLP layers"; query and key stay static.

    Each half of the blocks shares a warehouse for values and one for MLPs.  The paper gives no groups; two, with cells
    as large as they can be, have its parameters (`configs/deit_tiny/kw1x_deit_tiny.json`).
    """
    half = -(-len(model.blocks) // 2)
    parts = {"attn.qkv.value": "value0", "mlp.fc1": "mlp0", "mlp.fc2": "mlp1"}
    return [
        (f"blocks.{i}.{layer}", f"stage{i // half}_layer{i}_{part}")
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


def family(model):
    """(plan, sharing range, norm of the attention) of a timm model's family, or those of any model."""
    return FAMILIES[family_name(model)]


def half_mobilenetv2(model):
    """The warehouses of KW (1/2x) of MobileNetV2 (section A.3), as the released code has them.

    Depth-wise convolutions everywhere, point-wise ones in the last stage, and the classifier; the attention is
    narrower, since in so small a network its parameters count.
    """
    last = f"stage{len(model.blocks) - 1}_"
    plan = [(layer, name) for layer, name in mobilenetv2_plan(model) if "pwconv" not in name or last in name]
    groups = group(share([*plan, ("classifier", "classifier")], ["layer"]))
    halves = {"cell_num_ratio": 0.5, "cell_inplane_ratio": 0.5, "cell_outplane_ratio": 0.5}
    own = {
        f"{last}layer_pwconv0": halves,
        f"{last}layer_pwconv1": halves,
        "classifier": {"cell_num_ratio": 0.5, "cell_inplane_ratio": 0.025},
    }
    return {name: {"layers": layers, "reduction": 1 / 32, **own.get(name, {})} for name, layers in groups.items()}


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


def explicit(model, warehouses):
    """Warehouse -> its layers, from the glob patterns of a config's `warehouses`, in module order.

    Raises ValueError for a pattern that matches nothing and for a layer that two warehouses claim.
    """
    names = list(layers_of(model))
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
