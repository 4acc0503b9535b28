"""Loading checkpoints: ours, and the released ones of KernelWarehouse, by key maps.

A released model names its layers after torchvision (MobileNetV2) or the original repository (ConvNeXt), and numbers
its warehouses; timm's names are used here.  The foreign names pass through one function, `released_keys`.
"""

import argparse
import pickle
import re
import zipfile
from pathlib import Path

import torch

_MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)


def _mobilenetv2_name(name):
    """torchvision's `features.4.conv.1.0` -> timm's `blocks.2.0.conv_dw`."""
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


def _convnext_name(name):
    for pattern, ours in _CONVNEXT_RULES:
        name = re.sub(pattern, ours, name, count=1)
    return name


def released_keys(model, state):
    """A released state dict under this project's names and shapes; another state dict as it is.

    model: the model to load into, which tells the backbone and the order of its warehouses.
    """
    # DistributedDataParallel's prefix
    state = {key.removeprefix("module."): value for key, value in state.items()}
    rename = lambda name: name  # noqa: E731
    if any(key.startswith("features.") for key in state):
        rename = _mobilenetv2_name
    elif any(key.startswith("downsample_layers.") for key in state):
        rename = _convnext_name
    # of the whole model, also where its classifier was taken off
    names = list(dict.fromkeys(getattr(model, "conversion", {}).values()))
    result = {}
    for key, value in state.items():
        if match := re.fullmatch(r"warehouse_manager\.weights\.(\d+)", key):
            index = int(match[1])
            ours = f"warehouses.{names[index]}.cells" if index < len(names) else key
        else:
            ours = rename(key) or key
        result[ours] = value
    return result


def _fit_shape(value, like):
    """Released 1x1 convolutions are linear layers here, and layer scales vectors: the same numbers, fewer ones."""
    squeezed = [tuple(size for size in tensor.shape if size != 1) for tensor in (value, like)]
    return value.reshape(like.shape) if value.shape != like.shape and squeezed[0] == squeezed[1] else value


def read_checkpoint(path):
    """The content of a checkpoint file, which never runs code.

    Raises FileNotFoundError, or ValueError for a file that is damaged, is no checkpoint, or holds anything but
    tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint '{path}' does not exist" if not path.exists() else f"'{path}' is no file")
    try:
        # torch notices no flipped bit, the container's checksums do
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"checkpoint '{path}' is damaged (checksum of {damaged}); use another copy")
        # released checkpoints keep their options in this plain record
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise ValueError(
                f"checkpoint '{path}' holds Python objects other than tensors and plain values, which could run code, "
                "or is no checkpoint; nothing was loaded. Save its state dict alone and load that"
            ) from None
        raise ValueError(f"'{path}' is no checkpoint: {_first_line(error)}") from None
    except (RuntimeError, EOFError, zipfile.BadZipFile, KeyError, AttributeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"checkpoint '{path}' is truncated or no checkpoint: {_first_line(error)}") from None


def _first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def state_dict_of(checkpoint, model_key="model|module"):
    """The state dict inside a checkpoint: under one of the keys, `state_dict`, or the whole of it."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"a checkpoint is a dict, not {type(checkpoint).__name__}")
    for key in [*model_key.split("|"), "state_dict"]:
        if isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    if not checkpoint or not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise ValueError(
            f"no weights found: the checkpoint has the keys {list(checkpoint)[:6]} and none of {model_key}|state_dict"
        )
    return checkpoint


def matched_state(model, state):
    """A state dict (ours or released) under the model's names; its differences from the model's.

    Returns (state, missing keys, unexpected keys, keys of another shape).
    """
    own = model.state_dict()
    state = released_keys(model, state)
    state = {key: _fit_shape(value, own[key]) if key in own else value for key, value in state.items()}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    return state, missing, unexpected, wrong


def load_weights(model, checkpoint, model_key="model|module", without=()):
    """Load a checkpoint into a model, strictly.

    checkpoint: a path, a loaded checkpoint or a bare state dict; this project's or a released one.
    without: names of modules that were taken off the model, and that the checkpoint may still have.
    Returns the model.  Raises ValueError that lists the first keys that differ, and changes nothing then.
    """
    name = "the checkpoint"
    if not isinstance(checkpoint, dict):
        name = f"'{checkpoint}'"
        checkpoint = read_checkpoint(checkpoint)
    state, missing, unexpected, wrong = matched_state(model, state_dict_of(checkpoint, model_key))
    if without:
        gone = [key for key in unexpected if key.startswith(tuple(f"{name}." for name in without))]
        state = {key: value for key, value in state.items() if key not in gone}
        unexpected = [key for key in unexpected if key not in gone]
    if missing or unexpected or wrong:
        own = model.state_dict()
        shapes = [f"{key} {list(state[key].shape)} for {list(own[key].shape)}" for key in wrong]
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if keys
        ]
        raise ValueError(f"{name} is of another model: {'; '.join(parts)}. Use the config that it was trained with")
    model.load_state_dict(state)
    return model


def warehouse_layers(model):
    """Parameter name of every warehouse -> the names of the layers that take cells from it."""
    names = {id(warehouse): name for name, warehouse in getattr(model, "warehouses", {}).items()}
    users = {f"warehouses.{name}.cells": [] for name in names.values()}
    for layer, module in model.named_modules():
        if id(getattr(module, "_warehouse", None)) in names:
            users[f"warehouses.{names[id(module._warehouse)]}.cells"].append(layer)
    return users
