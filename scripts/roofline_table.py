#!/usr/bin/env python
"""Tell which backend the roofline estimate chooses for every layer of a model on GPUs, and why.

    python scripts/roofline_table.py --out results/gpu_choice.md

Needs no GPU: shapes come from a pass without data. On a GPU that `scripts/gpu_check.py` has measured, the fitted costs
choose instead (models/ops/cost.py).
"""

import argparse
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import torch

from measure import geometry_of, recorded_calls
from models import build_model, read_config
from models.ops.backends import available_backends, triton_support
from models.ops.control import forced_backend
from models.ops.geometry import Geometry
from models.ops.peaks import GPUS, Peak
from models.ops.roofline import Step, microseconds, roofline, steps

DEFAULT = "configs/resnet50/kw1x_resnet50.json"
PASSES = {"forward": False, "backward": True}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kw_config", default=DEFAULT, help="a dynamic model; default %(default)s")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--capability", nargs="+", default=["8.0", "9.0"], choices=[f"{a}.{b}" for a, b in GPUS], metavar="MAJOR.MINOR"
    )
    parser.add_argument("--out", metavar="FILE", help="write the tables there instead of printing them")
    return parser.parse_args(argv)


def layers(config: str, batch: int, size: int) -> list[tuple[int, Geometry]]:
    """The distinct calls of a model in the channels-last layout: (how many, shapes)."""
    with torch.device("meta"):
        model = build_model(read_config(config)).to(memory_format=torch.channels_last)
        images = torch.empty(batch, 3, size, size).to(memory_format=torch.channels_last)
    calls = recorded_calls(model, images, partial(forced_backend, "grouped"))
    return [(count, replace(geometry_of(*call), last=True)) for count, call in calls]


def candidates(geo: Geometry, dtype: torch.dtype) -> list[str]:
    """The backends that can evaluate a call on a GPU where Triton works."""
    works = triton_support._works
    triton_support._works = lambda: True
    try:
        return available_backends(geo, dtype, "cuda")
    finally:
        triton_support._works = works


@dataclass(frozen=True)
class Choice:
    """What the estimate chooses for a pass, with and without Triton, and its amounts."""

    name: str
    without_triton: str
    steps: list[Step]
    micros: float
    longest: Step


def choose(geo: Geometry, dtype: torch.dtype, peak: Peak, backward: bool) -> Choice:
    """The backend of least estimated time."""
    item, names = dtype.itemsize, candidates(geo, dtype)
    times = {name: roofline(name, geo, item, peak, backward=backward) for name in names}
    name = min(times, key=times.get)
    done = steps(name, geo, item, True, backward)
    longest = max(done, key=lambda step: microseconds(step, peak, item))
    portable = min((n for n in names if not n.startswith("triton")), key=times.get)
    return Choice(name, portable, done, times[name], longest)


def table(calls: list[tuple[int, Geometry]], dtype: torch.dtype, peak: Peak, backward: bool) -> list[str]:
    """Rows of a Markdown table for a pass."""
    rows, total = [], 0.0
    for count, geo in calls:
        choice = choose(geo, dtype, peak, backward)
        macs = sum(step.macs for step in choice.steps) / 1e9
        moved = sum(step.numbers * (step.item or dtype.itemsize) for step in choice.steps) / 1e6
        launches = sum(step.launches for step in choice.steps)
        kernel, out = "x".join(map(str, geo.kernel)), "x".join(map(str, geo.out))
        rows.append(
            f"| {kernel} {geo.groups * geo.c_in} -> {geo.c_out} at {out} | {count} | {geo.n} | {choice.name} | "
            f"{choice.without_triton} | {macs:.1f} | {moved:.0f} | {launches:.0f} | {choice.micros:.0f} | "
            f"{choice.longest.name} |"
        )
        total += count * choice.micros
    head = (
        "| layer | times | cells | backend | without Triton | multiply-adds (1e9) | moved (MB) | launches | us | "
        "longest step |"
    )
    return [head, "|---|---:|---:|---|---|---:|---:|---:|---:|---|", *rows, "", f"All layers: {total / 1e3:.1f} ms."]


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    dtype = getattr(torch, args.dtype)
    calls = layers(args.kw_config, args.batch_size, args.input_size)
    lines = [
        "# Which backend runs a layer on a GPU that was not measured",
        "",
        f"Estimates, not measurements, from `scripts/roofline_table.py`: {args.kw_config}, batch {args.batch_size}, "
        f"{args.input_size}x{args.input_size}, {args.dtype}, channels-last. The backend of the least time is chosen, "
        "and beside it the one where Triton does not work. A step takes as long as the slowest of its multiply-adds "
        "(in full tiles), its tiles from the cache and its tensors from memory, and every launch adds 5 us; "
        "`models/ops/roofline.py` has the steps and the shares of the peaks that are assumed, `models/ops/peaks.py` "
        "the peaks with their sources. The backward pass computes the gradients of input, attention and cells.",
    ]
    for text in args.capability:
        capability = tuple(map(int, text.split(".")))
        peak = GPUS[capability]
        rate = f"{2 * peak.half:.0f} TFLOPS in half precision, {peak.bandwidth:.0f} GB/s, {peak.units} multiprocessors"
        for name, backward in PASSES.items():
            lines += ["", f"## Compute capability {text}, {name} pass", ""]
            lines += [f"Peak: {rate}.", ""] if not backward else []
            lines += table(calls, dtype, peak, backward)
    text = "\n".join(lines) + "\n"
    if args.out:
        Path(args.out).write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
