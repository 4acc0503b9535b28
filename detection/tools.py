"""What the commands of this folder share: options, configs, and errors of one line."""

import argparse
import logging
import os
import sys
from pathlib import Path

import torch
from mmengine.config import Config, DictAction

from detection.check_data import check_data
from models.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def parser(description):
    """The options that training and testing share; mmdetection's own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="a config of detection/configs")
    parser.add_argument("--work-dir", help="folder for logs and checkpoints; default work_dirs/NAME_OF_CONFIG")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="settings that win over the config's, such as train_dataloader.batch_size=4",
    )
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    # torch.distributed.launch gives it
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(args):
    """The config of a command line.  Raises ConfigError."""
    if "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = str(args.local_rank)
    path = Path(args.config)
    # a Python config is code
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


def join(cfg):
    """Meet the other processes of a distributed run where there is no GPU: mmengine takes one for granted."""
    if cfg.launcher == "pytorch" and not torch.cuda.is_available():
        torch.distributed.init_process_group("gloo")
        wrapper = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
        cfg.model_wrapper_cfg = {**wrapper, **(cfg.get("model_wrapper_cfg") or {})}


def require_checkpoint(path):
    if "://" not in path and not os.path.isfile(path):
        raise ConfigError(f"checkpoint '{path}': no such file")


def check(cfg, phases):
    """`check_data`, on the first process of a host; the others would only do it again."""
    if int(os.environ["LOCAL_RANK"]) == 0:
        check_data(cfg, phases)


def run(main):
    """Run a command; a mistake of the user ends it with one line and exit code 2."""
    try:
        main()
    except ConfigError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        # the other processes of a distributed run wait for this one
        os._exit(2) if "RANK" in os.environ else sys.exit(2)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        logging.shutdown()
        sys.stdout.flush()
        # threads of gloo that still hold Python objects abort an interpreter that is taken down beneath them
        os._exit(0)
