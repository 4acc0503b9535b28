#!/usr/bin/env python
"""Evaluate a detector: box and mask AP by pycocotools.

python detection/test.py CONFIG CHECKPOINT
"""

import sys
from pathlib import Path

# import from the project, not from this folder, whose file names would hide other modules
sys.path[0] = str(Path(__file__).resolve().parent.parent)
from startup import before_torch

before_torch()

from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmengine.runner import Runner

from detection import tools
from models.config import ConfigError


def test(argv: list[str] | None) -> None:
    parser = tools.parser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--out", help="file (.pkl) for the predictions")
    parser.add_argument("--show", action="store_true", help="show predictions")
    parser.add_argument("--show-dir", help="folder, in the work directory, for images with predictions")
    parser.add_argument("--wait-time", type=float, default=2, help="seconds for which each image is shown")
    args = parser.parse_args(argv)
    tools.require_checkpoint(args.checkpoint)
    if args.out and not args.out.endswith((".pkl", ".pickle")):
        raise ConfigError(f"--out {args.out}: the name must end in .pkl")
    cfg = tools.read_config(args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    # the checkpoint replaces these weights, so they need not be loaded
    cfg.model.backbone.init_cfg = None
    if args.show or args.show_dir:
        cfg = trigger_visualization_hook(cfg, args)
    tools.check(cfg, ("test",))
    tools.join(cfg)
    runner = Runner.from_cfg(cfg)
    if args.out:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()


def main(argv: list[str] | None = None) -> int:
    """Run with the options of `argv` (None: the command line); returns the exit code."""
    return tools.run(test, argv)


if __name__ == "__main__":
    sys.exit(main())
