"""Dynamic convolution: the public API.

The names are loaded at first use, so that importing this package does not load torch.
"""

import importlib
import re
from typing import Any

from . import one_package

__version__ = "0.1.0"
__distribution__ = one_package.DISTRIBUTION
one_package.join(__name__, __version__)

_HOME = {
    "build_model": "build",
    "report_model": "build",
    "convert": "conversion",
    "load_weights": "weights",
    "set_temperature": "temperature",
    "get_temperature": "temperature",
    "temperature_range": "temperature",
    "warehouse_layers": "methods.kernel_warehouse",
    "warehouse_stages": "methods.kernel_warehouse",
    "read_config": "config",
    "find_config": "config",
    "read_checkpoint": "reader",
    "ConfigError": "config",
    "Warehouse": "methods.kernel_warehouse",
    "mixture_conv": "ops",
    "sample_conv": "ops",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name == "__all__":
        return __dir__()
    # the layers of all methods, such as KWConv2d; no other name may load torch
    if re.fullmatch(r"[A-Z]\w*(Conv[123]d|Linear)", name):
        layers = importlib.import_module(".methods", __name__).LAYERS
        if name in layers:
            return layers[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_HOME, *importlib.import_module(".methods", __name__).LAYERS]
