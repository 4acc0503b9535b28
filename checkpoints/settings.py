"""The options that a checkpoint carries: take them over, and compare them with those of a run."""

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch

from models import build_model
from models.config import ConfigError, check_value
from models.options import MODEL_KEYS, all_options
from models.weights import state_dict_of

# options of a machine, which a checkpoint of another one does not decide
LOCAL = {"data_path", "eval_data_path", "device", "num_workers", "pin_mem", "nb_classes"}
# options that choose how an evaluation resizes and crops its images
CROPS = {"crop_pct", "traditional_preprocess"}
# parameters that a network may have beyond twice those of its checkpoint's weights, before its settings are refused
SPARE = 10_000_000


def own_options(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint's run; empty for one of another project, whose options are not this project's."""
    own = checkpoint.get("args")
    return own if isinstance(own, dict) else {}


def adopt(args: argparse.Namespace, given: dict[str, Any], checkpoint: dict[str, Any], path: str) -> None:
    """Take the options of a run from its checkpoint, since nothing else names a model.

    Args:
        args: all options; those that are neither given nor a matter of the machine become the checkpoint's. For an
            evaluation, `trained_on` is added, the data set whose preprocessing counts, with `trained_classes`, the
            number of classes, and the precision stays.
        given: options that the command line, the config or the recipe gave; extended.
        checkpoint: content of the checkpoint.
        path: its path, for the error message.

    Raises:
        ConfigError: the checkpoint does not hold the options of its run, or they are of a network far larger than its
            weights.
    """
    own = own_options(checkpoint)
    if "model" not in own:
        raise ConfigError(f"{path}: this checkpoint does not tell its model; give --kw_config or --model")
    if args.eval and "data_set" in own and not CROPS & given.keys():
        args.trained_on = check_value(all_options()["data_set"], own["data_set"], f'{path}: its option "data_set"')
    skipped = LOCAL | ({"use_amp"} if args.eval else set())
    for name, option in all_options().items():
        if option.group in ("run", "checkpoints", "processes") or name in skipped or name in given or name not in own:
            continue
        # a setting that was not given is the method's choice; earlier checkpoints do not tell which were given
        if name in own["given"] if "given" in own else own[name] != option.default:
            given[name] = check_value(option, own[name], f'{path}: its option "{name}"')
            setattr(args, name, given[name])
    if "nb_classes" not in given and "nb_classes" in own:
        # for data that do not tell their number of classes; others decide it themselves
        args.nb_classes = check_value(all_options()["nb_classes"], own["nb_classes"], f"{path}: its number of classes")
        if args.eval:
            args.trained_classes = args.nb_classes
    args.given = sorted(given)


def model_settings(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """The config of a run's model, for `build_model`: its name, and those of its settings that were given."""
    return {name: value for name, value in given.items() if name in MODEL_KEYS} | {"model": args.model}


def check_size(settings: dict[str, Any], nb_classes: int, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Refuse a network far larger than the weights of its checkpoint, before it takes all memory.

    Raises:
        ConfigError: names the numbers of parameters; or the settings or the weights are wrong.
    """
    try:
        held = sum(value.numel() for value in state_dict_of(checkpoint).values())
        # shapes alone take no memory
        with torch.device("meta"):
            model = build_model(settings, num_classes=nb_classes)
        wanted = sum(parameter.numel() for parameter in model.parameters())
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (RuntimeError, OverflowError):
        # sizes beyond 64 bits
        held, wanted = 0, math.inf
    if wanted > 2 * held + SPARE:
        raise ConfigError(
            f"{path}: its options are of a network of {wanted:,} parameters, and its weights have {held:,}; use "
            "another copy, or give the --kw_config that it was trained with"
        )


def check_classes(checkpoint: dict[str, Any], path: str | Path, classes: list[str] | None) -> None:
    """Compare the names of the classes of the data with those of a checkpoint; nothing where either are not known.

    Raises:
        ConfigError: names the first difference.
    """
    own = own_options(checkpoint).get("classes")
    if not own or not classes or list(own) == classes:
        return
    pairs = enumerate(itertools.zip_longest(own, classes))
    index, (theirs, ours) = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
    theirs, ours = ("missing" if name is None else repr(name[:60]) for name in (theirs, ours))
    raise ConfigError(
        f"{path}: it was trained on {len(own)} classes and the data have {len(classes)} others: class {index} is "
        f"{theirs} in the checkpoint and {ours} in the data; give data whose folders of classes have the names of the "
        "training data, or take the weights over to other classes with --finetune"
    )
