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
from models.options import all_options
from models.weights import matched_state, state_dict_of


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
        checkpoint = {**checkpoint, "model": checkpoints.weights_of(checkpoint, path, ema)["model"]}
    given = {} if config is None else merge(config, {})
    args = argparse.Namespace(**{**{name: option.default for name, option in all_options().items()}, **given})
    if config is None:
        checkpoints.adopt(args, given, checkpoint, path)
    own = checkpoints.own_options(checkpoint)
    settings = checkpoints.model_settings(args, given)
    classes = own.get("classes")
    told = given.get("nb_classes") or (len(classes) if classes else own.get("nb_classes"))
    try:
        checkpoints.check_size(settings, told or 1, checkpoint, path)
        args.nb_classes = told or _classes_of(settings, checkpoint) or args.nb_classes
        model = build_model(settings, num_classes=args.nb_classes)
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if str(path) in text else f"{path}: {text}") from None
    checkpoints.load(model, checkpoint, path)
    return Trained(model.eval(), None if not classes else tuple(classes), args, make_transform(args, is_train=False))


def _classes_of(settings: dict[str, Any], checkpoint: dict[str, Any]) -> int | None:
    """The number of classes of the weights of a checkpoint that does not tell it; None where they do not show it.

    In a model for a number of classes that no layer has by chance, they are the dimensions of that size.
    """
    unusual = 9973
    with torch.device("meta"):
        model = build_model(settings, num_classes=unusual)
    state = matched_state(model, state_dict_of(checkpoint))[0]
    sizes = {
        value.shape[dimension]
        for key, like in model.state_dict().items()
        if (value := state.get(key)) is not None and value.ndim == like.ndim
        for dimension, size in enumerate(like.shape)
        if size == unusual
    }
    return sizes.pop() if len(sizes) == 1 else None
