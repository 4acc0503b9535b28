"""Loads weights strictly: this project's, and the released ones of KernelWarehouse and ODConv."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .reader import read_checkpoint
from .released import own_keys


def state_dict_of(checkpoint: dict[str, Any], model_key: str = "model|module") -> dict[str, Any]:
    """Find the state dict in a checkpoint.

    Args:
        checkpoint: a loaded checkpoint, or a bare state dict.
        model_key: keys of the state dict to try in this order, separated by "|"; "state_dict" is tried last.

    Returns:
        The dict under the first of these keys, or the checkpoint itself if it holds nothing but tensors.

    Raises:
        ValueError: the checkpoint is not a dict, or has no state dict.
    """
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


def _fit_shape(value: Tensor, like: Tensor) -> Tensor:
    """Reshape a tensor to the shape of another one if the two shapes differ by dimensions of size 1 only.

    Released 1x1 convolutions are linear layers here, and released layer scales [1, C, 1, 1] are vectors.
    """
    squeezed = [tuple(size for size in tensor.shape if size != 1) for tensor in (value, like)]
    return value.reshape(like.shape) if value.shape != like.shape and squeezed[0] == squeezed[1] else value


def matched_state(
    model: nn.Module, state: dict[str, Any], without: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str], list[str], list[str]]:
    """Rename a state dict to the model's names and compare it with the model.

    Args:
        model: the model to load into.
        state: state dict of this project or a released one.
        without: names of modules that were removed from the model.

    Returns:
        The renamed state dict, the missing keys, the unexpected keys, and the keys of another shape.
    """
    own = model.state_dict()
    state = own_keys(model, state, without)
    state = {key: _fit_shape(value, own[key]) if key in own else value for key, value in state.items()}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    return state, missing, unexpected, wrong


def load_weights(
    model: nn.Module,
    checkpoint: str | os.PathLike | dict[str, Any],
    model_key: str = "model|module",
    without: Sequence[str] = (),
) -> nn.Module:
    """Load a checkpoint into a model, strictly.

    Args:
        model: changed in place.
        checkpoint: path, URL, loaded checkpoint or bare state dict; of this project or a released one.
        model_key: as for `state_dict_of`.
        without: names of modules that were removed from the model and that the checkpoint may still have.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or its keys differ from the model's; lists the first of these. The model is
            left unchanged.
    """
    name = "the checkpoint"
    if not isinstance(checkpoint, dict):
        name = f"'{checkpoint}'"
        checkpoint = read_checkpoint(checkpoint)
    state, missing, unexpected, wrong = matched_state(model, state_dict_of(checkpoint, model_key), without)
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
    take_state(model, state)
    return model


def take_state(model: nn.Module, state: dict[str, Any], strict: bool = True) -> None:
    """Load a state dict that `matched_state` has compared with the model.

    Modules such as torchvision's MNASNet check the version of a state dict, which renaming drops. Names and shapes that
    are those of the model are of its version, too.
    """
    state = OrderedDict(state)
    state._metadata = model.state_dict()._metadata
    model.load_state_dict(state, strict=strict)
