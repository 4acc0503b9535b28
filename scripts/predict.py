#!/usr/bin/env python
"""Predict the classes of images with a trained model.

    python scripts/predict.py OUT/checkpoint-best.pth dog.jpg PHOTOS --top_k 3
    python scripts/predict.py OUT/checkpoint-best.pth PHOTOS --format csv --output predictions.csv
    python scripts/predict.py RELEASED.pth dog.jpg --kw_config configs/resnet18/kw1x_resnet18.json

A checkpoint of main.py tells its model, its classes and its preprocessing; one of another project needs the config of
its model. A folder is searched for images, with the folders in it. Classes without names are named by their index.

Exit code 1: some images could not be read; they are named on stderr, and the others are predicted all the same.
"""

import csv
import io
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import torch
from torch.utils.data import DataLoader

from command_line import Parser, at_least
from datasets import cores
from loading.folders import images_in
from loading.images import ImageFiles
from main import fail
from models.config import ConfigError
from models.messages import printable
from trained import open_trained
from utils import as_json, check_not_read, check_target, csv_cell, shown, write_out

COLUMNS = ("image", "rank", "index", "class", "probability")


def parse_arguments(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="path or URL")
    parser.add_argument("images", nargs="+", help="image files, and folders of them")
    parser.add_argument("--kw_config", help="config of the model, for a checkpoint that does not tell it")
    parser.add_argument("--ema", action="store_true", help="use the averaged weights of a run with --model_ema true")
    parser.add_argument("--top_k", type=at_least(1), default=5, help="classes for each image; default %(default)s")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text", help="default %(default)s")
    parser.add_argument("--output", help="file to write; default: the terminal")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="images at once; default %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is")
    parser.add_argument("--num_workers", type=at_least(0), default=0, help="processes that read images; default 0")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU; take cpu or auto")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.output = check_target(args.output) if args.output else None
    return args


def collate(items):
    """Indices and images [B, 3, H, W] of a batch (None without any), and (index, reason) of what cannot be read."""
    good = [(index, image) for index, image in items if isinstance(image, torch.Tensor)]
    bad = [(index, reason) for index, reason in items if isinstance(reason, str)]
    return [index for index, _ in good], torch.stack([image for _, image in good]) if good else None, bad


@torch.inference_mode()
def predict(trained, files, args):
    """Predict images in batches.

    Returns:
        (file, probabilities, indices of the classes), the best class first, for each image that can be read, and
        (file, reason) for the others.
    """
    model, top_k = trained.model.to(args.device), min(args.top_k, trained.args.nb_classes)
    data = ImageFiles(files, trained.transform)
    workers = min(args.num_workers, cores())
    found, failed = [], []
    for indices, images, bad in DataLoader(data, args.batch_size, num_workers=workers, collate_fn=collate):
        failed += [(files[index], reason) for index, reason in bad]
        if images is None:
            continue
        probabilities = model(images.to(args.device)).double().softmax(1)
        values, classes = (tensor.tolist() for tensor in probabilities.topk(top_k))
        for row, index in enumerate(indices):
            if all(map(math.isfinite, values[row])):
                found.append((files[index], values[row], classes[row]))
            else:
                failed.append((files[index], f"{files[index]}: the model's output is not finite"))
    return found, failed


def records_of(found, names):
    """What was predicted, in plain types: image -> its classes."""
    # escaped before they become JSON, in which a backslash is escaped itself
    return [
        {
            "image": shown(file),
            "predictions": [
                {"index": index, "class": shown(names[index]) if names else str(index), "probability": value}
                for value, index in zip(values, indices, strict=True)
            ],
        }
        for file, values, indices in found
    ]


def as_csv(records):
    file = io.StringIO()
    # quoted, since a name of a file may hold any character
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    for record in records:
        for rank, prediction in enumerate(record["predictions"], 1):
            row = {"image": record["image"], "rank": rank, **prediction}
            writer.writerow({name: csv_cell(value) for name, value in row.items()})
    return file.getvalue()


def as_text(records):
    lines = []
    for record in records:
        best = [f"{entry['class']} {100 * entry['probability']:.1f} %" for entry in record["predictions"]]
        lines.append(f"{record['image']}: {', '.join(best)}")
    # a line for each image, whatever characters are in its name and in those of the classes
    return "".join(printable(line) + "\n" for line in lines)


def run(args):
    notes = []
    files = images_in(args.images, notes.append)
    check_not_read(args.output, (args.checkpoint, args.kw_config, *files))
    for note in notes:
        print(note, file=sys.stderr)
    trained = open_trained(args.checkpoint, args.kw_config, args.ema)
    found, failed = predict(trained, files, args)
    if len(files) == len(failed) == 1:
        raise ConfigError(failed[0][1])
    for _, reason in failed:
        print("passed over: " + printable(" ".join(reason.split())), file=sys.stderr)
    if not found:
        raise ConfigError(f"none of the {len(files)} images can be predicted; the lines above say why")
    records = records_of(found, trained.classes)
    if args.format == "json":
        text = as_json(records) + "\n"
    else:
        text = as_csv(records) if args.format == "csv" else as_text(records)
    write_out(text, args.output)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Predict with the options of `argv` (None: the command line); returns the exit code."""
    try:
        return run(parse_arguments(argv))
    except ConfigError as error:
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
