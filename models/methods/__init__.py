"""All methods, a room each: adding one means one file (or folder) here, and its name in `_ROOMS`."""

import importlib

from .method import Method

# in the order in which documents and messages name them
_ROOMS = (
    "kernel_warehouse",
    "odconv",
    "dyconv",
    "condconv",
    "kernel_representation",
    "dcd",
    "cgc",
    "weightnet",
    "weight_excitation",
)


def _methods_in(room):
    module = importlib.import_module(f".{room}", __name__)
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    return [value for value in own if isinstance(value, type) and issubclass(value, Method)]


# name -> method
METHODS = {method.name: method for room in _ROOMS for method in _methods_in(room)}
ALIASES = {alias: name for name, method in METHODS.items() for alias in method.aliases}
# name of a class -> a layer that can be used by itself
LAYERS = {layer.__name__: layer for method in METHODS.values() for layer in method.layers.values()}


def method_named(name):
    """The method of a name or alias.  Raises ValueError for an unknown one."""
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise ValueError(f"unknown method '{name}', choose from {', '.join([*METHODS, *ALIASES])}")
    return METHODS[name]


def method_options():
    """Setting -> the `Option` of it that fits all methods."""
    merged = {}
    for method in METHODS.values():
        for name, (_, option) in method.settings.items():
            merged[name] = merged[name].joined(option) if name in merged else option
    return merged
