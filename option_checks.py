"""Checks of the options of a run, before anything slow is done."""

import argparse
import os
from collections.abc import Container

from models.config import ConfigError
from models.download import parse_url


def check_weights(args: argparse.Namespace, asked: Container[str]) -> None:
    """Refuse wrong paths of weights, and options that contradict each other, before anything slow is done.

    Raises:
        ConfigError: names the option.
    """
    if args.finetune and args.init_static:
        raise ConfigError("--finetune starts a dynamic network, --init_static a static one's layers: give one of them")
    if args.eval and args.disable_eval and "disable_eval" in asked:
        raise ConfigError("--disable_eval true: this command only evaluates; leave it out")
    for option in ("resume", "finetune", "init_static"):
        path = getattr(args, option)
        if args.eval and args.resume and path and option != "resume":
            if option in asked:
                raise ConfigError(f"--{option} {path}: the weights of --resume are evaluated; give one of the two")
            # of a config for training
            setattr(args, option, "")
            continue
        check_source(option, path)


def check_source(option: str, path: str) -> None:
    """Refuse the path of a checkpoint that cannot be read; an empty one is fine.

    Raises:
        ConfigError: names the option.
    """
    if path.startswith("timm:"):
        if option != "init_static":
            raise ConfigError(
                f"--{option} {path}: timm: is for --init_static, from which dynamic layers start; give the path or URL "
                "of a checkpoint"
            )
    elif "://" in path:
        try:
            parse_url(path)
        except ValueError as error:
            raise ConfigError(f"--{option} {error}") from None
    elif path and not os.path.isfile(path):
        raise ConfigError(f"--{option} {path}: no such file")


def check_data(args: argparse.Namespace, asked: Container[str]) -> None:
    """Refuse wrong paths of data, and an odd batch size for mixing, before anything slow is done.

    Raises:
        ConfigError: names the option.
    """
    if args.data_set == "digits" and args.data_path and "data_path" in asked:
        whose = "--data_set is" if "data_set" in asked or not args.resume else "the checkpoint was trained on"
        raise ConfigError(
            f"--data_path {args.data_path}: {whose} digits, which are embedded and read no folder; add --data_set "
            "IMNET for this one, or leave --data_path out"
        )
    for option in ("data_path", "eval_data_path"):
        path = getattr(args, option)
        if path and "/" not in args.data_set and not os.path.isdir(path):
            raise ConfigError(f"--{option} {path}: no such folder")
    if args.data_set in ("IMNET", "image_folder") and not (args.data_path or (args.eval and args.eval_data_path)):
        raise ConfigError(f"--data_set {args.data_set} needs --data_path, the folder that holds the data")
    if args.output_dir and os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise ConfigError(f"--output_dir {args.output_dir}: not a folder")
    if args.in_chans not in (1, 3):
        raise ConfigError(f"--in_chans {args.in_chans}: images are read as colours, so it is 3, or 1 for grey ones")
    if args.batch_size % 2 and not args.eval and mixes(args):
        raise ConfigError(f"--batch_size {args.batch_size} must be even, since mixup and cutmix mix pairs of images")


def mixes(args: argparse.Namespace) -> bool:
    """Whether training images are mixed in pairs, by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
