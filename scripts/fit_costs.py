#!/usr/bin/env python
"""Measure the backends on this machine, and fit the table of models/ops/cost.py to their times.

    python scripts/fit_costs.py

Every backend is timed on the layers of several models, forward and backward. Prints the table, and how much longer the
backends that it chooses take than the fastest ones.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import numpy as np
import torch
from scipy.optimize import nnls

from measure import geometry_of, recorded_calls, seconds
from models import build_model, read_config
from models.ops.backends import BACKENDS, available_backends
from models.ops.control import forced_backend
from models.ops.cost import work_of

# config, batch, image size
CASES = [
    *((f"{name}.json", batch, 224) for batch in (1, 8) for name in (
        "resnet18/kw1x_resnet18", "resnet50/kw1x_resnet50", "mobilenetv2_100/kw1x_mobilenetv2_100",
        "convnext/kw1x_convnext_tiny",
    )),
    ("resnet18/kw1x_resnet18.json", 64, 32),
    ("resnet18/kw4x_resnet18.json", 8, 224),
    ("resnet18/kw1d4x_resnet18.json", 4, 96),
    ("mobilenetv2_050/kw1d2x_mobilenetv2_050.json", 16, 128),
]  # fmt: skip


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU; default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cases", type=int, default=len(CASES), help="number of models to measure; default: all")
    parser.add_argument("--patience", type=float, default=4, help="leave out backends that are this many times slower")
    return parser.parse_args()


def evaluate(backend, direction, tensors, geo, dy=None):
    """A pass as the operator makes it: the cells are float32, and cast for backends that do not do so themselves."""
    x, alpha, cells = tensors
    own = BACKENDS[backend]
    cells = cells if own.casts_cells else cells.to(x.dtype)
    if direction == "forward":
        return own.forward(x, alpha, cells, geo)
    return own.backward(dy, x, alpha, cells, geo, [True] * 3)


def measure(geo, tensors, args):
    """Times of a call in microseconds: {backend: (forward, backward)}."""
    backends = available_backends(geo, tensors[0].dtype, args.device)
    times, best = {}, float("inf")
    for backend in backends:
        dy = torch.randn_like(evaluate(backend, "forward", tensors, geo))
        runs = (
            partial(evaluate, backend, "forward", tensors, geo),
            partial(evaluate, backend, "backward", tensors, geo, dy),
        )
        first = sum(seconds(run, args.device) for run in runs)
        best = min(best, first)
        if first < args.patience * best:
            times[backend] = [[seconds(run, args.device) for _ in range(args.repeats)] for run in runs]
    return {backend: [statistics.median(values) * 1e6 for values in both] for backend, both in times.items()}


def fit(backend, measured, item_bytes):
    """Costs (forward, backward) of the terms of a backend's work, none negative; None where it was never measured."""
    costs = []
    for direction in (0, 1) if any(backend in times for *_, times in measured) else ():
        rows = [
            (work_of(backend, geo, item_bytes, direction), times[backend], count)
            for count, geo, times in measured
            if backend in times
        ]
        # weights make relative errors count equally in calls of all sizes
        weights = np.array([count**0.5 / times[direction] for _, times, count in rows])
        matrix = np.array([done for done, *_ in rows]) * weights[:, None]
        target = np.array([times[direction] for _, times, _ in rows]) * weights
        scale = np.maximum(matrix.max(axis=0), 1e-30)
        costs.append(nnls(matrix / scale, target)[0] / scale)
    return costs or None


def fit_all(measured, item_bytes):
    """The table {backend: costs} of all backends that were measured, with three digits."""
    costs = {backend: fit(backend, measured, item_bytes) for backend in BACKENDS}
    return {
        backend: [tuple(float(f"{cost:.3g}") for cost in both) for both in own] for backend, own in costs.items() if own
    }


def excess(measured, table, item_bytes, direction):
    """How many times as long as the fastest backends those take that a table chooses; backends not in it are left out.

    measured: (number of calls, geometry, {backend: (forward, backward)}); direction: 0 forward, 1 backward.
    """
    chosen = best = 0.0
    for count, geo, times in measured:
        estimates = {
            backend: np.dot(work_of(backend, geo, item_bytes, direction), table[backend][direction])
            for backend in times
            if backend in table
        }
        if estimates:
            chosen += count * times[min(estimates, key=estimates.get)][direction]
            best += count * min(values[direction] for values in times.values())
    return chosen / best if best else float("nan")


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    measured = []  # (number of calls, geometry, {backend: times})
    for path, batch, size in CASES[: args.cases]:
        torch.manual_seed(0)
        model = build_model({"model": "convnext_tiny", **read_config(Path("configs") / path)}).to(args.device)
        images = torch.randn(batch, 3, size, size, device=args.device)
        # record with a fixed backend, because the present table may no longer fit the backends
        for count, call in recorded_calls(model, images, partial(forced_backend, "grouped")):
            tensors = [call[0].to(dtype), call[1].to(dtype), call[2]]
            geo = geometry_of(*call)
            measured.append((count, geo, measure(geo, tensors, args)))
        print(f"{path}, batch {batch}, {size}x{size}", file=sys.stderr)

    table = fit_all(measured, dtype.itemsize)
    for backend, costs in table.items():
        print(f'    "{backend}": {costs},')
    for direction, name in enumerate(("forward", "backward")):
        times = excess(measured, table, dtype.itemsize, direction)
        print(f"# {name}: the table's choice takes {times:.3f} times as long as the fastest backend")


if __name__ == "__main__":
    main()
