"""The weights of a checkpoint: load them, and take them out of it."""

import argparse
from pathlib import Path
from typing import Any

import torch

from models import load_weights, set_temperature, temperature_range
from models.config import ConfigError
from models.options import all_options
from models.weights import load_fitting, state_dict_of
from utils import log

from .files import FORMAT, read
from .settings import LOCAL, own_options


def load(model: torch.nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Load the weights of a checkpoint and its temperature; one without a temperature gets the last of the schedule.

    Args:
        model: the model to load into.
        checkpoint: content of the checkpoint.
        path: its path, for the error message.

    Raises:
        ConfigError: the checkpoint is of another model; lists the first keys that differ.
    """
    temperature = checkpoint.get("temperature")
    try:
        load_weights(model, checkpoint)
        set_temperature(model, temperature_range(model)[1] if temperature is None else temperature)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def finetune(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Load the weights of --finetune. The classifier keeps its initial weights where its size differs.

    Raises:
        ConfigError: the checkpoint is of another model; lists the first keys that differ.
    """
    path, prefix = args.finetune, args.model_prefix
    checkpoint = read(path)
    try:
        state = state_dict_of(checkpoint, args.model_key)
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        differs = load_fitting(model, state, path)
    except ValueError as error:
        raise ConfigError(str(error) if path in str(error) else f"{path}: {error}") from None
    if differs:
        log(f"{path}: its classifier has another size and is left out")


def averaged(checkpoint: dict[str, Any] | None, path: str | Path | None, asked: bool) -> dict[str, Any] | None:
    """The checkpoint with its averaged weights in the place of its weights; None, which is logged, where it has none.

    Raises:
        ConfigError: it has none, and they were asked for.
    """
    if checkpoint is not None and checkpoint.get("model_ema"):
        return {**checkpoint, "model": checkpoint["model_ema"]}
    reason = "no checkpoint is evaluated" if checkpoint is None else f"{path}: {_without_average(checkpoint)}"
    if asked:
        raise ConfigError(f"{reason}; leave out --model_ema_eval")
    log(f"note: no averaged weights are evaluated, since {reason}")
    return None


def _without_average(checkpoint: dict[str, Any]) -> str:
    """Why a checkpoint has no averaged weights beside its own."""
    if "best" in checkpoint and "model_ema" not in checkpoint:
        # of `ema_state`
        return "its weights already are the averaged ones"
    return "holds no averaged weights, which a run keeps with --model_ema true"


def weights_of(checkpoint: dict[str, Any], path: str | Path, ema: bool = False) -> dict[str, Any]:
    """The part of a checkpoint that its use needs: `format`, `model`, `temperature` and `args`, where it has them.

    Of `args`, the options of a machine (paths, devices, processes) are left out. A checkpoint of another project keeps
    its weights alone.

    Args:
        checkpoint: content of a checkpoint.
        path: its path, for the error message.
        ema: take the averaged weights that a run with --model_ema true kept beside the trained ones.

    Raises:
        ConfigError: it has no such weights, or they hold anything but tensors.
    """
    if ema and not checkpoint.get("model_ema"):
        raise ConfigError(f"{path}: {_without_average(checkpoint)}; leave out --ema")
    try:
        state = state_dict_of({"model": checkpoint["model_ema"]} if ema else checkpoint)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    weights = {"format": FORMAT, "model": state}
    if isinstance(checkpoint.get("temperature"), (int, float)):
        weights["temperature"] = float(checkpoint["temperature"])
    own = own_options(checkpoint)
    kept = {name for name, option in all_options().items() if option.group not in ("run", "checkpoints", "processes")}
    kept = (kept - LOCAL) | {"nb_classes", "classes"}
    if own:
        weights["args"] = {name: value for name, value in own.items() if name in kept}
    if "given" in own:
        weights["args"]["given"] = [name for name in own["given"] if name in kept]
    return weights


def ema_state(state: dict[str, Any]) -> dict[str, Any]:
    """A separate checkpoint of the EMA weights of a training state, to evaluate and to fine-tune."""
    kept = ("format", "run", "epoch", "temperature", "best", "best_epoch", "args", "versions")
    return {"model": state["model_ema"], **{name: state[name] for name in kept if name in state}}
