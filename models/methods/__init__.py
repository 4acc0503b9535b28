"""All methods, a room each: adding one means one file (or folder) here, and one line below."""

from .cgc import CGCMethod
from .condconv import CondConvMethod
from .dcd import DCDMethod
from .dyconv import DYConvMethod
from .kernel_representation import KRMethod
from .kernel_warehouse import HalfMobileNetV2Method, KWMethod, KWStarMethod
from .odconv import ODConvMethod
from .weight_excitation import WEMethod
from .weightnet import WeightNetMethod

# in the order in which documents and messages name them
_ALL = (
    KWMethod,
    KWStarMethod,
    ODConvMethod,
    DYConvMethod,
    CondConvMethod,
    KRMethod,
    DCDMethod,
    CGCMethod,
    WeightNetMethod,
    WEMethod,
    HalfMobileNetV2Method,
)
METHODS = {method.name: method for method in _ALL}
# name or alias -> method
NAMES = {**METHODS, **{alias: method for method in _ALL for alias in method.aliases}}


def method_named(name):
    """The method of a name.  Raises ValueError for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"unknown method '{name}', choose from {', '.join(NAMES)}")
    return NAMES[name]


def method_options():
    """Setting -> the `Option` of it that fits all methods."""
    merged = {}
    for method in _ALL:
        for name, (_, option) in method.settings.items():
            merged[name] = merged[name].joined(option) if name in merged else option
    return merged
