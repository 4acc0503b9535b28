#!/usr/bin/env python
"""Draw the boxes and masks that a detector finds in images.

python detection/infer.py IMAGE [IMAGE ...] CONFIG CHECKPOINT --out-dir OUT
"""

import argparse
import sys
from pathlib import Path

# import from the project, not from this folder, whose file names would hide other modules
sys.path[0] = str(Path(__file__).resolve().parent.parent)
from startup import before_torch

before_torch()

import cv2
import torch
from mmdet.apis import inference_detector
from mmdet.registry import DATASETS, MODELS, VISUALIZERS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

from checkpoints import read
from detection import tools
from detection.hooks import SafeCheckpointHook
from loading.images import UnreadableImage, read_image
from models.config import ConfigError
from models.messages import printable


def load_detector(cfg: Config, checkpoint: str, device: str) -> nn.Module:
    """The detector of a config with the weights of a checkpoint, in evaluation mode.

    Raises:
        ConfigError: the checkpoint cannot be read, or is not one of this detector.
    """
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    content = read(checkpoint)
    SafeCheckpointHook.require_detector(model, content)
    model.load_state_dict(content["state_dict"])
    # inference_detector and the visualizer read these attributes
    model.cfg, model.dataset_meta = cfg, content["meta"].get("dataset_meta") or {}
    classes = model.dataset_meta.get("classes")
    if classes is None:
        model.dataset_meta = DATASETS.get(cfg.test_dataloader.dataset.type).METAINFO
    return model.to(device).eval()


def infer(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("config")
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--out-dir", type=Path, default=Path("detections"), help="folder for NAME.png; default %(default)s"
    )
    parser.add_argument("--score", type=float, default=0.3, help="lowest score of a drawn object; default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.launcher, args.cfg_options, args.work_dir, args.local_rank = "none", None, None, 0
    tools.require_checkpoint(args.checkpoint)
    cfg = tools.read_config(args)
    register_all_modules()
    model = load_detector(cfg, args.checkpoint, args.device)
    visualizer = VISUALIZERS.build({**cfg.visualizer, "vis_backends": None})
    visualizer.dataset_meta = model.dataset_meta
    for name in args.images:
        try:
            # refuses what OpenCV would wait for, decode in part or leave out without an error
            read_image(name, f"image '{name}'")
        except UnreadableImage as error:
            raise ConfigError(str(error)) from None
        picture = cv2.imread(name)
        if picture is None:
            raise ConfigError(f"image '{name}' cannot be read: OpenCV does not know its format")
        result = inference_detector(model, picture)
        args.out_dir.mkdir(parents=True, exist_ok=True)
        target = args.out_dir / f"{Path(name).stem}.png"
        visualizer.add_datasample(
            name,
            cv2.cvtColor(picture, cv2.COLOR_BGR2RGB),
            result,
            draw_gt=False,
            pred_score_thr=args.score,
            out_file=str(target),
        )
        found = int((result.pred_instances.scores >= args.score).sum())
        print(f"{printable(target)}: {found} objects", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run with the options of `argv` (None: the command line); returns the exit code."""
    return tools.run(infer, argv)


if __name__ == "__main__":
    sys.exit(main())
