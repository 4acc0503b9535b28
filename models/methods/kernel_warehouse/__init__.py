"""KernelWarehouse (KW, and KW* with ODConv's other attentions): its room.

Layers are in `layer.py`, the cells that they share in `warehouse.py`, and which layer of a network shares which
warehouse in `plans.py`; what is set, and how a conversion goes, is here.
"""

import contextlib
from dataclasses import replace

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
# one value for all warehouses, or one for each
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
# those of them that a layer takes, not its warehouse
ATTENTION_SETTINGS = ("reduction", "nonlocal_basis_ratio")
# what an entry of `warehouses` may hold; it is one warehouse
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
    """The layers that a plan names take their cells from warehouses, which stand at `model.warehouses`.

    plan: [(layer, warehouse name), ...], joined by `sharing_range`; norm: of the attention, "batch" or "layer".  What
    is None is that of the model's family (see `plans.py`).  warehouses: explicit ones instead of a plan,
    name -> {"layers": [glob pattern, ...], any setting}.
    attentions: of ODConv's "spatial", "channel" and "filter", those beside the attention to cells (KW*, Table 17).
    """

    name = "kw"
    layers = layer_classes("KW", globals())
    settings = {**WAREHOUSE_SETTINGS, **NETWORK_SETTINGS}
    # the released ResNets leave their classifier to PyTorch
    released_classifier = False

    def __init__(self, model, *, layers=None, plan=None, norm=None, **given):
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

    def _value(self, name, value):
        # a list has a value for each warehouse, and a released sharing range may be a string
        if value is None:
            return self.settings[name].default
        return [value] if name == "attentions" and isinstance(value, str) else value

    @contextlib.contextmanager
    def prepared(self):
        """The projections of self-attention in parts, where a plan names the parts."""
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

    def choose(self):
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

    def arguments(self, names):
        """The warehouse of every layer; all are made first, since a wrong ratio is the likeliest mistake."""
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

    def finish(self, names):
        self.model.warehouses = Warehouses(self.made)
        return []

    def label(self, name):
        return next(warehouse for warehouse, layers in self.groups.items() if name in layers)


class KWStarMethod(KWMethod):
    """KernelWarehouse with ODConv's attentions along the other dimensions (Table 17)."""

    name = "kw_star"
    settings = {**KWMethod.settings, "attentions": Setting(("spatial", "channel", "filter"), ATTENTIONS_OPTION)}


class HalfMobileNetV2Method(KWMethod):
    """KW (1/2x) of MobileNetV2 (section A.3): settings that the released code keeps in the model."""

    name = "kw1d2x"

    def __init__(self, model, **given):
        super().__init__(model, **given)
        if self.given["warehouses"] is not None:
            return
        network = getattr(model, "pretrained_cfg", {}).get("architecture", "")
        if not network.startswith("mobilenetv2_"):
            instead = f"kw_{network}" if network else "kw"
            raise ValueError(f"{self.name} is for MobileNetV2 only; use {instead} with cell_num_ratio 0.5")
        self.given["warehouses"] = half_mobilenetv2(model)


def per_warehouse(settings, names):
    """One dict of `WAREHOUSE_SETTINGS` per warehouse, from values that are single or lists in their order."""
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
