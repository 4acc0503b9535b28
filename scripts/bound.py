#!/usr/bin/env python
"""Tell how near a dynamic network can come to the speed of its static one on this machine, by arithmetic alone.

    python scripts/bound.py --kw_config configs/resnet18/kw1x_resnet18.json --batch_size 1
    python scripts/bound.py --kw_config configs/resnet18/kw1x_resnet18.json --mode training

A dynamic layer computes all that a static one does, and more: it pools its input, computes attentions, and mixes its
kernels from a warehouse that it reads. Each of these takes at least its multiply-adds over the peak rate of a large
product of matrices, or its bytes over the rate at which memory is read, whichever is longer. Both rates are measured;
a warehouse is read as often as the network does, so that a small one comes from the cache. The bound is the time of the
static network, also measured, over that time and the least time of the additions. Where the order of the operations is
free, as in `models/ops/backends`, the one with the fewest multiply-adds counts; a layer that needs fewer than the
static one, by Winograd's filtering, adds nothing.

Every product of the forward pass has two in the backward pass, for the gradients of its two inputs; nothing is counted
for computing anything again. A backward pass reads the warehouse once and writes its gradient once.
"""

import argparse
import functools
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import torch

from measure import MODES, Case, geometry_of, recorded_calls, seconds
from models import read_config
from models.counting import count_layers
from models.ops.backends import BACKENDS
from models.ops.backends.winograd import squares_of

# of the forward pass, and then of the backward pass: products, and how often a warehouse or its gradient is passed over
PASSES = {"inference": ((1, 1),), "training": ((1, 1), (2, 2))}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kw_config", nargs="+", default=["configs/resnet18/kw1x_resnet18.json"])
    parser.add_argument("--mode", choices=MODES, default="inference")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU; default %(default)s")
    parser.add_argument("--layers", action="store_true", help="also print the multiply-adds and bytes of every layer")
    return parser.parse_args()


def median_seconds(function, repeats):
    """Median time of a call, after one that is not counted."""
    function()
    return statistics.median(seconds(function, "cpu") for _ in range(repeats))


@functools.cache
def peak_rate(repeats, size=2048):
    """Multiply-adds per second of a large product of matrices: the fastest of all repeats."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    c = a @ b
    return size**3 / min(seconds(lambda: torch.mm(a, b, out=c), "cpu") for _ in range(repeats))


@functools.cache
def reading_seconds(numbers, repeats):
    """Time to read so many numbers again and again: the fastest of all repeats."""
    values = torch.randn(numbers)
    values.sum()
    return min(seconds(values.sum, "cpu") for _ in range(repeats))


def added(geo):
    """The least multiply-adds that a call adds to those of a static convolution."""
    kernels = geo.batch * geo.taps * geo.g_out * geo.g_in * geo.cell[0] * geo.q
    convolution = kernels * geo.positions
    orders = [kernels * geo.n]
    if BACKENDS["winograd"].available(geo, torch.float32, "cpu"):
        squares = math.prod(squares_of(geo.out))
        orders.append(kernels * geo.n + kernels * squares * 16 // 9 - convolution)
    if geo.foldable:
        mixed = geo.batch * geo.g_out * geo.n * geo.positions * geo.q
        orders.append(mixed * (geo.taps * geo.g_in + geo.cell[0]) - convolution)
        if geo.taps * geo.g_in == 1:
            outputs = geo.n * geo.batch * geo.cell[0] * geo.positions
            orders.append(outputs * (geo.q * geo.groups + geo.g_out) - convolution)
    return convolution, max(0, min(orders))


def bound(path, args):
    """Print the bound of a config, and what it consists of."""
    case = Case({"model": "convnext_tiny", **read_config(path)}, args.batch_size, args.input_size)
    passes = PASSES[args.mode]
    rate = peak_rate(args.repeats)
    total = dict.fromkeys(("convolutions", "mixing", "bytes", "seconds"), 0)
    for count, call in recorded_calls(case.dynamic.eval(), case.x):
        geo = geometry_of(*call)
        convolution, mixing = added(geo)
        numbers = geo.n * math.prod(geo.cell)
        mixed, read = mixing / rate, reading_seconds(numbers, args.repeats)
        least = sum(max(products * mixed, reads * read) for products, reads in passes)
        for key, value in zip(total, (convolution, mixing, 4 * numbers, least), strict=True):
            total[key] += count * value
        if args.layers:
            name = f"{count} x {list(call[0].shape[1:])} -> {geo.c_out}, kernel {list(geo.full_kernel)}"
            print(
                f"  {name:52s} n {geo.n:4d}, cell {list(geo.cell)}: convolution {convolution / 1e6:7.1f} M, "
                f"mixing {mixing / 1e6:6.1f} M, warehouse {4 * numbers / 2**20:5.1f} MB, at least {least * 1e3:5.2f} ms"
            )
    attention = args.batch_size * sum(layer.attention for layer in count_layers(case.dynamic, args.input_size))
    before = median_seconds(case.run(case.contenders["static"], args.mode), args.repeats)
    extra = total["seconds"] + sum(products for products, _ in passes) * attention / rate
    print(
        f"{path}, {args.mode}, batch {args.batch_size}, {args.input_size}x{args.input_size}: forward pass with "
        f"convolutions of {total['convolutions'] / 1e9:.2f} G multiply-adds, attention {attention / 1e6:.1f} M, mixing "
        f"{total['mixing'] / 1e9:.2f} G, warehouses {total['bytes'] / 2**20:.0f} MB; static {before * 1e3:.1f} ms, "
        f"additions at least {extra * 1e3:.1f} ms: bound {before / (before + extra):.2f}"
    )


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = ", ".join(
        f"{4 * n >> 20} MB: {4e-9 * n / reading_seconds(n, args.repeats):.0f}" for n in (1 << 20, 8 << 20, 64 << 20)
    )
    print(f"peak {peak_rate(args.repeats) / 1e9:.0f} G multiply-adds/s; reading in GB/s, {sizes}")
    for path in args.kw_config:
        bound(path, args)


if __name__ == "__main__":
    main()
