"""The methods KernelWarehouse (KW) and KW*, which adds ODConv's other attentions.

The layers are in `layer.py`, the cells that they share in `warehouse.py`; `plans.py` tells which layers of a network
share a warehouse. This file holds the settings and the steps of a conversion.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ...anatomy import kernel_shape_of
from ...options import Option
from ..method import Method, Setting, layer_classes
from ..settings import ATTENTION_FUNCTION, ATTENTIONS_OPTION, REDUCTION
from .layer import ATTENTION_FUNCTIONS, KWAttention, KWConv1d, KWConv2d, KWConv3d, KWLinear
from .plans import explicit, family, group, half_mobilenetv2, share
from .query_key_value import split_projections
from .warehouse import ATTENTION_INITS, Warehouse, Warehouses, warehouse_layers, warehouse_stages

__all__ = [
    "HalfMobileNetV2Method", "KWAttention", "KWConv1d", "KWConv2d", "KWConv3d", "KWLinear", "KWMethod", "KWStarMethod",
    "Warehouse", "Warehouses", "warehouse_layers", "warehouse_stages",
]  # fmt: skip

_CELL_RATIO = {"nargs": "+", "above": 0, "high": 1}
# each setting has one value for all warehouses, or one for each
WAREHOUSE_SETTINGS = {
    "cell_num_ratio": Setting(
        1.0,
        Option(
            float, None, "budget b = n / m_t: cells of a warehouse over the mixtures of its layers", nargs="+", above=0
        ),
    ),
    "cell_inplane_ratio": Setting(
        1.0, Option(float, None, "input channels of a cell over the greatest common divisor", **_CELL_RATIO)
    ),
    "cell_outplane_ratio": Setting(
        1.0, Option(float, None, "output channels of a cell over the greatest common divisor", **_CELL_RATIO)
    ),
    "reduction": Setting(1 / 16, replace(REDUCTION, nargs="+")),
    "nonlocal_basis_ratio": Setting(
        1.0, Option(float, 1.0, "rank of the attention's shared basis over its full rank", **_CELL_RATIO)
    ),
    "spatial_partition": Setting(True, Option(bool, True, "divide kernels along space as well", nargs="+")),
}
# the settings above that a layer takes, not its warehouse
ATTENTION_SETTINGS = ("reduction", "nonlocal_basis_ratio")
# what an entry of `warehouses`, which is one warehouse, may hold
ENTRIES = {
    "layers": Option(str, [], "glob patterns of module names", nargs="*"),
    **{name: option.single(default) for name, (default, option) in WAREHOUSE_SETTINGS.items()},
}
NETWORK_SETTINGS = {
    "sharing_range": Setting(
        None,
        Option(
            str,
            [],
            "kinds of layers that share a warehouse within a stage: layer, conv, pwconv, ...",
            nargs="*",
            nullable=True,
        ),
    ),
    "warehouses": Setting(
        None, Option(dict, None, "explicit warehouses: name -> layers and settings", entries=ENTRIES)
    ),
    "attention_function": Setting("caf", replace(ATTENTION_FUNCTION, choices=ATTENTION_FUNCTIONS)),
    "attention_init": Setting(
        "one-to-one",
        Option(str, "one-to-one", "initial relation of cells and mixtures (Table 13)", choices=ATTENTION_INITS),
    ),
    "attentions": Setting((), ATTENTIONS_OPTION),
    "cell_sharing": Setting(
        True, Option(bool, True, "mixtures share the cells of their warehouse; false: each has its own (Table 6)")
    ),
}


class KWMethod(Method):
    """KW: the layers that a plan names take their cells from warehouses, which `model.warehouses` holds.

    Args:
        layers: only None is accepted; `warehouses` names layers instead.
        plan: [(layer, warehouse name), ...], or a function of the model that returns it; `sharing_range` then joins
            warehouses. None: that of the model's family (see `plans.py`), as for `norm` and `sharing_range`.
        norm: of the attention, "batch" or "layer".
        **given: `keep_weights` and settings. `warehouses` gives explicit warehouses instead of a plan:
            name -> {"layers": [glob pattern, ...], any of `WAREHOUSE_SETTINGS`}. `attentions` are those of ODConv's
            "spatial", "channel" and "filter" that join the attention to cells (KW*, Table 17).

    Raises:
        ValueError: for settings and models that do not fit.
    """

    name = "kw"
    layers = layer_classes("KW", globals())
    settings = {**WAREHOUSE_SETTINGS, **NETWORK_SETTINGS}
    # the released ResNets leave their classifier to PyTorch
    released_classifier = False

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | Sequence[str] | None = None,
        plan: Sequence[tuple[str, str]] | Callable[[nn.Module], list[tuple[str, str]]] | None = None,
        norm: str | None = None,
        **given: Any,
    ) -> None:
        super().__init__(model, **given)
        if layers is not None:
            raise ValueError(f"{self.name} has no setting 'layers'; name them in `warehouses`")
        if hasattr(model, "warehouses"):
            raise ValueError("the model has warehouses already; convert a static model, once")
        if self.keep_weights and self.given["attention_init"] != "one-to-one":
            raise ValueError(f"keep_weights needs attention_init 'one-to-one', not '{self.given['attention_init']}'")
        own_plan, own_sharing, own_norm = family(model)
        self.norm = own_norm if norm is None else norm
        self.plan = own_plan if plan is None else plan
        if self.given["sharing_range"] is None:
            self.given["sharing_range"] = own_sharing
        self.groups, self.per, self.made = {}, {}, {}

    def _value(self, name: str, value: Any) -> Any:
        # a list gives each warehouse its value, and a sharing range may be a string, as in the released code
        if value is None:
            return self.settings[name].default
        return [value] if name == "attentions" and isinstance(value, str) else value

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Find the layers of every warehouse; split the projections of self-attention if a part of one is named.

        A context manager: if its body raises, the projections are whole again.
        """
        entries = self.given["warehouses"]
        if entries:
            named = [pattern for entry in entries.values() for pattern in entry.get("layers", ())]
        else:
            plan = self.plan(self.model) if callable(self.plan) else self.plan
            self.groups = group(share(plan, self.given["sharing_range"]))
            named = [layer for layer, _ in plan]
        with split_projections(self.model) if any(".qkv." in name for name in named) else contextlib.nullcontext():
            if entries:
                self.groups = explicit(self.model, entries)
            yield

    def choose(self) -> list[str]:
        if not self.groups:
            raise ValueError("there is no convolution or linear layer to convert in this model")
        names = list(self.groups)
        self.per = per_warehouse(self.given, names)
        for name, entry in (self.given["warehouses"] or {}).items():
            own = {key: value for key, value in entry.items() if key != "layers"}
            unknown = [key for key in own if key not in WAREHOUSE_SETTINGS]
            if unknown:
                raise ValueError(f"warehouse '{name}' has no setting '{unknown[0]}', choose from {', '.join(ENTRIES)}")
            self.per[name].update(own)
        short = [name for name in names if self.keep_weights and self.per[name]["cell_num_ratio"] < 1]
        if short:
            raise ValueError(
                f"warehouse '{short[0]}': keep_weights needs a cell for every mixture, a cell_num_ratio of at least 1, "
                f"not {self.per[short[0]]['cell_num_ratio']}"
            )
        return [layer for layers in self.groups.values() for layer in layers]

    def named(self) -> list[str]:
        return [pattern for entry in (self.given["warehouses"] or {}).values() for pattern in entry["layers"]]

    def leave_static(self, names: Sequence[str], static: Sequence[str]) -> list[str]:
        left = {warehouse: [name for name in layers if name not in static] for warehouse, layers in self.groups.items()}
        self.groups = {warehouse: layers for warehouse, layers in left.items() if layers}
        return super().leave_static(names, static)

    def arguments(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Make all warehouses, and return name -> keyword arguments of each layer.

        The warehouses are made before any layer, since a wrong ratio is the likeliest mistake.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name, layers in self.groups.items():
            first = modules[layers[0]].weight
            self.made[name] = Warehouse(
                {layer: kernel_shape_of(modules[layer]) for layer in layers},
                name=name,
                device=first.device,
                dtype=first.dtype,
                **{key: value for key, value in self.per[name].items() if key not in ATTENTION_SETTINGS},
            )
        attention = ("attention_function", "attention_init", "attentions", "cell_sharing")
        common = {"norm": self.norm, **{key: self.given[key] for key in attention}}
        return {
            layer: {
                **common,
                **{key: self.per[name][key] for key in ATTENTION_SETTINGS},
                "warehouse": self.made[name],
                "layer": layer,
            }
            for name, layers in self.groups.items()
            for layer in layers
        }

    def finish(self, names: Sequence[str]) -> list[str]:
        self.model.warehouses = Warehouses(self.made)
        return []

    def label(self, name: str) -> str:
        return next(warehouse for warehouse, layers in self.groups.items() if name in layers)


class KWStarMethod(KWMethod):
    """KernelWarehouse with ODConv's attentions along the other dimensions (Table 17)."""

    name = "kw_star"
    settings = {**KWMethod.settings, "attentions": Setting(("spatial", "channel", "filter"), ATTENTIONS_OPTION)}


class HalfMobileNetV2Method(KWMethod):
    """KW (1/2x) of MobileNetV2 (section A.3), with the settings that the released code keeps in the model."""

    name = "kw1d2x"

    def __init__(self, model: nn.Module, **given: Any) -> None:
        super().__init__(model, **given)
        if self.given["warehouses"] is not None:
            return
        network = getattr(model, "pretrained_cfg", {}).get("architecture", "")
        if not network.startswith("mobilenetv2_"):
            instead = f"kw_{network}" if network else "kw"
            raise ValueError(f"{self.name} is for MobileNetV2 only; use {instead} with cell_num_ratio 0.5")
        self.given["warehouses"] = half_mobilenetv2(model)


def per_warehouse(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The `WAREHOUSE_SETTINGS` of every warehouse by its name.

    Args:
        settings: each is one value for all warehouses, or a list of one value for each.
        names: of the warehouses, in the order of such lists.

    Raises:
        ValueError: for a list of another length.
    """
    result = {name: {} for name in names}
    for key in WAREHOUSE_SETTINGS:
        value = settings[key]
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if not isinstance(value, (list, tuple)):
            value = [value] * len(names)
        if len(value) != len(names):
            raise ValueError(
                f"{key} has {len(value)} values for {len(names)} warehouses ({', '.join(names)}); give one for all or "
                "one for each"
            )
        for name, v in zip(names, value, strict=True):
            result[name][key] = v
    return result
