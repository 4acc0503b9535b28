#!/usr/bin/env python
"""Trains every config of configs/digits, one after the other, and writes a table of what they reach.

python scripts/train_digits.py --output results/digits.md [CONFIG ...]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Digits

Every method on timm's smallest ResNet, trained on scikit-learn's handwritten digits (1,437 images to train, 360 to
test, 16x16 pixels) with the recipe `digits`: 10 epochs (ResNet18: 6), the temperature annealed in the first two.
{cores} threads, seed {seed}.  The seconds are those of the whole command.

`python scripts/train_digits.py --output results/digits.md`

| model | config | parameters | top-1, last epoch | temperature, first and last epoch | seconds |
|---|---|---:|---:|---:|---:|
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", help="config files; default: all of configs/digits")
    parser.add_argument("--output", default="", help="file of the table; default: the standard output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    configs = args.configs or sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/digits/*.json"))
    text = HEAD.format(cores=args.threads, seed=args.seed)
    for config in configs:
        row = train(config, args.seed, args.threads)
        print(row, file=sys.stderr, flush=True)
        text += row + "\n"
        # a long run that is stopped keeps what it has
        if args.output:
            Path(args.output).write_text(text)
    if not args.output:
        print(text, end="")


def train(config, seed, threads):
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--output_dir", folder, "--device", "cpu", "--seed", str(seed), "--save_ckpt", "false"]
        command = [sys.executable, "main.py", "--kw_config", config, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode != 0:
            raise SystemExit(f"{config}: {done.stderr.strip().splitlines()[-1]}")
        log = [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]
    what = json.loads((ROOT / config).read_text())["_about"]["what"].split(";")[0].split(" on scikit")[0]
    first, last = (f"{line['train_temperature']:.3g}" for line in (log[0], log[-1]))
    parameters = f"{log[-1]['n_parameters'] / 1e6:.2f} M"
    name = config.removeprefix("configs/")
    link = f"[{name}](../{config})"
    return f"| {what} | {link} | {parameters} | {log[-1]['test_acc1']:.2f} | {first}, {last} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
