#!/usr/bin/env python
"""Train the static network of configs/digits, then every method from its weights, and write a table of the accuracies.

python scripts/warm_start.py --output results/warm_start.md [CONFIG ...] [--seeds 0 1 2]
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from train_digits import ROOT, name_of, run, spread

STATIC = "configs/digits/test_resnet.json"
# these add attention to features and have no kernels of their own, or are the same as another from static weights
LEFT_OUT = ("se_", "cbam_", "eca_", "kw1x_static_")
# of the second training
OPTIONS = ["--epochs", "4", "--lr", "0.001", "--warmup_epochs", "1"]
HEAD = """# From static weights

Every method starts from a static network that was trained on scikit-learn's digits (`--init_static`), and is trained
for four more epochs; the first row is the static network, which is trained on as well. Top-1 accuracy in percent, mean
(lowest to highest) of the seeds {seeds}; one of the 360 test images is 0.28. The temperature stays at its last value.

`python scripts/warm_start.py --output results/warm_start.md`

| model | config | at the start | after 4 epochs |
|---|---|---:|---:|
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", help="config files; default: those of configs/digits with own kernels")
    parser.add_argument("--output", default="", help="file to write the table to; default: the standard output")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    found = sorted((ROOT / "configs/digits").glob("*_test_resnet.json"))
    found = [str(path.relative_to(ROOT)) for path in found if not path.name.startswith(LEFT_OUT)]
    text = HEAD.format(seeds=", ".join(map(str, args.seeds)))
    with tempfile.TemporaryDirectory() as folder:
        trained = {seed: Path(folder) / f"{seed}" for seed in args.seeds}
        for seed, output in trained.items():
            run(STATIC, seed, args.threads, ["--output_dir", str(output)])
        for config in [STATIC, *(args.configs or found)]:
            accuracies = [from_static(config, seed, args.threads, output) for seed, output in trained.items()]
            starts, ends = (spread(values) for values in zip(*accuracies, strict=True))
            row = f"| {name_of(config)} | [{Path(config).stem}](../{config}) | {starts} | {ends} |"
            print(row, file=sys.stderr, flush=True)
            text += row + "\n"
            # write after every config, so that an interrupted script keeps its rows
            if args.output:
                Path(args.output).write_text(text)
    if not args.output:
        print(text, end="")


def from_static(config, seed, threads, trained):
    """The accuracies of a config with the weights of a static run, before and after training."""
    weights = max(trained.glob("checkpoint-[0-9]*.pth"), key=lambda path: int(path.stem.split("-")[1]))
    options = ["--finetune" if config == STATIC else "--init_static", str(weights)]
    # the standardisation of WE would change the static kernels
    options += ["--standardise", "false"] if Path(config).name.startswith("we_") else []
    start = run(config, seed, threads, [*options, "--eval", "true"])[0]
    end = run(config, seed, threads, [*options, *OPTIONS])[0]
    return accuracies_of(start)[0], accuracies_of(end)[-1]


def accuracies_of(output):
    """The top-1 accuracies that main.py printed."""
    return [float(text) for text in re.findall(r"Acc@1 ([\d.]+)", output)]


if __name__ == "__main__":
    main()
