#!/usr/bin/env python
"""Measure the time of every layer in a training step.

    python scripts/profile_step.py --kw_config configs/resnet18/kw1x_resnet18.json --batch_size 8

Dynamic layers are listed by name, with the share of their attention; other layers are summed by type. The device is
synchronised around every layer, which makes the sum larger than the time of a normal step; that time is printed first.
--trace FILE writes a trace of normal steps for chrome://tracing or Perfetto.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import torch
from timm.utils import ModelEmaV3

from measure import seconds, wait
from models import ConfigError, build_model, read_config, warehouse_layers

FORWARD, BACKWARD = 0, 1


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kw_config", default="configs/resnet18/kw1x_resnet18.json")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--use_amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU; default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trace", type=Path, help="write a trace of three steps to this file")
    return parser.parse_args()


class Clock:
    """Forward and backward times of modules with one input and one output, measured by hooks that wait for the device.

    The hooks of the backward pass are on tensors, because hooks on modules do not work with in-place operations.
    """

    def __init__(self, modules, device):
        self.device, self.started, self.times = device, {}, defaultdict(lambda: [0.0, 0.0])
        self.handles = []
        for name, module in modules.items():
            self.handles.append(module.register_forward_pre_hook(partial(self._before, name)))
            self.handles.append(module.register_forward_hook(partial(self._after, name)))

    def _start(self, name, direction, *_):
        wait(self.device)
        self.started[name, direction] = time.perf_counter()

    def _stop(self, name, direction, *_):
        wait(self.device)
        started = self.started.pop((name, direction), None)
        if started is not None:  # in the backward pass, a module that returns its input ends before it starts
            self.times[name][direction] += time.perf_counter() - started

    def _before(self, name, module, inputs):
        x = inputs[0]
        self.started.pop((name, BACKWARD), None)
        if x.requires_grad:
            # the hook is on a view of the input, so that other users of the input do not delay it
            x = x.view_as(x)
            x.register_hook(partial(self._stop, name, BACKWARD))
        self._start(name, FORWARD)
        return (x, *inputs[1:])

    def _after(self, name, module, inputs, output):
        self._stop(name, FORWARD)
        if inputs[0].requires_grad and output.requires_grad:
            output.register_hook(partial(self._start, name, BACKWARD))

    def remove(self):
        for handle in self.handles:
            handle.remove()


def layers(model):
    """Dynamic layers by name, and all modules to time by name.

    The modules to time are the dynamic layers, their attentions, and all other modules without children.
    """
    users = {name for layers in warehouse_layers(model).values() for name in layers}
    dynamic = {name: module for name, module in model.named_modules() if name in users}
    inside = {f"{name}.{child}" for name, layer in dynamic.items() for child, _ in layer.named_modules() if child}
    modules = dict(dynamic)
    for name, module in model.named_modules():
        if name.endswith(".attention") and name.removesuffix(".attention") in dynamic:
            modules[name] = module
        elif name not in inside and name not in dynamic and not any(module.children()):
            modules[name] = module
    return dynamic, modules


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    try:
        model = build_model(read_config(args.kw_config))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(args.device, memory_format=layout).train()
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # in place, it would overwrite the hooks' view of its input
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ema = ModelEmaV3(model)
    x = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=args.device).to(memory_format=layout)
    y = torch.randint(1000, (args.batch_size,), device=args.device)
    state = {}

    def forward():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.use_amp):
            state["loss"] = torch.nn.functional.cross_entropy(model(x), y)

    parts = {
        "forward": forward,
        "backward": lambda: state["loss"].backward(),
        "optimizer": lambda: (optimizer.step(), optimizer.zero_grad()),
        "average of weights": lambda: ema.update(model),
    }
    for part in parts.values():  # warm-up
        part()
    times = {name: [] for name in parts}
    for _ in range(args.repeats):
        for name, part in parts.items():
            times[name].append(seconds(part, args.device))
    print(f"{args.kw_config}, batch {args.batch_size}, {args.input_size}x{args.input_size}, {args.device}")
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    for name, value in medians.items():
        print(f"  {name:20s} {value:8.1f} ms  {100 * value / sum(medians.values()):5.1f} %")
    print(
        f"  {'step':20s} {sum(medians.values()):8.1f} ms  {args.batch_size / sum(medians.values()) * 1e3:.1f} images/s"
    )

    dynamic, modules = layers(model)
    clock = Clock(modules, args.device)
    for _ in range(args.repeats):
        for part in parts.values():
            part()
    clock.remove()
    print_layers(dynamic, modules, clock.times, args.repeats)
    if args.trace:
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if args.device == "cuda" else []
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            for part in list(parts.values()) * 3:
                part()
        args.trace.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(args.trace))


def print_layers(dynamic, modules, times, repeats):
    rows, by_type = [], defaultdict(lambda: [0.0, 0.0, 0])
    for name, module in modules.items():
        forward, backward = (value / repeats * 1e3 for value in times[name])
        if name in dynamic:
            attention = [value / repeats * 1e3 for value in times[f"{name}.attention"]]
            rows.append((name, module, forward, backward, attention))
        elif name.removesuffix(".attention") not in dynamic:
            total = by_type[type(module).__name__]
            total[0] += forward
            total[1] += backward
            total[2] += 1
    print("\n  ms of each layer, synchronised: forward (attention's share), backward (attention's share)")
    for name, module, forward, backward, attention in rows:
        sizes = (getattr(module, "in_channels", None), getattr(module, "out_channels", None))
        what = f"{type(module).__name__} {sizes[0]} -> {sizes[1]}" if all(sizes) else type(module).__name__
        print(f"  {name:34s} {what:24s} {forward:8.2f} ({attention[0]:5.2f}) {backward:8.2f} ({attention[1]:5.2f})")
    for name, (forward, backward, count) in sorted(by_type.items(), key=lambda item: -sum(item[1][:2])):
        if forward + backward < 0.01:
            continue
        print(f"  {f'{count} x {name}':59s} {forward:8.2f}         {backward:8.2f}")


if __name__ == "__main__":
    main()
