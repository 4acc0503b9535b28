#!/usr/bin/env python
"""Measure how processes exchange gradients: the settings of DistributedDataParallel, bucket sizes, and compression.

    python scripts/benchmark_parallel.py --kw_config configs/resnet18/kw1x_resnet18.json --batch_size 4 --input_size 64

Starts processes on this machine's CPU, which gloo connects. Every setting has its own copy of the model; their steps
(forward and backward pass) are interleaved. Prints the bytes of the gradients, and, for every setting, the number of
buckets, the median of the steps with quartiles, the memory of a step, and the time over that of this project's.
Nothing is printed of a setting whose gradients differ from those of torch's defaults by more than rounding. The last
line shows how much of the exchange runs beside the backward pass. The link is this machine's memory, so what is cheap
here may not be on a network (docs/scaling.md).
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import torch
import torch.distributed as dist

from command_line import at_least
from measure import device_name, peak_memory, relative, seconds
from models import ConfigError, build_model, read_config
from utils import in_parallel, leave_processes

OURS, DEFAULTS, ALONE = "this project's", "torch's defaults", "no exchange"
# name -> arguments of `in_parallel`
SETTINGS = {
    DEFAULTS: {"broadcast_buffers": True, "gradient_as_bucket_view": False},
    OURS: {},
    "broadcast_buffers": {"broadcast_buffers": True},
    "gradients copied": {"gradient_as_bucket_view": False},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    **{f"buckets of {size} MiB": {"bucket_cap_mb": size} for size in (1, 5, 100)},
    "grad_compression bf16": {"compression": "bf16"},
}
# largest difference of the gradients, relative to their norm
AGREEMENT = {"none": 1e-6, "bf16": 1e-2}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kw_config", default="configs/resnet18/kw1x_resnet18.json")
    parser.add_argument("--batch_size", type=at_least(2), default=4, help="images of a process; default %(default)s")
    parser.add_argument("--input_size", type=at_least(16), default=64, help="default %(default)s")
    parser.add_argument("--processes", type=at_least(2), default=2, help="default %(default)s")
    parser.add_argument("--repeats", type=at_least(2), default=7, help="steps of every setting; default %(default)s")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="default: all; torch's and ours always are")
    return parser.parse_args(argv)


class Setting:
    """A copy of a model under the arguments of `in_parallel`.

    Args:
        model: copied.
        x: images of this process, [B, 3, H, W].
        arguments: of `in_parallel`.
    """

    def __init__(self, model, x, arguments):
        self.compression, self.x = arguments.get("compression", "none"), x
        self.net = in_parallel(copy.deepcopy(model).train(), x.device, **arguments)

    def step(self):
        self.net.zero_grad(set_to_none=True)
        self.net(self.x).square().mean().backward()

    def alone(self):
        with self.net.no_sync():
            self.step()

    def gradient(self):
        return torch.cat([parameter.grad.flatten() for parameter in self.net.module.parameters()])

    def buckets(self):
        data = self.net._get_ddp_logging_data()
        return len((data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]).split(","))


def measured(settings, repeats):
    """Seconds of interleaved steps: name -> list; `ALONE`: without an exchange."""
    steps = {name: setting.step for name, setting in settings.items()} | {ALONE: settings[OURS].alone}
    times = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            dist.barrier()
            times[name].append(seconds(step, "cpu"))
    return times


def exchange(size, repeats):
    """Median seconds of the sum of `size` float32 values over the processes, with nothing beside it."""
    values, times = torch.zeros(size), []
    for _ in range(repeats):
        dist.barrier()
        times.append(seconds(lambda: dist.all_reduce(values), "cpu"))
    return statistics.median(times)


def report(args, settings, gradients, times, memory, alone):
    reference, base = gradients[DEFAULTS], statistics.median(times[OURS])
    print(f"{args.kw_config}, {args.processes} processes x {args.batch_size} images of {args.input_size}x", end="")
    print(f"{args.input_size}, {device_name('cpu')}, torch {torch.__version__}")
    print(f"  gradients: {len(reference):,} values, {4 * len(reference) / 2**20:.1f} MiB in float32")
    for name, setting in settings.items():
        error = relative(gradients[name], reference)
        if not error <= AGREEMENT[setting.compression]:
            sys.exit(f"error: {name}: gradients differ from those of torch's defaults by {error:.1e}")
        low, median, high = statistics.quantiles(times[name], n=4, method="inclusive")
        print(
            f"  {name:24s} {setting.buckets():3d} buckets {median * 1e3:8.1f} ms [{low * 1e3:.1f}, {high * 1e3:.1f}] "
            f"{memory[name]:7.0f} MB {median / base:6.2f}"
        )
    without = statistics.median(times[ALONE])
    low, _, high = statistics.quantiles(times[OURS], n=4, method="inclusive")
    hidden = f"{100 * min(1.0, max(0.0, (without + alone - base) / alone)):.0f} % of it beside the backward pass"
    if alone < high - low:
        hidden = "too short beside the spread of the steps to tell how much of it is hidden"
    print(f"  step without exchange {without * 1e3:.1f} ms, exchange alone {alone * 1e3:.1f} ms: {hidden}")


def worker(rank, store, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes)
    torch.manual_seed(0)
    model = build_model(read_config(args.kw_config))
    torch.manual_seed(rank)
    x = torch.randn(args.batch_size, 3, args.input_size, args.input_size)
    chosen = SETTINGS if args.settings is None else {DEFAULTS, OURS, *args.settings}
    settings = {name: Setting(model, x, SETTINGS[name]) for name in SETTINGS if name in chosen}
    gradients = {}
    for name, setting in settings.items():
        # the first step decides the order of the gradients in the buckets; random depth must be equal in all settings
        for _ in range(2):
            torch.manual_seed(rank)
            setting.step()
        gradients[name] = setting.gradient()
    memory = {name: peak_memory(setting.step, "cpu") for name, setting in settings.items()}
    times = measured(settings, args.repeats)
    alone = exchange(len(gradients[OURS]), args.repeats)
    if rank == 0:
        report(args, settings, gradients, times, memory, alone)
    dist.barrier()
    leave_processes()


def main():
    args = parse_arguments()
    try:
        read_config(args.kw_config)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (f"{folder}/store", args), nprocs=args.processes)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
