"""All methods: each has a module or package here, whose name is in `_ROOMS`."""

import difflib
import importlib

from ..options import Option
from .method import Method

# in the order in which documents and messages list the methods
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


def _methods_in(room: str) -> list[type[Method]]:
    module = importlib.import_module(f".{room}", __name__)
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    return [value for value in own if isinstance(value, type) and issubclass(value, Method)]


# name -> method
METHODS = {method.name: method for room in _ROOMS for method in _methods_in(room)}
ALIASES = {alias: name for name, method in METHODS.items() for alias in method.aliases}
# name of a class -> class of a layer, which can also be used alone
LAYERS = {layer.__name__: layer for method in METHODS.values() for layer in method.layers.values()}


def method_named(name: str) -> type[Method]:
    """The method of a name or alias.

    Raises:
        ValueError: the name is unknown.
    """
    name = ALIASES.get(name, name)
    if name not in METHODS:
        known = [*METHODS, *ALIASES]
        close = difflib.get_close_matches(name, known, 1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"unknown method '{name}'{hint} (methods: {', '.join(known)})")
    return METHODS[name]


def method_options() -> dict[str, Option]:
    """Name of a setting -> an `Option` that accepts the values of all methods that have this setting."""
    merged = {}
    for method in METHODS.values():
        for name, (_, option) in method.settings.items():
            merged[name] = merged[name].joined(option) if name in merged else option
    return merged
