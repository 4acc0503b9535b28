"""How many parameters the attentions of warehouses have, before anything is made: they grow with m x n."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...anatomy import kernel_shape_of
from .layer import attention_size
from .warehouse import partition

PARTITION = ("cell_inplane_ratio", "cell_outplane_ratio", "spatial_partition")
# a default plan of a family is followed where the attentions have at most this share of all parameters; in MobileNetV2
# they have 0.32
DEFAULT_SHARE = 1 / 3
# any other plan is refused above this share, unless `allow_growth` is set or the attentions have fewer parameters than
# anyone minds
LARGEST_SHARE, FEW = 1 / 2, 100_000


def attention_sizes(
    model: nn.Module, groups: Mapping[str, Sequence[str]], per: Mapping[str, Mapping[str, Any]], **common: Any
) -> tuple[dict[str, int], int]:
    """(name of a warehouse -> parameters of the attentions to it, all other parameters of the network with warehouses).

    Args:
        model: still static.
        groups: name of a warehouse -> its layers.
        per: name of a warehouse -> its settings.
        common: `norm` and `cell_sharing` of the attentions.

    Raises:
        ValueError: kernels cannot be cut as the settings say.
    """
    modules, sizes, rest = dict(model.named_modules()), {}, sum(p.numel() for p in model.parameters())
    for name, layers in groups.items():
        own = per[name]
        kernels = {layer: kernel_shape_of(modules[layer]) for layer in layers}
        cell, mixtures = partition(kernels, name=name, **{key: own[key] for key in PARTITION})
        total, b = sum(mixtures.values()), own["cell_num_ratio"]
        attention = {"reduction": own["reduction"], "nonlocal_basis_ratio": own["nonlocal_basis_ratio"], **common}
        sizes[name] = sum(
            attention_size(channels_of(modules[layer]), m, round(b * total), own=round(b * m), **attention)
            for layer, m in mixtures.items()
        )
        rest += (round(b * total) - total) * math.prod(cell)
    return sizes, rest


def channels_of(module: nn.Module) -> int:
    """The number of channels of a layer's input."""
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def is_within(sizes: Mapping[str, int], rest: int, share: float) -> bool:
    """Whether attentions have at most a share of all parameters; the arguments are those of `attention_sizes`."""
    total = sum(sizes.values())
    return total <= share * (total + rest)


def refuse_growth(sizes: Mapping[str, int], rest: int) -> None:
    """Refuse warehouses whose attentions have more parameters than the rest of the network.

    Raises:
        ValueError: names the warehouse with the largest attentions.
    """
    if is_within(sizes, rest, LARGEST_SHARE) or sum(sizes.values()) <= FEW:
        return
    name, total = max(sizes, key=sizes.get), sum(sizes.values())
    raise ValueError(
        f"the attentions to all warehouses would have {total / 1e6:,.1f} M parameters, the rest of the network "
        f"{rest / 1e6:,.1f} M; most of them, {sizes[name] / 1e6:,.1f} M, belong to warehouse '{name}', whose layers "
        "have small common divisors: give layers of other sizes another warehouse, leave the plan to the default, or "
        "set allow_growth"
    )
