#!/usr/bin/env python
"""Measure speed and memory of dynamic models beside the static network and the naive backend, in one run.

    python scripts/benchmark.py --kw_config configs/resnet18/kw1x_resnet18.json --batch_size 8 --input_size 224

The naive backend is the definition: assemble, permute, convolve in groups. Nothing is printed for a model whose results
differ from it. Repeats are interleaved; the numbers are medians, with the lower and upper quartile. Every model and
size is measured in a process of its own, because the state of the heap after one measurement changes the speed of the
next. --csv and --png write the numbers to files. --layers measures every backend, layer by layer.
"""

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import torch

from measure import MODES, Case, device_name, figure, geometry_of, recorded_calls, seconds, write_rows
from models import ConfigError, build_model, read_config
from models.build import parse_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kw_config", nargs="+", default=["configs/resnet18/kw1x_resnet18.json"])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[8])
    parser.add_argument("--input_size", type=int, nargs="+", default=[224], help="one for all, or one per batch size")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="all but float32 use autocast")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="also measure both models, static and dynamic, compiled")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU; default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="write all numbers to this file")
    parser.add_argument("--png", type=Path, help="draw images per second to this file")
    parser.add_argument("--layers", action="store_true", help="measure every backend by layers, not by whole models")
    return parser.parse_args()


def print_rows(rows):
    for row in rows:
        times = f"{row.seconds * 1e3:8.1f} ms [{row.quartile_1 * 1e3:.1f}, {row.quartile_3 * 1e3:.1f}]"
        ratio = f"{row.of_static:5.2f} of static" + (f", {row.of_naive:5.2f} of naive" if row.of_naive else "")
        speed = f"{row.images_per_s:9.1f} images/s {row.peak_mb:8.0f} MB"
        print(f"  {row.mode:9s} {row.contender:16s} {times:32s} {speed}  {ratio}")


def draw(rows, path):
    """Draw images per second as numbers, and over those of the static network as bars, in a panel for each mode."""
    modes = sorted({row.mode for row in rows})
    picture, panels = figure(len(modes), height=max(3, 0.16 * len(rows)))
    for axes, mode in zip(panels, modes):
        chosen = [row for row in rows if row.mode == mode][::-1]
        labels = [f"{r.model} {r.batch} x {r.size}, {r.dtype}: {r.contender}" for r in chosen]
        colours = [
            "tab:grey" if "static" in r.contender else f"tab:{'red' if r.contender == 'naive' else 'blue'}"
            for r in chosen
        ]
        bars = axes.barh(labels, [row.of_static for row in chosen], color=colours)
        axes.bar_label(bars, [f"{row.images_per_s:.3g}/s" for row in chosen], padding=2, fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.set(title=mode, xlabel="speed, static network = 1")
        axes.margins(x=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=120)


def compare_models(config, path, batch, size, args):
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.dtype:
        case = Case(config, batch, size, DTYPES[name], args.device, args.channels_last, args.compile)
        error = case.require_agreement(path)
        print(f"\n{case.name}, batch {batch}, {size}x{size}, {name}, {case.layout}; agrees with naive to {error:.0e}")
        measured = case.measure(args.mode, args.repeats)
        print_rows(measured)
        rows += measured
    sys.stdout.flush()
    return rows


def compare_layers(config, batch, size, args):
    """Print forward and backward times of all backends for every layer; the chosen backend is marked."""
    from models.ops import mixture_conv
    from models.ops.backends import available_backends
    from models.ops.cost import cheapest, estimate

    torch.manual_seed(0)
    model = build_model(config).to(args.device)
    print(f"\n{config['model']}, batch {batch}, {size}x{size}: forward / forward and backward in ms, * is chosen")
    for count, (x, alpha, cells, kernel, bias, *rest) in recorded_calls(
        model, torch.randn(batch, 3, size, size, device=args.device)
    ):
        tensors = [t.clone().requires_grad_() for t in (x, alpha, cells)]
        geo = geometry_of(x, alpha, cells, kernel, bias, *rest)
        backends = available_backends(geo, x.dtype, x.device.type)
        chosen, cells_text = cheapest(geo, backends, x.element_size(), x.device.type), []
        costs = {backend: estimate(backend, geo, x.element_size(), x.device.type) for backend in backends}
        # leave out backends that the table of costs expects to be 10 times slower; some would take minutes
        for backend in ("naive", *(backend for backend in backends if costs[backend] < 10 * costs[chosen])):

            def forward(backend=backend, tensors=tensors, kernel=kernel, rest=rest):
                return mixture_conv(*tensors, kernel, None, *rest, backend=backend)

            def both(forward=forward, tensors=tensors):
                y = forward()
                torch.autograd.grad(y, tensors, torch.ones_like(y))

            values = []
            for run in (lambda: torch.inference_mode()(forward)(), both):
                seconds(run, args.device)
                values.append(min(seconds(run, args.device) for _ in range(args.repeats)) * 1e3)
            cells_text.append(f"{backend}{'*' if backend == chosen else ''} {values[0]:.1f} / {values[1]:.1f}")
        name = f"{count} x {list(x.shape[1:])} -> {geo.c_out}, kernel {list(kernel)}, n {geo.n}, cell {list(geo.cell)}"
        print(f"  {name}: {'  '.join(cells_text)}")


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    try:
        configs = {path: {"model": "convnext_tiny", **read_config(path)} for path in args.kw_config}
    except ConfigError as error:
        sys.exit(f"error: {error}")
    sizes = args.input_size if len(args.input_size) > 1 else args.input_size * len(args.batch_size)
    if len(sizes) != len(args.batch_size):
        sys.exit("error: --input_size takes one value, or one for every --batch_size")
    for path, config in configs.items():
        if parse_name(config["model"])[0] is None:
            sys.exit(f"error: {path}: '{config['model']}' is static already; give the config of a dynamic model")
    print(f"torch {torch.__version__}, {device_name(args.device)}, median of {args.repeats} repeats [quartiles]")
    rows = []
    for path, config in configs.items():
        for batch, size in zip(args.batch_size, sizes, strict=True):
            if args.layers:
                compare_layers(config, batch, size, args)
            else:
                sys.stdout.flush()
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    rows += process.submit(compare_models, config, path, batch, size, args).result()
                if args.csv:
                    write_rows(args.csv, rows)
    if args.png and rows:
        draw(rows, args.png)


if __name__ == "__main__":
    main()
