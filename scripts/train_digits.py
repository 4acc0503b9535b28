#!/usr/bin/env python
"""Train every config of configs/digits with three seeds, one run after the other, and write a table of the accuracies.

python scripts/train_digits.py --output results/digits.md [CONFIG ...] [--seeds 0 1 2] [--options --temp_epoch 5 ...]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Digits

Every method on timm's smallest ResNet, trained on scikit-learn's handwritten digits (1,437 images to train, 360 to
test, 16x16 pixels) with the recipe `digits`: 10 epochs (ResNet18: 6), the temperature annealed in the first two.
{threads} threads, seeds {seeds}. The seconds are the mean time of one command.

This shows that every method trains and evaluates. It **cannot rank them**: the static network misclassifies only two or
three of 360 images, one image is 0.28 %, and the temperature is annealed over 90 updates, where the papers take about
6,000. [study.md](study.md) compares the methods.

`python scripts/train_digits.py --output results/digits.md`

"""
COLUMNS = ("model", "config", "parameters", "top-1, mean (range)", "temperature, first and last epoch", "seconds")
TABLE = "| " + " | ".join(COLUMNS) + " |\n|---|---|---:|---:|---:|---:|\n"


def main():
    parser = make_parser(__doc__.splitlines()[0], "all of configs/digits")
    parser.add_argument("--options", nargs="...", default=[], help="all that follows: options of main.py for every run")
    args = parser.parse_args()
    configs = args.configs or sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/digits/*.json"))
    seeds = ", ".join(map(str, args.seeds))
    text = (HEAD.format(threads=args.threads, seeds=seeds) if args.output else "") + TABLE
    rows = (row_of(config, [train(config, seed, args) for seed in args.seeds]) for config in configs)
    write_rows(text, rows, args.output)


def make_parser(description, default):
    """A parser of the options of a script that trains configs of digits; `default` tells which."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("configs", nargs="*", help=f"config files; default: {default}")
    parser.add_argument("--output", default="", help="file to write the table to; default: the standard output")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    return parser


def write_rows(text, rows, output):
    """Write a text and the rows that follow it, after each of them, so that an interrupted script keeps its rows."""
    for row in rows:
        print(row, file=sys.stderr, flush=True)
        text += row + "\n"
        if output:
            Path(output).write_text(text)
    if not output:
        print(text, end="")


def train(config, seed, args):
    """Train once; returns the lines of the log and the seconds of the run."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--output_dir", folder, "--save_ckpt", "false", *args.options]
        _, seconds = run(config, seed, args.threads, options)
        return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()], seconds


def run(config, seed, threads, options):
    """Run main.py on the CPU; returns what it printed and its seconds."""
    command = [sys.executable, "main.py", "--kw_config", config, "--device", "cpu", "--seed", str(seed), *options]
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{config}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout, time.perf_counter() - started


def name_of(config):
    """What a config is, for a table."""
    return json.loads((ROOT / config).read_text())["_about"]["what"].split(";")[0].split(" on scikit")[0]


def spread(values):
    """Accuracies as mean (lowest to highest)."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def row_of(config, runs):
    """The row of the table for a config and its runs."""
    log = runs[0][0]
    first, last = (f"{line['train_temperature']:.3g}" for line in (log[0], log[-1]))
    parameters = f"{log[-1]['n_parameters'] / 1e6:.2f} M"
    name = config.removeprefix("configs/")
    link = f"[{name}](../{config})"
    top1 = spread([lines[-1]["test_acc1"] for lines, _ in runs])
    seconds = f"{statistics.mean(seconds for _, seconds in runs):.0f}"
    return f"| {name_of(config)} | {link} | {parameters} | {top1} | {first}, {last} | {seconds} |"


if __name__ == "__main__":
    main()
