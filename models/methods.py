"""The methods whose layers stand alone, by name: what replaces what, where, and with which settings.

KernelWarehouse, whose layers share warehouses, has its own way (`conversion.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from . import placement
from .layers import cgc, condconv, dcd, dyconv, odconv, weight_excitation, weightnet
from .layers import kernel_representation as kr
from .plans import main_layers, select
from .replacement import put, refuse_others, replacement


@dataclass(frozen=True)
class Method:
    """What `convert` needs to know of a method.

    layers: type of a static layer -> the class that replaces it.
    settings: the settings that it takes, with their defaults; any other is refused.
    select: model -> names of the layers to replace where `layers` does not name them, in the model's order.
    arguments: (model, names, settings) -> name -> keyword arguments of the layer's class.
    finish: (model, names, settings, keep_weights) -> names of other layers that it replaces, after these.
    """

    layers: Mapping
    settings: Mapping
    select: Callable
    arguments: Callable = lambda model, names, settings: dict.fromkeys(names, settings)
    finish: Callable = lambda model, names, settings, keep_weights: []


def _classes(module, prefix):
    """The classes of a module of `layers` for every type of static layer that it has one for."""
    types = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d, "Linear": nn.Linear}
    found = {kind: getattr(module, prefix + name, None) for name, kind in types.items()}
    return {kind: cls for kind, cls in found.items() if cls is not None}


# settings that are lists
LISTS = ("attentions", "excitations")
METHODS = {
    "odconv": Method(
        _classes(odconv, "OD"),
        {
            "kernel_num": 1,
            "reduction": 1 / 16,
            "attentions": odconv.ATTENTIONS,
            "spatial_function": "sigmoid",
            "attention_function": "softmax",
            "attention_sharing": True,
            "spatial_pool": 1,
        },
        placement.odconv_layers,
    ),
    "dyconv": Method(
        _classes(dyconv, "DY"),
        {"kernel_num": 4, "reduction": 1 / 4, "attention_function": "softmax"},
        main_layers,
    ),
    "condconv": Method(
        _classes(condconv, "Cond"), {"kernel_num": 8}, placement.condconv_layers, placement.condconv_routings
    ),
    "kr": Method(
        _classes(kr, "KR"),
        {
            "kernel_num": 1,
            "reduction": None,
            "fusion_width": "both",
            "attentions": None,
            "attention_sharing": None,
            "representation": True,
            "representation_dim": None,
            "representation_start": "frequency",
            "representation_norm": True,
        },
        placement.odconv_layers,
        placement.kr_arguments,
        placement.kr_finish,
    ),
    "dcd": Method(_classes(dcd, "DCD"), {"reduction": None}, placement.dcd_layers, placement.dcd_sizes),
    "cgc": Method(_classes(cgc, "CGC"), {}, placement.cgc_layers),
    "weightnet": Method(
        _classes(weightnet, "WeightNet"),
        {"kernel_num": 1, "slices": 2, "reduction": 1 / 16},
        main_layers,
        placement.weightnet_blocks,
    ),
    "we": Method(
        _classes(weight_excitation, "WE"),
        {"excitations": weight_excitation.EXCITATIONS, "standardise": True, "reduction": 1 / 16},
        main_layers,
    ),
}


def _single(name, key, value):
    """A setting that a config may give as a list, one value per warehouse, as one value."""
    if key in LISTS or not isinstance(value, (list, tuple)):
        return value
    if len(value) != 1:
        raise ValueError(f"{name}: {key} has {len(value)} values; only warehouses have one each")
    return value[0]


def convert_layers(model, name, *, layers=None, keep_weights=False, **settings):
    """Replace layers of a model by those of a method, as `conversion.convert` tells."""
    method = METHODS[name]
    unknown = [key for key in settings if key not in method.settings]
    if unknown:
        raise ValueError(f"{name} has no setting '{unknown[0]}'; it takes {', '.join(['layers', *method.settings])}")
    settings = {key: [value] if key in LISTS and isinstance(value, str) else value for key, value in settings.items()}
    settings = {**method.settings, **{key: _single(name, key, value) for key, value in settings.items()}}
    words = [layers] if isinstance(layers, str) else layers
    names = select(model, words) if words else method.select(model)
    if not names:
        raise ValueError(f"{name}: this model has no layer that it replaces; name them with `layers`")
    modules = dict(model.named_modules(remove_duplicate=False))
    refuse_others([modules[layer] for layer in names], names, method.layers, name)
    replaced = {}
    for layer, arguments in method.arguments(model, names, settings).items():
        try:
            replaced[layer] = replacement(modules[layer], layer, method.layers, **arguments)
        except ValueError as error:
            raise ValueError(f"{name}: layer '{layer}': {error}") from None
    put(model, replaced, keep_weights)
    names = [*names, *method.finish(model, names, settings, keep_weights)]
    model.conversion = {**getattr(model, "conversion", {}), **dict.fromkeys(names, name)}
    return model
