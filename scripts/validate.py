#!/usr/bin/env python
"""Evaluate many checkpoints, and write a table of their accuracies with the columns of timm's results.

    python scripts/validate.py RUN1/checkpoint-best.pth RUN2/checkpoint-best.pth --data_path IMAGENET --output all.csv
    python scripts/validate.py RELEASED.pth --kw_config configs/resnet18/kw1x_resnet18.json --data_path IMAGENET

The checkpoints come first. All options of main.py follow, and mean what they mean in
`main.py --eval true --resume CKPT ...`, which gives the same accuracies: without a config or a model, each checkpoint
tells its own. With --model_ema_eval true, averaged weights have a row of their own. The file is written anew after
every checkpoint. One process evaluates them.

Exit code 1: some checkpoints could not be evaluated; they are named on stderr, and the others are evaluated all the
same.
"""

import csv
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

from torchvision.transforms import CenterCrop

from command_line import make_parser, merged_options, parse_words
from loading.transforms import make_transform
from main import complete, fail, run
from models.config import ConfigError
from models.messages import printable
from utils import check_not_read, check_target, csv_cell, read_launcher, write_out

COLUMNS = "model top1 top1_err top5 top5_err param_count img_size crop_pct interpolation checkpoint".split()


def parse_arguments(argv):
    """The checkpoints, the file to write, and the options of main.py that were given."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="path or URL of a checkpoint")
    parser.add_argument("--output", default="results.csv", help="file to write; default %(default)s")
    options = parse_words(parser, argv)
    for name in ("resume", "eval", "dry_run", "print_config"):
        if name in options:
            raise ConfigError(f"--{name} is not for this script; name the checkpoints to evaluate without an option")
    if read_launcher(merged_options(options)[0])[1] > 1:
        raise ConfigError("one process evaluates the checkpoints; start this script without a launcher")
    paths, output = options.pop("checkpoints"), check_target(options.pop("output"))
    check_not_read(output, (*paths, options.get("kw_config")))
    return paths, output, options


def preprocessing(args):
    """The side of the crop relative to the resized image, and the interpolation, of the images of an evaluation."""
    resize, crop = make_transform(args, is_train=False).transforms[:2]
    if not isinstance(crop, CenterCrop):
        part = 1.0
    else:
        part = 224 / 256 if args.traditional_preprocess or args.crop_pct is None else args.crop_pct
    return {"img_size": args.input_size, "crop_pct": part, "interpolation": resize.interpolation.value}


def evaluate(path, options):
    """The rows of a checkpoint: of its weights, and of its averaged weights where they are evaluated, too."""
    args, given = merged_options({**options, "resume": path, "eval": True})
    complete(args, given, options)
    rows = []
    for result, suffix in zip(run(args, given, options), ("", " (EMA)"), strict=False):
        top1, top5 = round(result["acc1"], 4), round(result["acc5"], 4)
        rows.append(
            {
                "model": args.model + suffix,
                "top1": top1,
                "top1_err": round(100 - top1, 4),
                "top5": top5,
                "top5_err": round(100 - top5, 4),
                "param_count": round(result["parameters"] / 1e6, 2),
                **preprocessing(args),
                "checkpoint": path,
            }
        )
    return rows


def as_csv(rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    return file.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Evaluate with the options of `argv` (None: the command line); returns the exit code."""
    rows, failed = [], 0
    try:
        paths, output, options = parse_arguments(argv)
        for path in paths:
            try:
                rows += evaluate(path, options)
            except Exception as error:
                # whatever is wrong with one checkpoint or its model, the others are evaluated
                text = " ".join(str(error).split()) or type(error).__name__
                fail(ConfigError(text if path in text else f"{path}: {text}"))
                failed += 1
            if rows:
                write_out(as_csv(rows), output)
    except ConfigError as error:
        return fail(error)
    if not rows:
        return 2
    print(f"{len(paths) - failed} of {len(paths)} checkpoints: {printable(output)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
