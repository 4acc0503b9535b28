"""Builds the model of a config, which is a path or a dict."""

import difflib
import functools
import os
import re
from typing import Any

import timm
import torch
from timm.layers import DropPath, SEModule
from torch import nn

from .config import ConfigError, read_config
from .conversion import convert
from .initialisation import start_as_released
from .methods import ALIASES, METHODS
from .options import METHOD_KEYS
from .report import ConversionReport
from .weights import load_static

# ODConv's tables count squeeze-and-excitation without biases
BLOCK_ATTENTIONS = {"se": functools.partial(SEModule, rd_ratio=1 / 16, bias=False), "cbam": "cbam", "eca": "eca"}


# prefix of a model's name -> (method, defaults of its config); of several that match, the longest is used
PREFIXES = {
    **{name: (name, {}) for name in METHODS},
    **{alias: (name, {}) for alias, name in ALIASES.items()},
    **{name: (None, {"block_attention": name}) for name in BLOCK_ATTENTIONS},
}
# more names for networks that timm can build: other widths, other image sizes, and shorter names
# name -> (timm's name, {arguments of `timm.create_model`, and `stem_pool`})
BACKBONES = {
    # N, 2 N, 4 N and 8 N channels, and no pooling after the first convolution: for 32x32 pixels
    **{
        f"resnet18_w{n}": ("resnet18", {"channels": (n, 2 * n, 4 * n, 8 * n), "stem_pool": False}) for n in (16, 20, 28)
    },
    "resnet18_slim": ("resnet18", {"channels": (64, 128, 192, 256)}),
    "vit_nano": ("vit_tiny_patch16_224", {"embed_dim": 128, "num_heads": 2}),
    "vit_tiny": ("vit_tiny_patch16_224", {}),
    "vit_small": ("vit_small_patch16_224", {}),
    "deit_tiny": ("deit_tiny_patch16_224", {}),
    "deit_small": ("deit_small_patch16_224", {}),
    "vit_nano_cifar": ("vit_tiny_patch16_224", {"embed_dim": 128, "num_heads": 2, "patch_size": 4, "img_size": 32}),
    "vit_tiny_cifar": ("vit_tiny_patch16_224", {"patch_size": 4, "img_size": 32}),
}


# names that `timm_models` adds to timm's
REGISTERED: set[str] = set()


def parse_name(name: str) -> tuple[str | None, str]:
    """Split a model's name into prefix and backbone: `od_resnet18` -> ("od", "resnet18").

    The prefix of a static model is None.

    Raises:
        ConfigError: the name is unknown.
    """
    # timm's own names may begin with a prefix, such as eca_nfnet_l0
    if name in BACKBONES or _is_static(name):
        return None, name
    prefixes = [prefix for prefix in PREFIXES if name.startswith(prefix + "_")]
    for prefix in sorted(prefixes, key=len, reverse=True):
        backbone = name.removeprefix(prefix + "_")
        if backbone in BACKBONES or _is_static(backbone):
            return prefix, backbone
    known = [name for name in timm.list_models() if _is_static(name)] + list(BACKBONES)
    known += [f"{m}_{b}" for m in PREFIXES for b in ("resnet18", "resnet50", "mobilenetv2_100", *BACKBONES)]
    close = difflib.get_close_matches(name, known, 1)
    raise ConfigError(
        f"unknown model '{name}'"
        + (f", did you mean '{close[0]}'?" if close else "")
        + f" A model is a timm name, or METHOD_NAME with METHOD one of {', '.join(PREFIXES)}"
    )


def _is_static(name: str) -> bool:
    """Whether a name is timm's own."""
    return timm.is_model(name) and name not in REGISTERED


def build_model(
    config: str | os.PathLike | dict, num_classes: int = 1000, *, init_static: str = "", **overrides: Any
) -> nn.Module:
    """Build the model of a config.

    Args:
        config: path of a JSON file, or a dict of the same keys. Its training options are checked and ignored.
        num_classes: size of the classifier's output.
        init_static: path or URL of a static network's weights, or timm:NAME, from which the dynamic layers start.
        overrides: settings that replace the config's.

    Returns:
        A model with the input [B, 3, H, W] (or `in_chans` for 3) and the output logits [B, num_classes].

    Raises:
        ConfigError: (a ValueError) names the key of an unknown or mistyped setting, and the layer and the warehouse of
            a ratio that does not divide.
    """
    model, method, settings, name = _parts(config, num_classes, overrides)
    if init_static:
        if method is None:
            raise ConfigError(f"init_static is for dynamic models; '{name}' is static: use --finetune")
        try:
            load_static(model, init_static)
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f"init_static: {error}") from None
    if method is None:
        return model
    try:
        return convert(model, method, keep_weights=bool(init_static), **settings)
    except ValueError as error:
        raise ConfigError(f"model '{name}': {error}") from None


