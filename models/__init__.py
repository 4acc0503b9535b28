"""Dynamic convolution: the public API.

The names are loaded at first use, so that reading a config does not wait for torch.
"""

import importlib

_ROOMS = {
    "KW": "kernel_warehouse", "OD": "odconv", "DY": "dyconv", "Cond": "condconv", "KR": "kernel_representation",
    "DCD": "dcd", "WeightNet": "weightnet", "WE": "weight_excitation", "CGC": "cgc",
}  # fmt: skip
_HOME = {
    "build_model": "build",
    "convert": "conversion",
    "load_weights": "weights",
    "set_temperature": "temperature",
    "get_temperature": "temperature",
    "temperature_range": "temperature",
    "warehouse_layers": "weights",
    "read_config": "config",
    "ConfigError": "config",
    **{
        prefix + kind: f"methods.{room}"
        for prefix, room in _ROOMS.items()
        for kind in ("Conv1d", "Conv2d", "Conv3d", "Linear")
        if prefix + kind != "CGCLinear"
    },
    "Warehouse": "methods.kernel_warehouse",
    "mixture_conv": "ops",
    "sample_conv": "ops",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return __all__
