#!/usr/bin/env python
"""Check and measure everything that a GPU runs, in one command of at most 8 minutes, and fit the costs to this GPU.

    python scripts/gpu_check.py
    python scripts/gpu_check.py --dry_run        on the CPU, with the smallest cases: whether this program itself works

1. Every backend of the operator against its definition: outputs and all gradients, in float32, bfloat16 and float16.
2. Training on the GPU against the CPU: a resumed run, steps without synchronisation, and a step and an evaluation of a
   small model of every method, in mixed precision, compiled, averaged and in DistributedDataParallel.
3. Times of every backend on the layers of ResNet18, ResNet50, MobileNetV2 and ConvNeXt-Tiny, the fit of the costs by
   which `models/ops/cost.py` chooses backends, and times and memory of the whole networks.

What fails is printed, and the others go on. A backend that failed is not timed. Where the time is up, cells of the
tables stay empty. Writes OUTPUT/gpu.md, OUTPUT/gpu_layers.csv, OUTPUT/gpu_networks.csv and the file of costs.

Exit code: 0 if all checks were made and passed, 1 if not, or if something hangs, 2 without a GPU.
"""

import argparse
import faulthandler
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from startup import before_torch

before_torch()

import torch

PARTS = ("operators", "resume", "synchronisations", "methods", "times")
# shares of the whole time at which the parts end
UNTIL = {"operators": 0.36, "resume": 0.39, "synchronisations": 0.43, "methods": 0.66, "layers": 0.82, "networks": 0.97}
# times as long as asked for
STUCK = 1.5


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry_run", action="store_true", help="run all of the code on the CPU, with small cases")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--skip", nargs="+", default=[], metavar="BACKEND", help="backends to leave out")
    parser.add_argument("--minutes", type=float, default=8, help="of the whole command; default %(default)s")
    parser.add_argument("--output", type=Path, help="folder of the tables; default results/, of a dry run none")
    parser.add_argument("--costs", type=Path, help="file of the costs; default models/ops/cuda_costs.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run with the options of `argv` (None: the command line); returns the exit code."""
    args = parse_arguments(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("error: no GPU found; --dry_run tries this program on the CPU", file=sys.stderr)
        return 2
    # after --help and without a GPU nothing slow is loaded
    from gpu_checks.report import LostDevice, Report
    from gpu_checks.writing import machine
    from models.ops.backends import BACKENDS

    unknown = [name for name in args.skip if name not in BACKENDS]
    if unknown:
        print(f"error: --skip {unknown[0]}: the backends are {', '.join(BACKENDS)}", file=sys.stderr)
        return 2
    # something waits for ever: show where, and end
    faulthandler.dump_traceback_later(60 * STUCK * max(args.minutes, 1), exit=True, file=sys.__stderr__)
    report = Report("cpu" if args.dry_run else "cuda", args.minutes, args.dry_run)
    print(machine(report), flush=True)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = args.output or (Path(folder) if args.dry_run else ROOT / "results")
        try:
            run(report, args, output)
        except LostDevice as error:
            report.fail("the GPU", str(error))
        finally:
            faulthandler.cancel_dump_traceback_later()
    print(f"\n{report.summary()}, in {report.elapsed():.0f} s")
    for line in report.failures:
        print(f"FAILED {line}")
    return 0 if report.ok else 1


def run(report, args: argparse.Namespace, output: Path) -> None:
    """The parts that were asked for.

    Raises:
        LostDevice: nothing can run on the GPU any more.
    """
    from gpu_checks import operators, runs, training
    from gpu_checks.cases import layer_shapes, networks
    from gpu_checks.timing import Size

    size = Size(2, 32) if report.dry else Size()
    configs = networks(report.dry)
    recorded = {name: layer_shapes(config, size.image) for name, config in configs.items()}
    skip = set(args.skip)
    if "operators" in args.only:
        report.begin("The operator against its definition", UNTIL["operators"])
        distinct = dict.fromkeys(shapes for calls in recorded.values() for _, shapes in calls)
        skip |= operators.check(report, list(distinct), args.skip)
    if "resume" in args.only:
        report.begin("A resumed run", UNTIL["resume"])
        runs.check_resumed_run(report)
    if "synchronisations" in args.only:
        report.begin("Synchronisations in a step", UNTIL["synchronisations"])
        runs.check_synchronisations(report)
    if "methods" in args.only:
        report.begin("Every method against the CPU", UNTIL["methods"])
        training.check(report, args.skip)
    if "times" in args.only:
        measure(report, args, output, recorded, configs, size, skip)


def measure(report, args, output, recorded, configs, size, skip) -> None:
    """Times of layers and networks, and the costs; written into the folder `output` after every step."""
    from gpu_checks import costs, timing, writing
    from models.ops import fitted_costs

    path = args.costs or (output / "cuda_costs.json" if report.dry else fitted_costs.PATH)
    layers = timing.layers_of(recorded, size)
    if report.dry:
        layers = sorted(layers, key=lambda layer: math.prod(layer.shapes.x + layer.shapes.cells))[:12]
        configs = dict(list(configs.items())[:2])
    found = {}

    def write():
        timing.write_layers(output / "gpu_layers.csv", layers, size, report.device)
        timing.write_networks(output / "gpu_networks.csv", found)
        writing.write_page(output / "gpu.md", report, found, list(configs), layers, size)

    report.begin("Times of layers", UNTIL["layers"])
    timing.time_layers(report, layers, size, skip)
    table = report.attempt("fit of the costs", costs.fit_costs, report, layers, size)
    if table:
        capability = "{}.{}".format(*fitted_costs.capability()) if report.device == "cuda" else "cpu"
        costs.write_costs(path, capability, size, table)
        report.note(f"the costs are in {path.name}, for compute capability {capability}")
    write()
    report.begin("Times of networks", UNTIL["networks"])
    found |= timing.time_networks(report, configs, size)
    write()


if __name__ == "__main__":
    if "--dry_run" in sys.argv:
        # must be set before Triton is loaded
        os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.exit(main())
