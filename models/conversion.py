"""Replaces layers of any model by dynamic ones."""

import torch
from torch import nn

from .layers import KWConv1d, KWConv2d, KWConv3d, KWLinear, Warehouse, Warehouses
from .plans import explicit, family, group, share

WAREHOUSE_SETTINGS = {
    "cell_num_ratio": 1.0,
    "cell_inplane_ratio": 1.0,
    "cell_outplane_ratio": 1.0,
    "reduction": 1 / 16,
    "nonlocal_basis_ratio": 1.0,
    "spatial_partition": True,
}
LAYERS = {nn.Conv1d: KWConv1d, nn.Conv2d: KWConv2d, nn.Conv3d: KWConv3d}


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


def _replacement(module, **kwargs):
    kwargs.update(device=module.weight.device, dtype=module.weight.dtype)
    if isinstance(module, nn.Linear):
        return KWLinear(module.in_features, module.out_features, module.bias is not None, **kwargs)
    if module.padding_mode != "zeros":
        raise ValueError(f"layer '{kwargs['layer']}': padding_mode '{module.padding_mode}' is not supported, use zeros")
    return LAYERS[type(module)](
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.bias is not None,
        **kwargs,
    )


def convert(
    model,
    *,
    plan=None,
    warehouses=None,
    sharing_range=None,
    norm=None,
    attention_function="caf",
    attention_init="one-to-one",
    cell_sharing=True,
    keep_weights=False,
    **settings,
):
    """Give layers of `model` kernels mixed from warehouses, in place, and return the model.

    plan: [(layer, warehouse name), ...], joined by `sharing_range`; norm: of the attention, "batch" or "layer".  What
    is None is that of the model's family (see `plans.py`).  warehouses: explicit ones instead of a plan,
    name -> {"layers": [glob pattern, ...], any setting}.
    settings: cell_num_ratio, cell_inplane_ratio, cell_outplane_ratio, reduction, nonlocal_basis_ratio,
    spatial_partition; one value, or a list in the order of the warehouses.
    keep_weights: fill the cells with the kernels that they replace (for budgets of 1 and more), so that at
    temperature 1 the model computes what it did before.

    The warehouses are registered at `model.warehouses`; `model.conversion` tells layer -> warehouse.
    Raises ValueError for what does not fit, naming the layer or warehouse.
    """
    unknown = [key for key in settings if key not in WAREHOUSE_SETTINGS]
    if unknown:
        raise ValueError(f"convert: unknown setting '{unknown[0]}', choose from {', '.join(WAREHOUSE_SETTINGS)}")
    if hasattr(model, "warehouses"):
        raise ValueError("the model has warehouses already; convert a static model, once")
    own_plan, own_sharing, own_norm = family(model)
    sharing_range = own_sharing if sharing_range is None else sharing_range
    norm = own_norm if norm is None else norm
    if warehouses:
        groups = explicit(model, warehouses)
        per = per_warehouse(settings, list(groups))
        for name, own in warehouses.items():
            per[name].update({key: value for key, value in own.items() if key != "layers"})
    else:
        groups = group(share(own_plan(model) if plan is None else plan, sharing_range))
        per = per_warehouse(settings, list(groups))
    if not groups:
        raise ValueError("there is no convolution or linear layer to convert in this model")

    short = [name for name in groups if keep_weights and per[name]["cell_num_ratio"] < 1]
    if short:
        raise ValueError(
            f"warehouse '{short[0]}': keep_weights needs a cell for every mixture, a cell_num_ratio of at least 1, "
            f"not {per[short[0]]['cell_num_ratio']}"
        )
    # every warehouse first: a ratio that does not divide leaves the model untouched
    modules = dict(model.named_modules(remove_duplicate=False))
    made = {}
    for name, layers in groups.items():
        own = per[name]
        first = modules[layers[0]].weight
        made[name] = Warehouse(
            {layer: _kernel(modules[layer]) for layer in layers},
            name=name,
            device=first.device,
            dtype=first.dtype,
            **{key: own[key] for key in WAREHOUSE_SETTINGS if key not in ("reduction", "nonlocal_basis_ratio")},
        )
    # a module may stand in several places, and is replaced in all of them
    paths = {}
    for path, module in modules.items():
        paths.setdefault(id(module), []).append(path)
    replaced = {}
    for name, layers in groups.items():
        for layer in layers:
            replaced[layer] = _replacement(
                modules[layer],
                warehouse=made[name],
                layer=layer,
                reduction=per[name]["reduction"],
                nonlocal_basis_ratio=per[name]["nonlocal_basis_ratio"],
                norm=norm,
                attention_function=attention_function,
                attention_init=attention_init,
                cell_sharing=cell_sharing,
            )
    for layer, module in replaced.items():
        static = modules[layer]
        if module.bias is not None:
            module.bias.data.copy_(static.bias.data)
        if keep_weights:
            _keep(module, static)
        module.train(static.training)
        for path in paths[id(static)]:
            parent, _, child = path.rpartition(".")
            setattr(modules[parent], child, module)
    model.warehouses = Warehouses(made)
    model.conversion = {layer: name for name, layers in groups.items() for layer in layers}
    return model


@torch.no_grad()
def _keep(module, static):
    """Write the static kernel into the cells that its mixtures own."""
    warehouse = module.warehouse
    c_out, c_in, *window = warehouse.cells.shape[1:]
    weight = static.weight.reshape(_kernel(static))
    g_out, g_in = weight.shape[0] // c_out, weight.shape[1] // c_in
    weight = weight.reshape(g_out, c_out, g_in, c_in, -1, *window)
    cells = weight.permute(4, 0, 2, 1, 3, *range(5, weight.ndim)).reshape(-1, *warehouse.cells.shape[1:])
    warehouse.cells[torch.tensor(warehouse.assignments[module.layer], device=cells.device)] = cells
