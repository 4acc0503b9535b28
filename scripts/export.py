#!/usr/bin/env python
"""Write a trained model for deployment; the suffix of the file tells the format.

    python scripts/export.py CKPT OUT.onnx           ONNX of standard operators, compared with the model in ONNX Runtime
    python scripts/export.py CKPT OUT.pt2            a program that torch.export.load runs without this project
    python scripts/export.py CKPT OUT.safetensors    the weights with their settings, for open_trained and load_weights

A mistake ends in one line and exit code 2, and nothing is written.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import exporting
from command_line import Parser, at_least
from exporting import (
    Features,
    accuracy,
    at_size,
    describe,
    labelled_images,
    quantised,
    replacing,
    target,
    write_onnx,
    write_pt2,
    write_safetensors,
)
from main import fail
from models.config import ConfigError
from models.messages import printable
from trained import open_trained
from utils import check_not_read


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="path or URL of a checkpoint of main.py, or of another one with --kw_config")
    parser.add_argument("output", help=f"file to write: {', '.join(exporting.SUFFIXES)}")
    parser.add_argument("--kw_config", help="config, for a checkpoint that does not tell its model")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument(
        "--input_size", type=at_least(1), help="height and width of the images; default: the checkpoint's"
    )
    parser.add_argument("--dynamic_size", action="store_true", help="images of any height and width (.onnx, .pt2)")
    parser.add_argument("--features", action="store_true", help="feature maps instead of logits (.onnx, .pt2)")
    parser.add_argument("--int8", metavar="IMAGES", help="int8 (.onnx), with the ranges of digits or a folder")
    parser.add_argument("--evaluate", metavar="IMAGES", help="print the accuracy (.onnx) on a folder, or on digits")
    return parser.parse_args(argv)


def run(args):
    path = target(args.output)
    check_not_read(path, (args.checkpoint, args.kw_config))
    if path.suffix == ".onnx":
        exporting.require_onnx()
    if path.suffix == ".safetensors" and (args.features or args.dynamic_size):
        raise ConfigError(f"{path}: weights have neither --features nor --dynamic_size; leave these out")
    if path.suffix != ".onnx" and (args.int8 or args.evaluate):
        raise ConfigError(f"{path}: --int8 and --evaluate are for .onnx; leave these out")
    if args.features and args.evaluate:
        raise ConfigError("--evaluate needs the classifier; leave out --features")
    trained = open_trained(args.checkpoint, args.kw_config, args.ema)
    if args.input_size is not None:
        trained = at_size(trained, args.input_size)
    if path.suffix == ".safetensors":
        write_safetensors(trained, path)
    else:
        model = Features(trained.model).eval() if args.features else trained.model
        arguments = model, path, trained.args.input_size, describe(trained), args.dynamic_size
        if path.suffix == ".pt2":
            write_pt2(*arguments)
        else:
            onnx(args, trained, arguments)
    print(f"{printable(path)}: {path.stat().st_size / 2**20:.1f} MiB")


def onnx(args, trained, arguments):
    """Write ONNX, with accuracies before and after quantisation."""
    path = arguments[1]
    # missing images are a mistake before anything is written
    calibration = labelled_images(trained, args.int8, is_train=True) if args.int8 else None
    evaluation = labelled_images(trained, args.evaluate, is_train=False) if args.evaluate else None
    with replacing(path) as temporary:
        arguments = (arguments[0], temporary, *arguments[2:])
        report(write_onnx(*arguments, names=("features" if args.features else "logits",)))
        for kind in ("float32", "int8") if args.int8 else ("float32",):
            if kind == "int8":
                quantised(temporary, calibration)
            if evaluation is not None:
                print(f"{kind}: top-1 accuracy {accuracy(temporary, evaluation):.2f} % of {len(evaluation)} images")


def report(result):
    print(
        f"largest difference from PyTorch in float64, relative to the largest output, at batches "
        f"{', '.join(map(str, exporting.BATCHES))}: ONNX Runtime {result['error']:.1e}, PyTorch in float32 "
        f"{result['own_error']:.1e}; tolerance {exporting.TOLERANCE:.0e} or {exporting.OWN_ERRORS} times the latter"
    )
    print(
        f"median of {exporting.REPEATS} at batch 1: PyTorch {result['torch'] * 1e3:.2f} ms, ONNX Runtime "
        f"{result['onnx'] * 1e3:.2f} ms"
    )


def main(argv: list[str] | None = None) -> int:
    """Export with the options of `argv` (None: the command line); returns the exit code."""
    try:
        run(parse_arguments(argv))
    except ConfigError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
