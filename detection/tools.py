"""Shared by the commands of this folder: options, configs, and one-line errors."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmengine.config import Config, DictAction

from detection.check_data import check_data
from models.config import ConfigError, find_config
from models.download import parse_url

ROOT = Path(__file__).resolve().parent.parent


def parser(description: str) -> argparse.ArgumentParser:
    """A parser of the options that training and testing share, named as in mmdetection."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="a config of detection/configs")
    parser.add_argument("--work-dir", help="folder for logs and checkpoints; default work_dirs/NAME_OF_CONFIG")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="settings that override the config's, such as train_dataloader.batch_size=4",
    )
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    # torch.distributed.launch passes this option
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """The config that a command line names, with the options of the command line merged into it.

    Raises:
        ConfigError: there is no such file, or it cannot be read as a config.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = str(args.local_rank)
    path = Path(find_config(args.config))
    # mmengine runs the file as Python code
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"config '{path}': {'not a .py file' if path.is_file() else 'no such file'}")
    try:
        cfg = Config.fromfile(path)
        cfg.launcher = args.launcher
        if args.cfg_options is not None:
            cfg.merge_from_dict(args.cfg_options)
    except (OSError, SyntaxError, KeyError, TypeError, ValueError, NameError, AttributeError) as error:
        raise ConfigError(f"config '{path}': {error}") from None
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs") / path.stem)
    return cfg


def join(cfg: Config) -> None:
    """Join the other processes of a distributed run on machines without a GPU; mmengine itself does so only on GPUs."""
    if cfg.launcher == "pytorch" and not torch.cuda.is_available():
        torch.distributed.init_process_group("gloo")
        wrapper = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
        cfg.model_wrapper_cfg = {**wrapper, **(cfg.get("model_wrapper_cfg") or {})}


def require_checkpoint(path: str) -> None:
    """Raise ConfigError where a file does not exist, or a URL may not be downloaded."""
    if "://" in path:
        try:
            parse_url(path)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    elif not os.path.isfile(path):
        raise ConfigError(f"checkpoint '{path}': no such file")


def check(cfg: Config, phases: Sequence[str]) -> None:
    """Run `check_data` on the first process of a machine; the others would only repeat it."""
    if int(os.environ["LOCAL_RANK"]) == 0:
        check_data(cfg, phases)


def run(command: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    """Run a command with the options of `argv`; returns the exit code, 2 with one line for a user's mistake."""
    try:
        command(argv)
    except ConfigError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        # in a distributed run the other processes wait for this one, so exit at once
        if "RANK" in os.environ:
            os._exit(2)
        return 2
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        logging.shutdown()
        sys.stdout.flush()
        # gloo's threads may still hold Python objects, and would abort the interpreter during its shutdown
        os._exit(0)
    return 0
