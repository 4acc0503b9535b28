"""Which layer takes its kernels from which warehouse, per backbone family (KernelWarehouse, sections 3.3 and A.3).

A plan is an ordered list of (layer, warehouse). A layer has its module name in timm's model, a warehouse a name such as
`stage1_layer0_conv2`; `sharing_range` then joins warehouses by such parts of their names. The order of the warehouses
is that of the released checkpoints. The first layers of a stage are reassigned to the stage before, so that one layer
with few channels does not shrink the greatest common divisors of all others (Table 15).
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...anatomy import family_name, is_dynamic, layers_of, replaceable

SHARED_PARTS = ("layer", "conv", "pwconv", "dwconv", "mlp")


def resnet_plan(model: nn.Module) -> list[tuple[str, str]]:
    """ResNets: all convolutions except the stem.

    Networks of bottlenecks also leave out the first convolution and the short cut of the first block.
    """
    plan = []
    for stage in range(4):
        for index, block in enumerate(getattr(model, f"layer{stage + 1}")):
            name = f"layer{stage + 1}.{index}"
            bottleneck = hasattr(block, "conv3")
            convs = [c for c in ("conv1", "conv2", "conv3") if hasattr(block, c)]
            # layers reassigned to the stage before get the next block numbers there and are first convolutions: without
            # sharing they stand alone, and if blocks share, they join the first convolutions (Table 7: 26.95 M)
            before = len(getattr(model, f"layer{stage}")) if stage else 0
            for i, conv in enumerate(convs):
                if bottleneck and (stage, index, i) == (0, 0, 0):
                    continue
                if stage and (index, i) == (0, 0):
                    plan.append((f"{name}.{conv}", f"stage{stage - 1}_layer{before}_conv0"))
                else:
                    plan.append((f"{name}.{conv}", f"stage{stage}_layer{index}_conv{i}"))
            if block.downsample is not None and stage > 0:
                # the short cut has one convolution, which an average pooling may precede
                i, _ = next(
                    (i, m)
                    for i, m in block.downsample.named_children()
                    if hasattr(m, "kernel_size") and hasattr(m, "out_channels")
                )
                plan.append((f"{name}.downsample.{i}", f"stage{stage - 1}_layer{before + 1}_conv0"))
    return plan


def mobilenetv2_plan(model: nn.Module) -> list[tuple[str, str]]:
    """MobileNetV2: all convolutions, with separate names for depth-wise, expanding and projecting ones."""
    plan, numbers = [("conv_stem", "stage0_conv0")], Counter()
    for stage, blocks in enumerate(model.blocks):
        for index, block in enumerate(blocks):
            # the first block of a stage is reassigned to the stage before
            home = max(stage if index == 0 else stage + 1, 1)
            parts = {"conv_pw": "pwconv0", "conv_dw": "dwconv0", "conv_pwl": "pwconv1"}
            if not hasattr(block, "conv_pwl"):
                # a block without expansion has a depth-wise convolution, then a projecting one
                parts = {"conv_dw": "dwconv0", "conv_pw": "pwconv1"}
            for layer, part in parts.items():
                plan.append((f"blocks.{stage}.{index}.{layer}", f"stage{home}_layer{numbers[home]}_{part}"))
            numbers[home] += 1
    last = len(model.blocks) - 1
    return [*plan, ("conv_head", f"stage{last}_layer{numbers[last]}_pwconv1")]


def convnext_plan(model: nn.Module) -> list[tuple[str, str]]:
    """ConvNeXt: all convolutions, with separate names for stem, down-sampling, depth-wise and point-wise ones."""
    plan = [("stem.0", "stagestem_conv0")]
    plan += [(f"stages.{i}.downsample.1", f"stage{i - 1}_layer0_conv0") for i in range(1, len(model.stages))]
    for i, stage in enumerate(model.stages):
        for j in range(len(stage.blocks)):
            block, home = f"stages.{i}.blocks.{j}", f"stage{i}_layer{j}"
            plan.append((f"{block}.conv_dw", f"{home}_dwconv0"))
            plan.append((f"{block}.mlp.fc1", f"{home}_pwconv0"))
            plan.append((f"{block}.mlp.fc2", f"{home}_pwconv1"))
    return plan


def vit_plan(model: nn.Module) -> list[tuple[str, str]]:
    """Vision transformers (Table 11): "weight matrices for value and MLP layers"; query and key stay static.

    Each half of the blocks shares a warehouse for values and one for MLPs. The paper does not say which blocks share;
    two groups with the largest possible cells have its number of parameters
    (`configs/deit_tiny/kw1x_deit_tiny.json`).
    """
    half = -(-len(model.blocks) // 2)
    parts = {"attn.qkv.value": "value0", "mlp.fc1": "mlp0", "mlp.fc2": "mlp1"}
    return [
        (f"blocks.{i}.{layer}", f"stage{i // half}_layer{i}_{part}")
        for i in range(len(model.blocks))
        for layer, part in parts.items()
    ]


def any_plan(model: nn.Module) -> list[tuple[str, str]]:
    """Any other model: all convolutions and linear layers but the first and the last, each with its own warehouse."""
    layers, plan = replaceable(model), {}
    for name in list(layers)[1:-1]:
        house = name.replace(".", "_")
        # a name of its own, which the dict of warehouses has no attribute of
        while house in plan.values() or hasattr(nn.ModuleDict, house):
            house += "_"
        if not is_dynamic(layers[name]):
            plan[name] = house
    return list(plan.items())


# family -> (its plan, the sharing range in the paper, the norm of its attention)
FAMILIES = {
    "ResNet": (resnet_plan, ["layer", "conv"], "batch"),
    "MobileNetV2": (mobilenetv2_plan, ["layer", "pwconv"], "batch"),
    "ConvNeXt": (convnext_plan, ["layer", "conv", "pwconv"], "layer"),
    "VisionTransformer": (vit_plan, ["layer", "mlp"], "layer"),
    "other": (any_plan, [], "batch"),  # where `any_network` is not asked for
}


def family(model: nn.Module) -> tuple[Callable[[nn.Module], list[tuple[str, str]]], list[str], str]:
    """(plan, sharing range, norm of the attention) of a model's family, or those of any other model."""
    plan, sharing, norm = FAMILIES[family_name(model)]
    if plan is any_plan and not any(isinstance(module, _BatchNorm) for module in model.modules()):
        # as in the paper's networks without BatchNorm
        norm = "layer" if any(isinstance(module, nn.LayerNorm) for module in model.modules()) else norm
    return plan, sharing, norm


