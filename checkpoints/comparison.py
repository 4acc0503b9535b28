"""What a run changes of the options that its checkpoint was trained with: refused where it cannot be right, or told."""

import argparse
from pathlib import Path
from typing import Any

from models.build import PREFIXES, parse_name
from models.config import ConfigError
from models.methods import METHODS
from models.options import all_options
from utils import log

from .settings import own_options

# groups of options that change what is trained, or how
_TOLD = ("temperature", "training", "optimizer", "augmentation")
# options of these groups that change neither
_SILENT = {"device", "compile", "channels_last", "model_ema_force_cpu"}
# of an optimizer's state: another optimizer has other entries, or reads the same ones in another way
_SAME_OPTIMIZER = {"nesterov": "sgd"}
# of a method: a limit, which changes no layer
_NO_SETTINGS = {"allow_growth"}
# what an evaluation depends on beside the method's settings
_OF_EVALUATION = {"imagenet_default_mean_and_std", "traditional_preprocess", "crop_pct", "input_size"}


def compare(checkpoint: dict[str, Any], path: str | Path, args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Compare the options of a run with those of the checkpoint that it continues or evaluates, and print the changes.

    Args:
        checkpoint: content of the checkpoint; one without options passes.
        path: its path, for the messages.
        args: all options of the run.
        given: those of them that the command line, the config or the recipe gave.

    Raises:
        ConfigError: a setting of the method or the optimizer differs: the weights would mean something else.
    """
    own = own_options(checkpoint)
    if "model" not in own:
        return
    _check_method(own, path, args, given)
    told = {name for name, option in all_options().items() if option.group in _TOLD} - _SILENT
    told |= {"imagenet_default_mean_and_std", "data_set"}
    if args.eval:
        told = _OF_EVALUATION
    elif checkpoint.get("optimizer") is not None:
        _check_training(checkpoint, own, path, args)
    changes = []
    chosen = {*given, *own.get("given", own)}
    for name in sorted(told & chosen):
        old, new = own.get(name), getattr(args, name)
        if name in own and _plain(old) != _plain(new):
            changes.append(f"{name} {_shown(old)} -> {_shown(new)}")
    if changes:
        log(f"note: other options than those of {path}: {', '.join(changes)}")


def _check_method(own: dict[str, Any], path: str | Path, args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Refuse other settings of the same method; another model is refused where its weights are loaded."""
    theirs, ours = _method(own["model"]), _method(args.model)
    if ours is None or theirs is not ours:
        return
    told = own.get("given", [name for name, option in all_options().items() if own.get(name) != option.default])
    for name, (default, _) in ours.settings.items():
        if name in _NO_SETTINGS:
            continue
        old = _resolved(own.get(name) if name in told else None, default)
        new = _resolved(given.get(name), default)
        if old != new:
            remedy = "evaluate with" if args.eval else "continue with"
            raise ConfigError(
                f"{path}: it was trained with {name} {_shown(old)}, and this run has {_shown(new)}; {remedy} the "
                f"--kw_config of its training, or with --{name} {_shown(old)}"
            )
    layers = _plain(own.get("layers") if "layers" in told else None), _plain(given.get("layers"))
    if layers[0] != layers[1]:
        raise ConfigError(
            f"{path}: it was trained with layers {_shown(layers[0])}, and this run has {_shown(layers[1])}; use the "
            "--kw_config of its training"
        )


def _check_training(
    checkpoint: dict[str, Any], own: dict[str, Any], path: str | Path, args: argparse.Namespace
) -> None:
    """Refuse what the state of a run cannot be continued with."""
    fresh = "to start a new run from its weights, give --finetune instead of --resume, and another --output_dir"
    old, new = (_SAME_OPTIMIZER.get(opt, opt) for opt in (own.get("opt", args.opt), args.opt))
    if old != new:
        raise ConfigError(
            f"{path}: it was trained with --opt {own['opt']}, whose state --opt {args.opt} cannot continue; {fresh}"
        )
    if checkpoint.get("progress") is None:
        return
    for name in ("seed", "data_set"):
        if name in own and own[name] != getattr(args, name):
            raise ConfigError(
                f"{path}: it was saved within an epoch whose order of images is that of --{name} {own[name]}; continue "
                f"with it, or {fresh}"
            )


def _method(model: Any) -> type | None:
    """The method of a model's name; None of a static or an unknown one."""
    try:
        prefix, _ = parse_name(model)
    except (ConfigError, TypeError, AttributeError):
        return None
    name, _ = PREFIXES.get(prefix, (None, {}))
    return METHODS.get(name)


def _resolved(value: Any, default: Any) -> Any:
    """The value of a setting, in plain types; a list of one counts as its item."""
    value = _plain(default if value is None else value)
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return float(value) if type(value) is int else value


def _shown(value: Any) -> str:
    value = f"{value:g}" if isinstance(value, float) else str(value)
    return ascii(value)[1:-1][:60]
