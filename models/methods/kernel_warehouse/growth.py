"""How many parameters the attentions to warehouses have, before anything is made: they grow with m x n.

They are compared with the parameters of the kernels that they mix, times the budget where that is above 1. Unlike all
parameters of the network, these do not depend on the number of its classes, which must not change a plan.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...anatomy import kernel_shape_of
from .layer import attention_size
from .warehouse import partition, whole_cells

PARTITION = ("cell_inplane_ratio", "cell_outplane_ratio", "spatial_partition")
# family -> the share up to which its plan is followed by default: the largest of the paper's networks, rounded up
# (MobileNetV2 0.5x: 1.32, ConvNeXt-Tiny: 0.388), and up to ResNet152 (0.298)
DEFAULT_SHARES = {"ResNet": 0.3, "MobileNetV2": 1.33, "ConvNeXt": 0.39, "VisionTransformer": 0.4}
# any other plan is refused above this share and this number of parameters, unless `allow_growth` is set
LARGEST_SHARE, LARGEST = 2.0, 3_000_000
# attentions with so few parameters need no rule: those of a network of some layers, and of a small one of a family
FEW, FEW_OF_FAMILY = 20_000, 250_000


def attention_sizes(
    model: nn.Module, groups: Mapping[str, Sequence[str]], per: Mapping[str, Mapping[str, Any]], **common: Any
) -> tuple[dict[str, int], float]:
    """(name of a warehouse -> parameters of the attentions to it, those of all kernels times their budgets above 1).

    Args:
        model: still static.
        groups: name of a warehouse -> its layers.
        per: name of a warehouse -> its settings.
        common: `norm` and `cell_sharing` of the attentions.

    Raises:
        ValueError: kernels cannot be cut as the settings say.
    """
    modules, sizes, kernels = dict(model.named_modules()), {}, 0.0
    for name, layers in groups.items():
        own, mixtures = per[name], _mixtures(modules, name, layers, per[name])
        b = own["cell_num_ratio"]
        n = round(b * sum(mixtures.values()))
        attention = {"reduction": own["reduction"], "nonlocal_basis_ratio": own["nonlocal_basis_ratio"], **common}
        sizes[name] = sum(
            attention_size(channels_of(modules[layer]), m, n, own=round(b * m), **attention)
            for layer, m in mixtures.items()
        )
        kernels += max(b, 1) * sum(modules[layer].weight.numel() for layer in layers)
    return sizes, kernels


def have_whole_cells(
    model: nn.Module, groups: Mapping[str, Sequence[str]], per: Mapping[str, Mapping[str, Any]]
) -> bool:
    """Whether the budgets give every warehouse a whole number of cells; arguments and errors as `attention_sizes`."""
    modules = dict(model.named_modules())
    totals = {name: sum(_mixtures(modules, name, layers, per[name]).values()) for name, layers in groups.items()}
    return all(whole_cells(per[name]["cell_num_ratio"], total) for name, total in totals.items())


def _mixtures(
    modules: Mapping[str, nn.Module], name: str, layers: Sequence[str], own: Mapping[str, Any]
) -> dict[str, int]:
    """Layer -> its mixtures, for a warehouse of this name and these settings."""
    shapes = {layer: kernel_shape_of(modules[layer]) for layer in layers}
    return partition(shapes, name=name, **{key: own[key] for key in PARTITION})[1]


def channels_of(module: nn.Module) -> int:
    """The number of channels of a layer's input."""
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def is_within(sizes: Mapping[str, int], kernels: float, share: float) -> bool:
    """Whether attentions have at most a share of the kernels' parameters; arguments: what `attention_sizes` returns."""
    return sum(sizes.values()) <= share * kernels


def refuse_growth(sizes: Mapping[str, int], kernels: float) -> None:
    """Refuse attentions with many times the parameters of the kernels; arguments: what `attention_sizes` returns.

    Raises:
        ValueError: names the warehouse with the largest attentions.
    """
    total = sum(sizes.values())
    if is_within(sizes, kernels, LARGEST_SHARE) or total <= LARGEST:
        return
    name = max(sizes, key=sizes.get)
    raise ValueError(
        f"the attentions to the warehouses would have {total / 1e6:,.2f} M parameters, {total / kernels:,.1f} times "
        f"those of the kernels; most of them, {sizes[name] / 1e6:,.2f} M, belong to warehouse '{name}', whose layers "
        "have small common divisors: give layers of other sizes another warehouse, leave the plan to the default, or "
        "set allow_growth"
    )
