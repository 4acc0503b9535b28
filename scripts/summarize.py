#!/usr/bin/env python
"""Compare the parameters and multiply-adds of configs with those of the papers' tables.

    python scripts/summarize.py                                                 # all of configs/
    python scripts/summarize.py configs/resnet18 --format csv --output resnet18.csv
    python scripts/summarize.py configs/resnet18/kw1x_resnet18.json --detail    # layer by layer

Models are built on the meta device, so nothing is computed and no memory is used. models/counting.py counts for one
image of the config's input_size (224x224, and 32x32 for CIFAR). "Added" is what a method adds to the static network:
its attention and its mixing of kernels. The papers' value is the difference from the static network of the same table,
with the error that the rounding of both numbers may cause. The papers' rows are those of configs/tables.csv.
"""

import argparse
import csv
import io
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from models import ConfigError, build_model, read_config
from models.counting import count_layers
from models.messages import printable
from models.options import MODEL_KEYS, OPTIONS
from utils import check_not_read, csv_cell

CLASSES = {"CIFAR10": 10, "CIFAR100": 100, "glyphs": 500}
UNITS = {"M": 1e6, "G": 1e9}
# model settings that change neither parameters nor multiply-adds
TRAINING_KEYS = {
    "dropout",
    "drop_path",
    "block_drop_path",
    "attention_init",
    "head_init_scale",
    "initialisation",
}
PARTS = ("attention", "mixing", "convolution", "norm")
DESCRIPTION = ("source", "backbone", "method", "setting", "note")
NO_ROW = dict.fromkeys((*DESCRIPTION, "parameters", "multiply_adds", "added", "rounding"))


@dataclass
class Row:
    """A config and a row of the papers' tables; None stands for values that the row lacks, and for a missing row."""

    config: str
    source: str | None
    backbone: str | None
    method: str | None
    setting: str | None
    parameters: int
    paper_parameters: float | None
    attention: int
    mixing: int
    convolution: int
    norm: int
    multiply_adds: int
    paper_multiply_adds: float | None
    added: int
    paper_added: float | None
    paper_added_rounding: float | None
    note: str | None

    @property
    def parameters_difference(self):
        """Ours minus the paper's, in millions."""
        return None if self.paper_parameters is None else (self.parameters - self.paper_parameters) / 1e6

    @property
    def multiply_adds_difference(self):
        """Ours relative to the paper's, in percent."""
        if self.paper_multiply_adds is None:
            return None
        return 100 * (self.multiply_adds / self.paper_multiply_adds - 1)

    def as_dict(self):
        differences = ("parameters_difference", "multiply_adds_difference")
        return {**asdict(self), **{name: _rounded(getattr(self, name)) for name in differences}}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", type=Path, help="files, or folders of them; default: all of configs/")
    parser.add_argument("--format", choices=("markdown", "csv", "json"), default="markdown")
    parser.add_argument("--output", type=Path, help="file to write; default: the terminal")
    parser.add_argument("--detail", action="store_true", help="numbers of every layer")
    parser.add_argument("--input_size", type=int, help="height and width of the image; default: the config's")
    args = parser.parse_args()
    if args.input_size is not None and args.input_size < 1:
        parser.error("--input_size must be at least 1")
    return args


def find_configs(paths):
    """The given files, and the files in the given folders, without recipes."""
    files = []
    for path in paths or [ROOT / "configs"]:
        found = sorted(p for p in path.rglob("*.json") if p.parent.name != "recipes") if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path}: there is no config in this folder")
        files += found
    return list(dict.fromkeys(files))


def paper_value(text):
    """ "1.814G" -> 1.814e9; None for an empty text."""
    return float(text[:-1]) * UNITS[text[-1]] if text else None


def rounding(text):
    """ "1.814G" -> 5e5, half a unit of the last digit."""
    return 0.5 * 10.0 ** -len(text[:-1].partition(".")[2]) * UNITS[text[-1]]


