#!/usr/bin/env python
"""Train a detector on a model of this project.

    python detection/train.py detection/configs/kw/mask_rcnn_kw1x_resnet50.py --amp
    bash detection/dist_train.sh CONFIG GPUS [OPTION ...]                (or torchrun, or srun)

A mistake in the options, the data or a checkpoint ends the command with one line and exit code 2, before any training.
"""

import sys
from pathlib import Path

# import from the project, not from this folder, whose file names would hide other modules
sys.path[0] = str(Path(__file__).resolve().parent.parent)
from startup import before_torch

before_torch()

import torch
from mmengine.runner import Runner

from detection import tools
from detection.hooks import newest_detector
from models.config import ConfigError


def train(argv: list[str] | None) -> None:
    parser = tools.parser(__doc__.splitlines()[0])
    parser.add_argument("--amp", action="store_true", help="train in mixed precision")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate to the batch size")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="continue from a checkpoint; without a path, from the newest good one of the work directory",
    )
    args = parser.parse_args(argv)
    cfg = tools.read_config(args)
    if args.amp:
        if not torch.cuda.is_available():
            raise ConfigError("--amp: mmengine's mixed precision needs a GPU, and there is none; leave it out")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.loss_scale = "dynamic"
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise ConfigError("--auto-scale-lr: the config has no auto_scale_lr.base_batch_size")
        cfg.auto_scale_lr.enable = True
    if args.resume is None and cfg.get("resume") and not cfg.get("load_from"):
        # by the config; mmengine would trust the file last_checkpoint
        args.resume = "auto"
    if args.resume is not None:
        path = newest_detector(cfg.work_dir) if args.resume == "auto" else args.resume
        cfg.load_from, cfg.resume = None if path is None else str(path), path is not None
    if cfg.get("load_from"):
        tools.require_checkpoint(cfg.load_from)
    tools.check(cfg, ("train", "val"))
    tools.join(cfg)
    Runner.from_cfg(cfg).train()


def main(argv: list[str] | None = None) -> int:
    """Run with the options of `argv` (None: the command line); returns the exit code."""
    return tools.run(train, argv)


if __name__ == "__main__":
    sys.exit(main())
