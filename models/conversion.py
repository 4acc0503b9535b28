"""Replaces layers of any model by dynamic ones."""

from contextlib import nullcontext

from torch import nn

from .layers import KWConv1d, KWConv2d, KWConv3d, KWLinear, Warehouse, Warehouses
from .layers.query_key_value import split_projections
from .methods import METHODS, convert_layers
from .plans import explicit, family, group, share, vit_plan
from .replacement import put, refuse_others, replacement

WAREHOUSE_SETTINGS = {
    "cell_num_ratio": 1.0,
    "cell_inplane_ratio": 1.0,
    "cell_outplane_ratio": 1.0,
    "reduction": 1 / 16,
    "nonlocal_basis_ratio": 1.0,
    "spatial_partition": True,
}
# those of them that a layer takes, not its warehouse
ATTENTION_SETTINGS = ("reduction", "nonlocal_basis_ratio")
LAYERS = {nn.Conv1d: KWConv1d, nn.Conv2d: KWConv2d, nn.Conv3d: KWConv3d, nn.Linear: KWLinear}
# methods with warehouses -> what sets them apart
WAREHOUSE_METHODS = {"kw": {}, "kw_star": {"attentions": ("spatial", "channel", "filter")}}


def per_warehouse(settings, names):
    """One dict of `WAREHOUSE_SETTINGS` per warehouse, from values that are single or lists in their order."""
    result = {name: {} for name in names}
    for key, default in WAREHOUSE_SETTINGS.items():
        value = settings.get(key)
        value = default if value is None else value
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


def _kernel(module):
    """Shape [O, I, *K] of the kernel of a convolution or linear layer."""
    shape = tuple(module.weight.shape)
    return (*shape, 1) if isinstance(module, nn.Linear) else shape


def convert(model, method="kw", *, keep_weights=False, **settings):
    """Replace layers of a model by dynamic ones, in place, and return the model.

    method: "kw" and "kw_star" give layers kernels mixed from warehouses and take what `convert_warehouses` does; the
    others (`methods.METHODS`) take `layers`, the words of `plans.select` ("all", "1x1", "3x3", "last_N_blocks",
    "classifier", glob patterns of names), and their own settings: `convert(model, "odconv", kernel_num=4)`.
    keep_weights: start from the static kernels, so that the model computes what it did before ("kw" and "kw_star": at
    temperature 1, for budgets of 1 and more; "we": without `standardise`).
    `model.conversion` then tells layer -> warehouse or method.
    Raises ValueError for what does not fit, naming the layer or warehouse; the model is then as it was.
    """
    if method in WAREHOUSE_METHODS:
        return convert_warehouses(model, keep_weights=keep_weights, **{**WAREHOUSE_METHODS[method], **settings})
    if method not in METHODS:
        raise ValueError(f"unknown method '{method}', choose from {', '.join([*WAREHOUSE_METHODS, *METHODS])}")
    return convert_layers(model, method, keep_weights=keep_weights, **settings)


def convert_warehouses(
    model,
    *,
    plan=None,
    warehouses=None,
    sharing_range=None,
    norm=None,
    attention_function="caf",
    attention_init="one-to-one",
    attentions=(),
    cell_sharing=True,
    keep_weights=False,
    **settings,
):
    """Give layers of a model kernels mixed from warehouses (KernelWarehouse).

    plan: [(layer, warehouse name), ...], joined by `sharing_range`; norm: of the attention, "batch" or "layer".  What
    is None is that of the model's family (see `plans.py`).  warehouses: explicit ones instead of a plan,
    name -> {"layers": [glob pattern, ...], any setting}.
    attentions: of ODConv's "spatial", "channel" and "filter", those beside the attention to cells (KW*, Table 17).
    settings: cell_num_ratio, cell_inplane_ratio, cell_outplane_ratio, reduction, nonlocal_basis_ratio,
    spatial_partition; one value, or a list in the order of the warehouses.

    The warehouses are registered at `model.warehouses`.
    """
    unknown = [key for key in settings if key not in WAREHOUSE_SETTINGS]
    if unknown:
        known = "sharing_range, warehouses, plan, norm, attention_function, attention_init, attentions, cell_sharing"
        raise ValueError(f"kw has no setting '{unknown[0]}', choose from {', '.join(WAREHOUSE_SETTINGS)}, {known}")
    if hasattr(model, "warehouses"):
        raise ValueError("the model has warehouses already; convert a static model, once")
    if keep_weights and attention_init != "one-to-one":
        raise ValueError(f"keep_weights needs attention_init 'one-to-one', not '{attention_init}'")
    attentions = [attentions] if isinstance(attentions, str) else attentions
    own_plan, own_sharing, own_norm = family(model)
    plan = own_plan if plan is None else plan
    # the plan of vision transformers names the parts of a projection, and explicit warehouses may
    patterns = [pattern for settings in (warehouses or {}).values() for pattern in settings.get("layers", ())]
    split = any(".qkv." in pattern for pattern in patterns) if warehouses else plan is vit_plan
    with split_projections(model) if split else nullcontext():
        if warehouses:
            groups = explicit(model, warehouses)
            per = per_warehouse(settings, list(groups))
            for name, own in warehouses.items():
                own = {key: value for key, value in own.items() if key != "layers"}
                unknown = [key for key in own if key not in WAREHOUSE_SETTINGS]
                if unknown:
                    raise ValueError(
                        f"warehouse '{name}' has no setting '{unknown[0]}', choose from layers, "
                        f"{', '.join(WAREHOUSE_SETTINGS)}"
                    )
                per[name].update(own)
        else:
            plan = plan(model) if callable(plan) else plan
            groups = group(share(plan, own_sharing if sharing_range is None else sharing_range))
            per = per_warehouse(settings, list(groups))
        attention = {
            "norm": own_norm if norm is None else norm,
            "attention_function": attention_function,
            "attention_init": attention_init,
            "attentions": attentions,
            "cell_sharing": cell_sharing,
        }
        made, replaced = _warehouse_layers(model, groups, per, attention, keep_weights)
        put(model, replaced, keep_weights)
    model.warehouses = Warehouses(made)
    model.conversion = {
        **getattr(model, "conversion", {}),
        **{layer: name for name, layers in groups.items() for layer in layers},
    }
    return model


def _warehouse_layers(model, groups, per, attention, keep_weights):
    """The warehouses, name -> `Warehouse`, and the layers that take cells from them, name -> layer."""
    if not groups:
        raise ValueError("there is no convolution or linear layer to convert in this model")
    short = [name for name in groups if keep_weights and per[name]["cell_num_ratio"] < 1]
    if short:
        raise ValueError(
            f"warehouse '{short[0]}': keep_weights needs a cell for every mixture, a cell_num_ratio of at least 1, "
            f"not {per[short[0]]['cell_num_ratio']}"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    made, replaced = {}, {}
    # every warehouse first, as a ratio that does not divide is the likeliest mistake
    for name, layers in groups.items():
        refuse_others([modules[layer] for layer in layers], layers, LAYERS, "kw")
        first = modules[layers[0]].weight
        made[name] = Warehouse(
            {layer: _kernel(modules[layer]) for layer in layers},
            name=name,
            device=first.device,
            dtype=first.dtype,
            **{key: value for key, value in per[name].items() if key not in ATTENTION_SETTINGS},
        )
    for name, layers in groups.items():
        own = {**attention, **{key: per[name][key] for key in ATTENTION_SETTINGS}}
        for layer in layers:
            replaced[layer] = replacement(modules[layer], layer, LAYERS, warehouse=made[name], layer=layer, **own)
    return made, replaced
