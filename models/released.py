"""Renames the weights of released checkpoints and of torchvision's to this project's names.

A released model names its layers as torchvision (MobileNetV2) or the original repository (ConvNeXt) does, and numbers
its warehouses. This project uses timm's names.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .replacement import STATIC

_MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)


def _mobilenetv2_name(name: str) -> str | None:
    """torchvision's `features.4.conv.1.0` -> timm's `blocks.2.0.conv_dw`; None for a name that is not torchvision's."""
    if match := re.match(r"classifier\.1\.?(?:conv\.)?(.*)", name):
        return f"classifier.{match[1]}"
    match = re.match(r"features\.(\d+)\.(.*)", name)
    if match is None:
        return None
    index, rest = int(match[1]), match[2]
    last = 1 + sum(_MOBILENET_BLOCKS)
    if index in (0, last):
        conv, norm = ("conv_stem", "bn1") if index == 0 else ("conv_head", "bn2")
        return re.sub(r"^0\.", conv + ".", re.sub(r"^1\.", norm + ".", rest))
    index -= 1
    for stage, count in enumerate(_MOBILENET_BLOCKS):
        if index < count:
            break
        index -= count
    parts = {
        "conv.0.0": "conv_dw" if stage == 0 else "conv_pw",
        "conv.0.1": "bn1",
        "conv.1.0": "conv_dw",
        "conv.1.1": "bn2",
        "conv.2": "conv_pwl",
        "conv.3": "bn3",
    }
    if stage == 0:
        parts = {"conv.0.0": "conv_dw", "conv.0.1": "bn1", "conv.1": "conv_pw", "conv.2": "bn2"}
    for part, ours in parts.items():
        if rest.startswith(part + "."):
            return f"blocks.{stage}.{index}.{ours}{rest[len(part) :]}"
    return None


_CONVNEXT_RULES = (
    (r"downsample_layers\.0\.(\d+)\.", r"stem.\1."),
    (r"downsample_layers\.(\d+)\.(\d+)\.", r"stages.\1.downsample.\2."),
    (r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _convnext_name(name: str) -> str:
    for pattern, ours in _CONVNEXT_RULES:
        name = re.sub(pattern, ours, name, count=1)
    return name


def _rename_of(keys: Iterable[str]) -> Callable[[str], str | None]:
    """The function that turns the names in a state dict into timm's; the keys tell the model's family."""
    if any(key.startswith("features.") for key in keys):
        return _mobilenetv2_name
    if any(key.startswith("downsample_layers.") for key in keys):
        return _convnext_name
    return lambda name: name


def own_keys(model: nn.Module, state: dict[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
    """Rename the keys of a released model's state dict to this project's.

    Args:
        model: the model to load into. It defines the names and the order of the warehouses; a key that it has itself is
            left unchanged.
        state: name -> value, of this project or released.
        without: names of modules that were removed from the model.

    Returns:
        The same values. A key that matches no name of the model loses only the prefix of DistributedDataParallel.
    """
    own = set(model.state_dict())
    # DistributedDataParallel adds this prefix
    state = {key if key in own else key.removeprefix("module."): value for key, value in state.items()}
    rename = _rename_of([key for key in state if key not in own])
    # the warehouses of the whole model, even if its classifier was removed
    labels = dict.fromkeys(getattr(model, "conversion", {}).values())
    warehouses = [label for label in labels if not label.startswith(STATIC)]
    taken_off = tuple(f"{name}." for name in without)
    result = {}
    for key, value in state.items():
        if match := re.fullmatch(r"warehouse_manager\.weights\.(\d+)", key):
            index = int(match[1])
            ours = f"warehouses.{warehouses[index]}.cells" if index < len(warehouses) else key
        else:
            ours = rename(key)
        known = ours in own or (ours is not None and ours.startswith(taken_off))
        result[ours if key not in own and known else key] = value
    return result