def report_model(
    config: str | os.PathLike | dict, num_classes: int = 1000, *, input_size: int | None = None, **overrides: Any
) -> ConversionReport:
    """Report what a dynamic model changes in its static network; the arguments and errors are those of `build_model`.

    Args:
        input_size: height and width of the images that multiply-adds are counted for, if the network takes them; None:
            the network's own.

    Raises:
        ConfigError: as for `build_model`, and where the model is static.
    """
    with torch.device("meta"):
        model, method, settings, name = _parts(config, num_classes, overrides)
    if input_size is not None:
        channels = read_config(config, overrides).get("in_chans") or (model.pretrained_cfg.get("input_size") or (3,))[0]
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (channels, input_size, input_size)}
    if method is None:
        raise ConfigError(f"'{name}' is static: there is nothing to report")
    try:
        return convert(model, method, dry_run=True, **settings)
    except ValueError as error:
        raise ConfigError(f"model '{name}': {error}") from None


def _parts(
    config: str | os.PathLike | dict, num_classes: int, overrides: dict[str, Any]
) -> tuple[nn.Module, str | None, dict[str, Any], str]:
    """The static network of a config, the method that converts it or None, its settings, and the model's name."""
    config = read_config(config, overrides)
    prefix, backbone = parse_name(config.get("model", "convnext_tiny"))
    method, defaults = PREFIXES.get(prefix, (None, {}))
    given = config.get("block_attention")
    if given and defaults.get("block_attention", given) != given:
        raise ConfigError(f"block_attention '{given}' contradicts the model's name '{config['model']}'")
    config = {**defaults, **{key: value for key, value in config.items() if value is not None}}
    settings = {key: value for key, value in config.items() if key in METHOD_KEYS}
    if method is None and settings:
        raise ConfigError(
            f"'{next(iter(settings))}' is for dynamic models such as kw_{backbone}; '{backbone}' is static: leave it "
            "out, or name a dynamic model"
        )
    model = _static(backbone, num_classes, config)
    if config.get("initialisation") == "released":
        start_as_released(model, keep_classifier=method is not None and not METHODS[method].released_classifier)
    return model, method, settings, config.get("model", "convnext_tiny")


def _static(backbone: str, num_classes: int, config: dict[str, Any]) -> nn.Module:
    """Build the static model with timm, with the config's regularisation, block attention and initial scales."""
    kwargs = {"num_classes": num_classes, "drop_rate": config.get("dropout") or 0.0}
    rate = config.get("drop_path") or 0.0
    is_resnet = re.match(r"resnet\d", backbone) is not None
    schedule = config.get("block_drop_path") or ("constant" if is_resnet else "linear")
    if schedule == "linear" and rate:
        kwargs["drop_path_rate"] = rate
    if config.get("in_chans", 3) != 3:
        kwargs["in_chans"] = config["in_chans"]
    if "convnext" in backbone:
        for key, name in (("layer_scale_init_value", "ls_init_value"), ("head_init_scale", "head_init_scale")):
            if config.get(key) is not None:
                kwargs[name] = config[key]
    if config.get("block_attention"):
        if not re.match(r"(test_resnet|resnet\d)", backbone):
            raise ConfigError(f"block_attention '{config['block_attention']}' is for ResNets, not for '{backbone}'")
        kwargs["block_args"] = {"attn_layer": BLOCK_ATTENTIONS[config["block_attention"]]}
    name, own = BACKBONES.get(backbone, (backbone, {}))
    own = dict(own)
    stem_pool = own.pop("stem_pool", True)
    try:
        model = timm.create_model(name, **{**own, **kwargs})
    except TypeError as error:
        raise ConfigError(f"model '{backbone}' does not take a setting: {error}") from None
    if not stem_pool:
        model.maxpool = nn.Identity()
    if schedule == "constant" and rate:
        # the released ResNets drop every block at the same rate; timm's rate grows with depth
        blocks = [m for m in model.modules() if hasattr(m, "drop_path") and hasattr(m, "conv2")]
        if not blocks:
            raise ConfigError(f"block_drop_path 'constant' is for ResNets; '{backbone}' takes 'linear'")
        for block in blocks:
            block.drop_path = DropPath(rate)
    return model
