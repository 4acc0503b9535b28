"""A config (path or dict) -> a model."""

import difflib
import re

import timm
from timm.layers import DropPath

from . import plans
from .config import ConfigError, read_config
from .conversion import WAREHOUSE_SETTINGS, convert


def _half_mobilenetv2(model):
    """KW (1/2x) of MobileNetV2 (section A.3): settings that the released code keeps in the model.

    Depth-wise convolutions everywhere, point-wise ones in the last stage, and the classifier; the attention is
    narrower, since in so small a network its parameters count.
    """
    last = f"stage{len(model.blocks) - 1}_"
    plan = [(layer, name) for layer, name in plans.mobilenetv2_plan(model) if "pwconv" not in name or last in name]
    groups = plans.group(plans.share([*plan, ("classifier", "classifier")], ["layer"]))
    halves = {"cell_num_ratio": 0.5, "cell_inplane_ratio": 0.5, "cell_outplane_ratio": 0.5}
    own = {
        f"{last}layer_pwconv0": halves,
        f"{last}layer_pwconv1": halves,
        "classifier": {"cell_num_ratio": 0.5, "cell_inplane_ratio": 0.025},
    }
    return {name: {"layers": layers, "reduction": 1 / 32, **own.get(name, {})} for name, layers in groups.items()}


# prefix of a model's name -> (explicit warehouses of a model or None, defaults)
METHODS = {
    "kw": (None, {}),
    "kw1d2x": (_half_mobilenetv2, {"dropout": 0.1}),
}


def parse_name(name):
    """`kw_resnet18` -> ("kw", "resnet18"); a static timm model has the method None."""
    prefix, _, backbone = name.partition("_")
    method, backbone = (prefix, backbone) if prefix in METHODS else (None, name)
    if not timm.is_model(backbone):
        known = timm.list_models() + [f"{m}_{b}" for m in METHODS for b in ("resnet18", "resnet50", "mobilenetv2_100")]
        close = difflib.get_close_matches(name, known, 1)
        raise ConfigError(
            f"unknown model '{name}'"
            + (f", did you mean '{close[0]}'?" if close else "")
            + f" A model is a timm name, or METHOD_NAME with METHOD one of {', '.join(METHODS)}"
        )
    return method, backbone


def build_model(config, num_classes=1000, **overrides):
    """The model of a config.

    config: a path to a JSON file, or a dict of the same keys; training options in it are checked and ignored.
    overrides: keys that win over the config's.  Input [B, 3, H, W], output logits [B, num_classes].
    Raises ConfigError (a ValueError) that names the key for an unknown or mistyped setting, and the layer and the
    warehouse for a ratio that does not divide.
    """
    config = {**read_config(config), **read_config(overrides)}
    method, backbone = parse_name(config.get("model", "convnext_tiny"))
    explicit, defaults = METHODS[method] if method else (None, {})
    config = {**defaults, **config}
    model = _static(backbone, num_classes, config)
    if method is None:
        return model

    settings = {key: config[key] for key in WAREHOUSE_SETTINGS if config.get(key) is not None}
    warehouses = config.get("warehouses")
    if warehouses is None and explicit is not None:
        if type(model).__name__ != "EfficientNet":
            raise ConfigError(f"model '{config['model']}': {method} is defined for MobileNetV2 only, use kw_{backbone}")
        warehouses = explicit(model)
    for key in ("attention_function", "attention_init", "cell_sharing"):
        if config.get(key) is not None:
            settings[key] = config[key]
    return convert(
        model,
        warehouses=warehouses,
        sharing_range=config.get("sharing_range"),
        **settings,
    )


def _static(backbone, num_classes, config):
    """timm's model with the config's regularisation."""
    kwargs = {"num_classes": num_classes, "drop_rate": config.get("dropout") or 0.0}
    rate = config.get("drop_path") or 0.0
    is_resnet = re.match(r"(kw_)?resnet\d", backbone) is not None
    schedule = config.get("block_drop_path") or ("constant" if is_resnet else "linear")
    if schedule == "linear":
        kwargs["drop_path_rate"] = rate
    if "convnext" in backbone:
        for key, name in (("layer_scale_init_value", "ls_init_value"), ("head_init_scale", "head_init_scale")):
            if config.get(key) is not None:
                kwargs[name] = config[key]
    model = timm.create_model(backbone, **kwargs)
    if schedule == "constant" and rate:
        # the released ResNets drop every block at the same rate, timm's at one that grows with depth
        blocks = [m for m in model.modules() if hasattr(m, "drop_path") and hasattr(m, "conv2")]
        if not blocks:
            raise ConfigError(f"block_drop_path 'constant' is for ResNets; '{backbone}' takes 'linear'")
        for block in blocks:
            block.drop_path = DropPath(rate)
    return model
