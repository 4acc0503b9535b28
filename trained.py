"""A trained model, its classes and its preprocessing, from a checkpoint alone."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.transforms import Compose

import checkpoints
from loading.transforms import make_transform
from models import build_model
from models.config import ConfigError, merge
from models.options import MODEL_KEYS, all_options


@dataclass
class Trained:
    """A trained model in evaluation mode, and what a checkpoint says about it.

    Attributes:
        model: takes images [B, 3, H, W] that `transform` has prepared, and gives logits [B, classes].
        classes: names of the classes in the order of the logits; None: the checkpoint does not tell them.
        args: the options of its run.
        transform: from an RGB image to a tensor [3, input_size, input_size], as in the run's evaluation.
    """

    model: torch.nn.Module
    classes: tuple[str, ...] | None
    args: argparse.Namespace
    transform: Compose


def open_trained(path: str, config: str | dict[str, Any] | None = None, ema: bool = False) -> Trained:
    """Build the model of a checkpoint, with its weights and its temperature, on the CPU.

    Args:
        path: path or URL of a checkpoint of main.py; of another one, such as a released one, if there is a `config`.
        config: path or dict of a config for a checkpoint that does not tell its model.
        ema: use the averaged weights that a run with --model_ema true kept beside the trained ones.

    Raises:
        ConfigError: the checkpoint cannot be read, does not tell its model, or is of another model than `config`.
    """
    checkpoint = checkpoints.read(path)
    if ema:
        if not checkpoint.get("model_ema"):
            raise ConfigError(f"{path}: holds no averaged weights; a run keeps them with --model_ema true")
        checkpoint = {**checkpoint, "model": checkpoint["model_ema"]}
    given = {} if config is None else merge(config, {})
    args = argparse.Namespace(**{**{name: option.default for name, option in all_options().items()}, **given})
    if config is None:
        checkpoints.adopt(args, given, checkpoint, path)
    own = checkpoint.get("args", {})
    classes = own.get("classes")
    if "nb_classes" not in given:
        args.nb_classes = own.get("nb_classes", args.nb_classes)
    try:
        settings = {name: value for name, value in given.items() if name in MODEL_KEYS}
        model = build_model({**settings, "model": args.model}, num_classes=args.nb_classes)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    checkpoints.load(model, checkpoint, path)
    return Trained(
        model.eval(), None if classes is None else tuple(classes), args, make_transform(args, is_train=False)
    )