def half_mobilenetv2(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The warehouses of KW (1/2x) of MobileNetV2 (section A.3), as in the released code.

    They serve the stem, all depth-wise convolutions, the point-wise ones of the last stage, and the classifier. The
    attention is narrower, since its parameters matter in such a small network.
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


def shared_parts(sharing_range: str | Sequence[str]) -> list[str]:
    """The parts of warehouse names that lose their number, from a list of them or a string of the released code.

    The released code matches a string character by character, so that "layer_conv" means layer and conv, and
    "layer_pwconv" means layer, conv and pwconv, but not dwconv. Raises ValueError for an unknown part of a list.
    """
    if isinstance(sharing_range, str):
        return [part for part in SHARED_PARTS if part[0] in sharing_range]
    unknown = [part for part in sharing_range if part not in SHARED_PARTS]
    if unknown:
        raise ValueError(f"sharing_range: unknown part '{unknown[0]}', choose from {', '.join(SHARED_PARTS)}")
    return list(sharing_range)


def share(plan: Iterable[tuple[str, str]], sharing_range: str | Sequence[str]) -> list[tuple[str, str]]:
    """Join warehouses: `stage0_layer1_conv2` becomes `stage0_layer_conv` with ["layer", "conv"]."""
    parts = shared_parts(sharing_range)

    def joined(name: str) -> str:
        return "_".join(
            match[1] if (match := re.fullmatch(r"([a-z]+)\d+", part)) and match[1] in parts else part
            for part in name.split("_")
        )

    return [(layer, joined(name)) for layer, name in plan]


def group(plan: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Warehouse -> its layers, in the order of the plan."""
    groups = {}
    for layer, warehouse in plan:
        groups.setdefault(warehouse, []).append(layer)
    return groups


def explicit(model: nn.Module, warehouses: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Warehouse -> its layers, in the order of the modules, from the glob patterns of a config's `warehouses`.

    Raises ValueError for a warehouse without patterns, a pattern that matches nothing, and a layer that two warehouses
    claim.
    """
    names = list(layers_of(model))
    owner, groups = {}, {}
    for warehouse, settings in warehouses.items():
        if hasattr(nn.ModuleDict, warehouse):
            raise ValueError(f"a warehouse cannot have the name '{warehouse}', which PyTorch uses; choose another")
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
