"""The methods KernelWarehouse (KW) and KW*, which adds ODConv's other attentions.

The layers are in `layer.py`, the cells that they share in `warehouse.py`; `plans.py` tells which layers of a network
share a warehouse. This file holds the settings and the steps of a conversion.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ...anatomy import family_name, heads_of, is_dynamic, kernel_shape_of, kind_of, replaceable
from ...options import Option
from ..method import Method, Setting, layer_classes
from ..settings import ATTENTION_FUNCTION, ATTENTIONS_OPTION, REDUCTION
from .any_network import warehouses_of
from .growth import (
    DEFAULT_SHARES,
    FEW,
    FEW_OF_FAMILY,
    attention_sizes,
    channels_of,
    have_whole_cells,
    is_within,
    refuse_growth,
)
from .layer import ATTENTION_FUNCTIONS, KWAttention, KWConv1d, KWConv2d, KWConv3d, KWLinear, attention_size
from .plans import explicit, family, group, half_mobilenetv2, share
from .query_key_value import split_projections
from .warehouse import (
    ATTENTION_INITS,
    Warehouse,
    Warehouses,
    drop_unused_warehouses,
    warehouse_layers,
    warehouse_stages,
)

__all__ = [
    "HalfMobileNetV2Method", "KWAttention", "KWConv1d", "KWConv2d", "KWConv3d", "KWLinear", "KWMethod", "KWStarMethod",
    "Warehouse", "Warehouses", "drop_unused_warehouses", "warehouse_layers", "warehouse_stages",
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
# settings that belong to a plan: beside one of them the plan is followed whatever it costs
PLANNING = ("sharing_range", "cell_inplane_ratio", "cell_outplane_ratio", "spatial_partition")
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
        None,
        Option(
            str,
            None,
            "initial relation of cells and mixtures (Table 13), or static at every temperature; null: one-to-one, or "
            "static with keep_weights",
            choices=ATTENTION_INITS,
        ),
    ),
    "attentions": Setting((), ATTENTIONS_OPTION),
    "cell_sharing": Setting(
        True, Option(bool, True, "mixtures share the cells of their warehouse; false: each has its own (Table 6)")
    ),
    "allow_growth": Setting(
        False, Option(bool, False, "allow attentions with more than twice the parameters of the kernels, and above 3 M")
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
        if self.given["attention_init"] is None:
            # a network that starts from static weights is to compute the same at every temperature
            is_static = self.keep_weights and self.given["attention_function"] == "caf"
            self.given["attention_init"] = "static" if is_static else "one-to-one"
        if self.keep_weights and self.given["attention_init"] not in ("one-to-one", "static"):
            raise ValueError(f"keep_weights needs attention_init 'static', not '{self.given['attention_init']}'")
        # a plan of the user's own is followed as it is
        self.is_planned = plan is not None or any(
            value is not None and (name in PLANNING or (isinstance(value, (list, tuple)) and len(value) > 1))
            for name, value in given.items()
        )
        own_plan, own_sharing, own_norm = family(model)
        self.norm = own_norm if norm is None else norm
        self.plan = own_plan if plan is None else plan
        if self.given["sharing_range"] is None:
            self.given["sharing_range"] = own_sharing
        self.groups, self.ratios, self.per, self.made = {}, {}, {}, {}

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
            self._follow_plan()
            named = [layer for layers in self.groups.values() for layer in layers]
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
        for name, ratios in self.ratios.items():
            self.per[name].update(ratios)
        if not self.given["allow_growth"] and self._are_replaceable(self.groups):
            refuse_growth(*self._attention_sizes(self.per))
        return [layer for layers in self.groups.values() for layer in layers]

    def _follow_plan(self) -> None:
        """Find the layers of every warehouse: by the plan, or by the rule if there is none that suits the network."""
        plan = self.plan(self.model) if callable(self.plan) else self.plan
        self.groups = group(share(plan, self.given["sharing_range"]))
        if self.is_planned:
            return
        # the parts of a projection, which is not split yet, cannot be measured; families that have them do not outgrow
        if not self._are_replaceable(self.groups):
            return
        per = per_warehouse(self.given, list(self.groups))
        sizes, kernels = self._attention_sizes(per)
        largest, few = DEFAULT_SHARES.get(family_name(self.model), 0), FEW_OF_FAMILY if self.is_known else FEW
        is_small = is_within(sizes, kernels, largest) or sum(sizes.values()) <= few
        if is_small and have_whole_cells(self.model, self.groups, per):
            return
        modules, positions = dict(self.model.named_modules()), self._candidates()
        one = per_warehouse(self.given, [""])[""]
        attention = {"reduction": one["reduction"], "nonlocal_basis_ratio": one["nonlocal_basis_ratio"]}
        found = warehouses_of(
            {name: kernel_shape_of(modules[name]) for name in positions},
            {name: channels_of(modules[name]) for name in positions},
            positions,
            one["cell_num_ratio"],
            functools.partial(attention_size, norm=self.norm, **attention),
        )
        if not found:
            # the plan tells what is wrong
            self.static.clear()
            return
        self.groups = {name: list(warehouse.kernels) for name, warehouse in found.items()}
        self.ratios = {name: warehouse.ratios for name, warehouse in found.items()}
        taken = {layer for layers in self.groups.values() for layer in layers}
        self.static.update(dict.fromkeys(positions.keys() - taken, "attentions to its cells would outgrow its kernel"))

    def _candidates(self) -> dict[str, int]:
        """Layer -> positions of its output, for the layers that a warehouse may serve if no plan names them."""
        layers, ran = replaceable(self.model), self.trial.positions
        names = [name for name, module in layers.items() if not is_dynamic(module)]
        ends = {self.stem(): "the first layer", **dict.fromkeys(heads_of(self.model, ()), "the classifier")}
        self.static.update({names[-1]: "the last layer", **ends, **self.unfit(list(layers))})
        names = [name for name in names if name not in self.static]
        if not ran:
            # no input is known: the layers of a stage have the same channels
            modules = dict(self.model.named_modules())
            return {name: max(kernel_shape_of(modules[name])[:2]) for name in names}
        self.static.update({name: "it does not run in evaluation" for name in names if name not in ran})
        if any(ran[name] > 1 for name in names if name in ran):
            vectors = {name: "its output is a vector, not a map" for name in names if ran.get(name) == 1}
            self.static.update(vectors)
        return {name: ran[name] for name in names if name not in self.static}

    def _are_replaceable(self, groups: Mapping[str, Sequence[str]]) -> bool:
        """Whether all layers of the groups exist and are static ones that a warehouse can serve."""
        modules = dict(self.model.named_modules())
        return all(kind_of(modules.get(layer)) in self.layers for layers in groups.values() for layer in layers)

    def _attention_sizes(self, per: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, int], float]:
        common = {"norm": self.norm, "cell_sharing": self.given["cell_sharing"]}
        return attention_sizes(self.model, self.groups, per, **common)

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
        errors = {layer: error for warehouse in self.made.values() for layer, error in warehouse.errors.items()}
        if errors:
            worst = sorted(errors, key=errors.get, reverse=True)[:3]
            warnings.warn(
                f"{self.name}: fewer cells than mixtures keep {len(errors)} static kernels approximately; the largest "
                f"relative errors have {', '.join(f'{layer} ({errors[layer]:.2f})' for layer in worst)}",
                stacklevel=4,
            )
        return []

    def renewed(self, name: str) -> nn.Module | None:
        house = self.label(name)
        if self.groups[house] != [name]:
            return None
        self.groups, groups = {house: [name]}, self.groups
        try:
            made = super().renewed(name)
        finally:
            self.groups = groups
        self.model.warehouses[house] = self.made[house]
        return made

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
