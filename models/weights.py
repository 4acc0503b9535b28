"""Loads weights strictly: this project's, and the released ones of KernelWarehouse and ODConv."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .messages import first_line, quiet
from .methods.kernel_warehouse import warehouse_layers
from .reader import read_checkpoint
from .released import own_keys
from .temperature import set_temperature


def state_dict_of(checkpoint: dict[str, Any], model_key: str = "model|module") -> dict[str, Any]:
    """Find the state dict in a checkpoint.

    Args:
        checkpoint: a loaded checkpoint, or a bare state dict.
        model_key: keys of the state dict to try in this order, separated by "|"; "state_dict" is tried last.

    Returns:
        The dict under the first of these keys, or the checkpoint itself if it holds nothing but tensors.

    Raises:
        ValueError: the checkpoint is not a dict, or has no state dict, or this holds anything but named tensors.
    """
    if not isinstance(checkpoint, dict):
        raise ValueError(f"a checkpoint is a dict, not {type(checkpoint).__name__}")
    for key in [*model_key.split("|"), "state_dict"]:
        if isinstance(checkpoint.get(key), dict):
            return _checked(checkpoint[key])
    if not checkpoint or not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise ValueError(
            f"no weights found: the checkpoint has the keys {list(checkpoint)[:6]} and none of {model_key}|state_dict"
        )
    return _checked(checkpoint)


def _checked(state: dict[Any, Any]) -> dict[str, Tensor]:
    """The same state dict.

    Raises:
        ValueError: names the first entry that is no dense tensor, or whose key is no text.
    """
    for key, value in state.items():
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r} of its weights is no text; the file is damaged, use another copy")
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            kind = "a sparse tensor" if isinstance(value, Tensor) else f"no tensor, but of type {type(value).__name__}"
            raise ValueError(f"its weight '{key}' is {kind}; the file is damaged, use another copy")
    return state


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


def load_fitting(model: nn.Module, state: dict[str, Any], name: str) -> bool:
    """Load the state dict of a trained network; a classifier of another size keeps its initial weights.

    Args:
        model: the model to load into, changed in place.
        state: state dict of this project or another.
        name: of the checkpoint, for messages.

    Returns:
        Whether the classifier was left out.

    Raises:
        ValueError: the checkpoint is of another model; lists the first keys that differ.
    """
    state, missing, unexpected, wrong = matched_state(model, state)
    head, differs = _classifier_keys(model), False
    if any(key.startswith(head) for key in wrong):
        differs, state = True, {key: value for key, value in state.items() if not key.startswith(head)}
        missing, unexpected, wrong = (
            [key for key in keys if not key.startswith(head)] for keys in (missing, unexpected, wrong)
        )
    if missing or unexpected or wrong:
        text = f"{name}: of another model; the first keys that differ: {', '.join([*missing, *unexpected, *wrong][:5])}"
        if any(f"{layer}.weight" in unexpected for layer in getattr(model, "conversion", {})):
            text += ". If these are the weights of the static network, give them as --init_static"
        else:
            text += ". Give weights of this network, or the model or config that they were trained with"
        raise ValueError(text)
    take_state(model, state, strict=False)
    return differs


def _classifier_keys(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the keys of the classifier, with the warehouses that it alone uses."""
    names = model.pretrained_cfg.get("classifier") or ()
    names = {names} if isinstance(names, str) else set(names)
    warehouses = [name for name, layers in warehouse_layers(model).items() if layers and names.issuperset(layers)]
    return (*(f"{name}." for name in names), *warehouses)


def load_trained(model: nn.Module, source: str | os.PathLike, model_key: str = "model|module") -> bool:
    """Load the weights of a trained model of the same kind; a classifier of another size keeps its initial weights.

    The temperature is restored where the checkpoint tells it. The arguments and the errors are those of `load_static`,
    without timm's weights.
    """
    checkpoint = read_checkpoint(source)
    differs = load_fitting(model, _state_in(checkpoint, source, model_key), str(source))
    if checkpoint.get("temperature") is not None:
        try:
            set_temperature(model, checkpoint["temperature"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source}: its temperature does not fit: {error}") from None
    return differs


def _state_in(checkpoint: Any, source: str | os.PathLike, model_key: str) -> dict[str, Tensor]:
    """`state_dict_of`, with the name of the file in its errors."""
    try:
        return state_dict_of(checkpoint, model_key)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def load_static(model: nn.Module, source: str, model_key: str = "model|module") -> bool:
    """Load the weights of a trained static network; a classifier of another size keeps its initial weights.

    Args:
        model: a static timm model, changed in place.
        source: path or URL of a checkpoint, or "timm:NAME", timm's pretrained weights.
        model_key: as for `state_dict_of`.

    Returns:
        Whether the classifier was left out.

    Raises:
        ValueError: the file cannot be read, its weights are of another model, or timm cannot get its weights.
        FileNotFoundError: there is no such file.
    """
    if source.startswith("timm:"):
        state = _timm_state(source.removeprefix("timm:"))
    else:
        state = _state_in(read_checkpoint(source), source, model_key)
    return load_fitting(model, state, source)


def _timm_state(name: str) -> dict[str, Any]:
    try:
        # the error tells what the client logs
        with quiet():
            return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        # timm and the Hugging Face client raise errors of many kinds
        raise ValueError(
            f"timm:{name}: timm cannot get these weights ({first_line(error)}). Download them where the "
            "network is reachable, and give the path of the file"
        ) from None


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