def read_tables():
    """The rows of the papers' tables, with values as numbers.

    "added" is what a method adds to the static network of its table, and "rounding" how far that may be off.
    """
    with open(ROOT / "configs/tables.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["parameters"] = paper_value(row["params_M"] and row["params_M"] + "M")
        row["multiply_adds"] = paper_value(row["madds"])
        row["added"] = row["rounding"] = None
        if row["static_madds"]:
            row["added"] = row["multiply_adds"] - paper_value(row["static_madds"])
            row["rounding"] = rounding(row["madds"]) + rounding(row["static_madds"])
    return rows


def name_of(path):
    """The name of a config in the tables, which is its path in the repository."""
    path = path.resolve()
    return printable(path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path)


def count(path, input_size, known):
    """The layers (`LayerCount`) of a config's model. `known` caches the counts of earlier models, and is added to."""
    config = read_config(path)
    classes = config.get("nb_classes") or CLASSES.get(config.get("data_set"), OPTIONS["nb_classes"].default)
    size = input_size or config.get("input_size") or OPTIONS["input_size"].default
    shaping = {key: config[key] for key in sorted(MODEL_KEYS - TRAINING_KEYS) if key in config}
    key = json.dumps([shaping, classes, size])
    if key in known:
        return known[key]
    with torch.device("meta"):
        model = build_model(config, num_classes=classes)
    try:
        known[key] = count_layers(model, size, config.get("in_chans", 3))
        return known[key]
    except (RuntimeError, AssertionError) as error:
        # timm's vision transformers assert their image size
        raise ConfigError(f"{path}: no image of {size}x{size} fits: {str(error).splitlines()[0]}") from None


def summarize(path, layers, tables):
    """A `Row` for each row of the tables that names a config; one without the papers' numbers where none does."""
    name, totals = name_of(path), {part: sum(getattr(layer, part) for layer in layers) for part in PARTS}
    own = {
        "config": name,
        "parameters": sum(layer.parameters for layer in layers),
        "multiply_adds": sum(totals.values()),
        "added": totals["attention"] + totals["mixing"],
        **totals,
    }
    return [
        Row(
            **own,
            **{key: row[key] or None for key in DESCRIPTION},
            paper_parameters=row["parameters"],
            paper_multiply_adds=row["multiply_adds"],
            paper_added=row["added"],
            paper_added_rounding=row["rounding"],
        )
        for row in [row for row in tables if row["config"] == name] or [NO_ROW]
    ]


def _rounded(value):
    return None if value is None else round(value, 3)


def _shown(value, unit, digits):
    return "" if value is None else f"{value / unit:.{digits}f}"


def _signed(value, digits):
    return "" if value is None else f"{value:+.{digits}f}"


def markdown_table(head, rows):
    """A Markdown table. A title in `head` that ends with a colon marks a column of numbers, aligned right."""
    lines = [[title.rstrip(":") for title in head], ["---:" if title.endswith(":") else "---" for title in head], *rows]
    return "\n".join("| " + " | ".join(printable(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_markdown(rows):
    head = ["config", "row", "parameters, M:", "paper:", "difference:", "multiply-adds, M:", "paper:", "difference, %:"]
    head += ["added, M:", "paper, with its rounding:", "note:"]
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    lines = []
    for row in rows:
        line = [row.config, ", ".join(filter(None, (row.source, row.method, row.setting)))]
        line += [_shown(row.parameters, 1e6, 3), _shown(row.paper_parameters, 1e6, 2)]
        line += [_signed(row.parameters_difference, 3)]
        line += [_shown(row.multiply_adds, 1e6, 1), _shown(row.paper_multiply_adds, 1e6, 1)]
        line += [_signed(row.multiply_adds_difference, 2)]
        within = "" if row.paper_added is None else f" ± {row.paper_added_rounding / 1e6:.1f}"
        line += [_shown(row.added, 1e6, 1), _shown(row.paper_added, 1e6, 1) + within]
        lines.append([*line, str(notes.index(row.note) + 1) if row.note else ""])
    text = markdown_table(head, lines)
    return "\n".join([text, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]).rstrip()


def detail_as_markdown(details):
    head = ["layer", "kind", "parameters:", "attention:", "mixing:", "convolution:"]
    parts = []
    for config, layers in details:
        numbers = [[layer.parameters, *(getattr(layer, part) for part in PARTS)] for layer in layers]
        lines = [[layer.name, layer.kind, *map(str, n)] for layer, n in zip(layers, numbers, strict=True)]
        lines.append(["total", "", *(str(sum(column)) for column in zip(*numbers, strict=True))])
        parts.append(f"{config}\n\n{markdown_table(head, lines)}")
    return "\n\n".join(parts)


def as_csv(records):
    file = io.StringIO()
    writer = csv.DictWriter(file, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in record.items()} for record in records)
    return file.getvalue().rstrip("\n")


def write(text, path):
    if path is None:
        print(text)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def main():
    args = parse_arguments()
    started = time.perf_counter()
    try:
        files = find_configs(args.configs)
        check_not_read(args.output, files)
        known = {}
        counted = [(path, count(path, args.input_size, known)) for path in files]
        if args.detail:
            details = [(name_of(path), layers) for path, layers in counted]
            records = [{"config": config, **asdict(layer)} for config, layers in details for layer in layers]
            text = detail_as_markdown(details) if args.format == "markdown" else None
        else:
            tables = read_tables()
            rows = [row for path, layers in counted for row in summarize(path, layers, tables)]
            records = [row.as_dict() for row in rows]
            text = as_markdown(rows) if args.format == "markdown" else None
        if text is None:
            text = as_csv(records) if args.format == "csv" else json.dumps(records, indent=1)
        write(text, args.output)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"{len(files)} configs in {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
