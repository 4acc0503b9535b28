#!/usr/bin/env python
"""Export networks as ONNX, compare them with PyTorch and time both, and write a table.

    python scripts/benchmark_export.py --output results/export.md [--models kw_resnet18 ...]

The networks are trained for some steps on noise: with random attentions, and in deep networks, float32 is too coarse
to compare anything. Both run on one thread, at batch 1, one after the other in turn. Networks that are not in
`--models` keep the rows that the file has.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import torch
import torch.nn.functional as F

import exporting
from models import ConfigError, build_model
from models.build import PREFIXES

# a prefix that names a plan for one network
ONE_NETWORK = "kw1d2x"
SHARED = {"cell_num_ratio": 1, "reduction": 0.0625, "attention_init": "static"}
STEPS, CLASSES = 20, 10
NETWORKS = ("resnet18", "mobilenetv2_050", "convnext_atto", "test_vit")
HEAD = f"""# Export

Differences from PyTorch in float64, relative to the largest output, the greatest of batches {exporting.BATCHES}: of the
ONNX file in ONNX Runtime, and of PyTorch in float32. Milliseconds of one image on one CPU thread, medians of
{exporting.REPEATS}, PyTorch and ONNX Runtime in turn. The networks were trained for {STEPS} steps on noise, so that
only the arithmetic is compared. The machine was shared: times compare within a row only.

`python scripts/benchmark_export.py --output results/export.md`

| model | pixels | ONNX Runtime differs by | PyTorch in float32 by | PyTorch, ms | ONNX Runtime, ms | file, MiB |
|---|---:|---:|---:|---:|---:|---:|
"""


def parse_arguments():
    methods = [prefix for prefix in PREFIXES if prefix not in (ONE_NETWORK, "od")]
    small = ["test_resnet", *(f"{prefix}_test_resnet" for prefix in methods)]
    default = [*small, *NETWORKS, *(f"{prefix}_{net}" for prefix in ("kw", "odconv", "dyconv") for net in NETWORKS)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file to write the table to; default: the standard output alone")
    parser.add_argument("--models", nargs="+", default=default)
    parser.add_argument("--input_size", type=int, default=64, help="of networks that take any; default %(default)s")
    return parser.parse_args()


def settle(model, size):
    """Train a classifier of `CLASSES` classes on noise whose mean tells the class; leaves it in evaluation mode."""
    means, labels = torch.randn(CLASSES, 3, 1, 1), torch.arange(16) % CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for module in model.train().modules():
        if hasattr(module, "running_mean"):
            # the last steps count most
            module.momentum = 0.2
    for _ in range(STEPS):
        loss = F.cross_entropy(model(torch.randn(len(labels), 3, size, size) + means[labels]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def row_of(name, size, folder):
    """Export a network and measure it; returns its row of the table."""
    torch.manual_seed(0)
    model = build_model({"model": name, **(SHARED if name.startswith("kw") else {})}, num_classes=CLASSES)
    size = (getattr(model, "pretrained_cfg", {}).get("input_size") or (3, 224, 224))[1] if "vit" in name else size
    settle(model, size)
    path = folder / f"{name}.onnx"
    result = exporting.write_onnx(model, path, size, {"model": name})
    numbers = [f"{result[key]:.1e}" for key in ("error", "own_error")]
    numbers += [f"{result[key] * 1e3:.2f}" for key in ("torch", "onnx")]
    return f"| {' | '.join([name, str(size), *numbers, f'{path.stat().st_size / 2**20:.1f}'])} |"


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    rows, tail = {}, ""
    if args.output and args.output.exists():
        text = args.output.read_text()
        rows = {name: row for row, name in re.findall(r"^(\| (\w+) \| \d.*\|)$", text, re.MULTILINE)}
        tail = text[text.index("\n\n## ") :] if "\n\n## " in text else ""
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            try:
                rows[name] = row_of(name, args.input_size, Path(folder))
            except ConfigError as error:
                sys.exit(f"error: {name}: {error}")
            print(rows[name], flush=True)
            # write after every network, so that an interrupted script keeps its rows
            if args.output:
                args.output.write_text(HEAD + "\n".join(rows.values()) + (tail or "\n"))


if __name__ == "__main__":
    main()
