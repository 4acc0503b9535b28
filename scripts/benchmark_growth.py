#!/usr/bin/env python
"""Measure how the cost of KernelWarehouse grows with batch, resolution and budget, beside the static network.

    python scripts/benchmark_growth.py --output results/growth

Writes OUTPUT.csv and OUTPUT.png. Every point is a separate measurement, which includes the static network.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import torch

from measure import MODES, Case, device_name, figure, write_rows
from models import read_config

BUDGETS = {0.25: "kw1d4x", 0.5: "kw1d2x", 1: "kw1x", 2: "kw2x", 4: "kw4x"}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SIZES = (32, 64, 96, 128, 160, 224, 288, 384)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--output", type=Path, default=Path("results/growth"))
    parser.add_argument("--batch_size", type=int, default=8, help="where it does not vary; default %(default)s")
    parser.add_argument("--input_size", type=int, default=None, help="where it does not vary; default 64, on a GPU 224")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU; default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def config_of(backbone, budget):
    return read_config(f"configs/{backbone}/{BUDGETS[budget]}_{backbone}.json")


def measure(args, budget, batch, size):
    on_gpu = args.device == "cuda"
    case = Case(
        config_of(args.backbone, budget), batch, size, torch.bfloat16 if on_gpu else torch.float32, args.device, on_gpu
    )
    case.require_agreement(case.name)
    del case.contenders["naive"]
    rows = case.measure(args.mode, args.repeats)
    for row in rows:
        what = f"{row.model} {row.contender:6s} {row.mode:9s} batch {batch:3d} {size:3d}x{size:<3d}"
        print(f"{what} {row.seconds * 1e3:9.1f} ms", flush=True)
    return rows


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    size = args.input_size or (224 if args.device == "cuda" else 64)
    sweeps = {
        "batch size": [(batch, 1, batch, size) for batch in BATCHES],
        "resolution": [(side, 1, args.batch_size, side) for side in SIZES],
        "budget b": [(b, b, args.batch_size, size) for b in BUDGETS],
    }
    panels = (f"{size}x{size}, b = 1", f"batch {args.batch_size}, b = 1", f"batch {args.batch_size}, {size}x{size}")
    picture, all_axes = figure(len(sweeps))
    rows = []
    for axes, title, (label, points) in zip(all_axes, panels, sweeps.items()):
        curves = {mode: [] for mode in args.mode}
        for value, budget, batch, side in points:
            measured = measure(args, budget, batch, side)
            rows += measured
            write_rows(args.output.with_suffix(".csv"), rows)
            for row in measured:
                if row.contender == "ours":
                    curves[row.mode].append((value, 1 / row.of_static))
        for mode, points in curves.items():
            axes.plot(*zip(*points), marker="o", label=mode)
        axes.set_xscale("log", base=2)
        axes.set_xticks([v for v, *_ in sweeps[label]], [f"{v:g}" for v, *_ in sweeps[label]], fontsize=7)
        axes.minorticks_off()
        axes.set(xlabel=label, title=title, ylim=(0, None))
        axes.axhline(1, color="tab:grey", linestyle=":")
        axes.grid(alpha=0.3)
        axes.legend()
    all_axes[0].set_ylabel("time, static network = 1")
    picture.suptitle(f"{args.backbone} with KW on {device_name(args.device)}")
    picture.savefig(args.output.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
