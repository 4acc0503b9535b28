#!/usr/bin/env python
"""Speed of a dynamic model beside the static network and the naive order, in one run.

    python scripts/benchmark.py --kw_config configs/resnet18/kw1x_resnet18.json --batch_size 8 --input_size 224

The naive order is the definition: assemble, permute, convolve in groups.  Nothing is printed for a model whose results
differ from it.  Repeats are interleaved; the numbers are medians, with the lower and upper quartile.
With --layers: every order, layer by layer.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from models import ConfigError, build_model, read_config
from models.build import parse_name
from models.ops.mixture_conv import forced_order

# of logits and of gradients, relative to their norm; float32 rounding gives up to 1e-5
AGREEMENT = 1e-3


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kw_config", default="configs/resnet18/kw1x_resnet18.json")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[8])
    parser.add_argument("--input_size", type=int, nargs="+", default=[224], help="one for all, or one per batch size")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", action="store_true", help="every order, layer by layer, instead of whole models")
    return parser.parse_args()


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def relative(value, reference):
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


def disagreement(model, x):
    """Largest relative difference of logits and gradients between the naive and the chosen orders."""
    results = []
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    # statistics of this batch, held fixed: with fresh ones the signal fades, with running ones rounding is amplified
    for momentum in (1.0, 0.1):
        for norm in norms:
            norm.momentum = momentum
        if momentum == 1.0:
            with torch.no_grad():
                model.train()(x)
    model.eval()
    for order in ("naive", None):
        model.zero_grad()
        with forced_order(order):
            logits = model(x)
            (logits / logits.detach().std()).square().mean().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    naive, ours = results
    total = torch.cat([g.flatten() for g in naive[1:]])
    return max(relative(ours[0], naive[0]), relative(torch.cat([g.flatten() for g in ours[1:]]), total))


def inference(model, x):
    model.eval()

    def run():
        with torch.inference_mode():
            model(x)

    return run


def training_step(model, x):
    model.train()

    def run():
        model.zero_grad()
        model(x).square().mean().backward()

    return run


def measure(models, x, make, repeats, device):
    """Times per name, interleaved, after one run of each to warm up."""
    times = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, (model, order) in models.items():
            run = make(model, x)
            with forced_order(order):
                duration = seconds(run, device)
            if repeat:
                times[name].append(duration)
    return times


def describe(times):
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return f"{middle * 1e3:8.1f} ms [{low * 1e3:.1f}, {high * 1e3:.1f}]"


def compare_models(config, batch, size, args):
    torch.manual_seed(0)
    _, backbone = parse_name(config["model"])
    dynamic = build_model(config).to(args.device)
    static = build_model({"model": backbone}).to(args.device)
    x = torch.randn(batch, 3, size, size, device=args.device)
    error = disagreement(dynamic, x)
    if not error <= AGREEMENT:
        sys.exit(f"error: {args.kw_config}: results differ from the naive order by {error:.1e}; no speed is printed")
    print(f"\n{config['model']}, batch {batch}, {size}x{size}; agrees with the naive order to {error:.0e}")
    models = {"static": (static, None), "naive": (dynamic, "naive"), "ours": (dynamic, None)}
    for mode, make in (("inference", inference), ("training step", training_step)):
        times = measure(models, x, make, args.repeats, args.device)
        ours = statistics.median(times["ours"])
        for name, values in times.items():
            rate = batch / statistics.median(values)
            ratio = statistics.median(values) / ours
            print(f"  {mode:13s} {name:6s} {describe(values)}  {rate:8.1f} images/s  ours is {ratio:5.2f} x as fast")


def record_layers(model, x):
    """(layer, arguments of its operator) of one forward pass, each shape once."""
    import models.layers.kernel_warehouse as home

    calls, operator = {}, home.mixture_conv

    def recording(x, alpha, cells, kernel_size, bias=None, *rest):
        key = (*x.shape, *alpha.shape, *cells.shape, *kernel_size, *rest)
        calls.setdefault(str(key), [0, (x.detach(), alpha.detach(), cells.detach(), kernel_size, None, *rest)])[0] += 1
        return operator(x, alpha, cells, kernel_size, bias, *rest)

    home.mixture_conv = recording
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        home.mixture_conv = operator
    return calls.values()


def compare_layers(config, batch, size, args):
    """Forward and backward times of all orders; the chosen one is marked."""
    from models.ops import mixture_conv
    from models.ops.cost import cheapest
    from models.ops.geometry import geometry
    from models.ops.mixture_conv import available_orders

    torch.manual_seed(0)
    model = build_model(config).to(args.device)
    print(f"\n{config['model']}, batch {batch}, {size}x{size}: forward / forward and backward in ms, * is chosen")
    for count, (x, alpha, cells, kernel, bias, *rest) in record_layers(
        model, torch.randn(batch, 3, size, size, device=args.device)
    ):
        tensors = [t.clone().requires_grad_() for t in (x, alpha, cells)]
        stride, padding, dilation, groups = (
            *([v] * len(kernel) if isinstance(v, int) else list(v) for v in (*rest, *(1, 0, 1)[len(rest) :])[:3]),
            rest[3] if len(rest) > 3 else 1,
        )
        geo = geometry(x.shape, alpha.shape, cells.shape, kernel, stride, padding, dilation, groups)
        orders = available_orders(geo, x)
        chosen, cells_text = cheapest(geo, orders, x), []
        for order in ("naive", *orders):

            def forward(order=order, tensors=tensors, kernel=kernel, rest=rest):
                return mixture_conv(*tensors, kernel, None, *rest, order=order)

            def both(forward=forward, tensors=tensors):
                y = forward()
                torch.autograd.grad(y, tensors, torch.ones_like(y))

            values = []
            for run in (lambda: torch.inference_mode()(forward)(), both):
                seconds(run, args.device)
                values.append(min(seconds(run, args.device) for _ in range(args.repeats)) * 1e3)
            cells_text.append(f"{order}{'*' if order == chosen else ''} {values[0]:.1f} / {values[1]:.1f}")
        name = f"{count} x {list(x.shape[1:])} -> {geo.c_out}, kernel {list(kernel)}, n {geo.n}, cell {list(geo.cell)}"
        print(f"  {name}: {'  '.join(cells_text)}")


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    try:
        config = {"model": "convnext_tiny", **read_config(args.kw_config)}
    except ConfigError as error:
        sys.exit(f"error: {error}")
    sizes = args.input_size if len(args.input_size) > 1 else args.input_size * len(args.batch_size)
    if len(sizes) != len(args.batch_size):
        sys.exit("error: --input_size takes one value, or one for every --batch_size")
    if parse_name(config["model"])[0] is None:
        sys.exit(f"error: '{config['model']}' is static already; give the config of a dynamic model")
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {where}, float32, median of {args.repeats} interleaved repeats [quartiles]")
    for batch, size in zip(args.batch_size, sizes, strict=True):
        (compare_layers if args.layers else compare_models)(config, batch, size, args)


if __name__ == "__main__":
    main()
