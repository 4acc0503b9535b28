#!/usr/bin/env python
"""Draw what a trained model attends to: attentions, Grad-CAM++, and t-SNE of features and kernels.

    python scripts/visualize.py OUT/checkpoint-best.pth --output PICTURES --data_path IMAGENET
    python scripts/visualize.py OUT/checkpoint-best.pth --output PICTURES --images PHOTOS
    python scripts/visualize.py KW.pth --beside STATIC.pth --pictures cam --output PICTURES
    python scripts/visualize.py epoch_12.pth --detector detection/configs/... --images PHOTOS --output PICTURES

The checkpoint tells the model, its preprocessing and its data set, of which the evaluation images are taken; --images
takes others. In a folder with one folder per class these are the classes; images without classes are told apart by
the class that the model predicts. Every picture is written as PNG, small ones as SVG, too, and index.html shows them
with what they mean.

attentions: KernelWarehouse's mixtures against cells, with their spread over images and over classes, use of cells, and
    entropy; for other methods their attentions by layer
cam: Grad-CAM++, for two models side by side with --beside
features: t-SNE of what the classifier sees
kernels: t-SNE of dynamic kernels, and of kernel representations
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import torch

from command_line import Parser, at_least
from inspection.images import open_images
from inspection.looking import KINDS, check_kinds, grad_cams, look
from inspection.page import gallery
from inspection.pictures import write
from loading.images import UnreadableImage
from main import fail
from models.config import ConfigError
from models.messages import printable
from trained import open_trained
from utils import check_not_read, make_folder, write_out


def parse_arguments(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="path or URL")
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument("--images", nargs="+", help="image files, and folders of them; default: the data set")
    parser.add_argument("--data_set", help="as in main.py; default: that of the checkpoint")
    parser.add_argument("--data_path", help="as in main.py")
    parser.add_argument("--eval_data_path", help="as in main.py")
    parser.add_argument("--pictures", nargs="+", choices=KINDS, default=KINDS, help="default: all of them")
    parser.add_argument("--beside", help="checkpoint of another model, for Grad-CAM++ beside the first")
    parser.add_argument("--detector", help="config of detection/configs: the checkpoint is a detector's")
    parser.add_argument("--count", type=at_least(1), default=500, help="images to look at; default %(default)s")
    parser.add_argument("--kw_config", help="config of the model, for a checkpoint that does not tell it")
    parser.add_argument("--ema", action="store_true", help="use the averaged weights of a run with --model_ema true")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="images at once; default %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU; take cpu or auto")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if os.path.exists(args.output) and not os.path.isdir(args.output):
        raise ConfigError(f"--output {args.output}: not a folder; give the path of one")
    if args.beside and "cam" not in args.pictures:
        raise ConfigError("--beside is for Grad-CAM++: add cam to --pictures, or leave it out")
    if args.images and (args.data_set or args.data_path or args.eval_data_path):
        raise ConfigError("--images and the options of a data set exclude each other; give one of the two")
    return args


def of_classifier(args):
    """The pictures of a classifier."""
    given = {name: value for name in ("data_set", "data_path", "eval_data_path") if (value := getattr(args, name))}
    networks = {}
    for path, config in {args.checkpoint: args.kw_config, **({args.beside: None} if args.beside else {})}.items():
        trained = open_trained(path, config, args.ema and path == args.checkpoint)
        networks[_name(path, trained, networks)] = (trained, open_images(trained, args.count, args.images, given))
    trained, images = next(iter(networks.values()))
    others = [kind for kind in args.pictures if kind != "cam"]
    pictures = look(trained, images, others, args.device, args.batch_size, args.checkpoint) if others else []
    if "cam" in args.pictures:
        pictures.append(grad_cams(networks, args.device))
    return trained.args.model, pictures


def _name(path, trained, taken):
    """What to call a network: its model, or its checkpoint where two have the same."""
    name = trained.args.model
    return path if name in taken else name


def run(args):
    check_kinds(args.pictures)
    if args.detector:
        from inspection.detectors import of_detector

        name, pictures = of_detector(args)
    else:
        name, pictures = of_classifier(args)
    folder = make_folder(args.output)
    check_not_read(folder / "index.html", [args.checkpoint])
    files = write(pictures, folder)
    write_out(gallery(f"{name}: {Path(args.checkpoint).name}", pictures), folder / "index.html")
    print(f"{printable(folder)}: {len(pictures)} pictures in {len(files)} files; index.html shows and explains them")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Draw with the options of `argv` (None: the command line); returns the exit code."""
    try:
        return run(parse_arguments(argv))
    except (ConfigError, UnreadableImage) as error:
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
