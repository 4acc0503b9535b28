#!/usr/bin/env python
"""Train the static network of configs/digits, then every method from its weights, and write a table of the accuracies.

python scripts/warm_start.py --output results/warm_start.md [CONFIG ...] [--seeds 0 1 2]
"""

import re
import tempfile
from pathlib import Path

from train_digits import ROOT, make_parser, name_of, run, spread, write_rows

STATIC = "configs/digits/test_resnet.json"
# these add attention to features and have no kernels of their own, or are the same as another from static weights
LEFT_OUT = ("se_", "cbam_", "eca_", "kw1x_static_")
# of the second training
OPTIONS = ["--epochs", "4", "--lr", "0.0005", "--warmup_epochs", "1"]
HEAD = """# From static weights

Every method starts from a static network that was trained on scikit-learn's digits (`--init_static`), and is trained
for four more epochs at a learning rate of 5e-4; the first row is the static network, which is trained on as well.
Top-1 accuracy in percent, mean (lowest to highest) of the seeds {seeds}; one of the 360 test images is 0.28. The
temperature stays at its last value.

`python scripts/warm_start.py --output results/warm_start.md`

| model | config | at the start | after 4 epochs |
|---|---|---:|---:|
"""


def main():
    args = make_parser(__doc__.splitlines()[0], "those of configs/digits with own kernels").parse_args()
    found = sorted((ROOT / "configs/digits").glob("*_test_resnet.json"))
    found = [str(path.relative_to(ROOT)) for path in found if not path.name.startswith(LEFT_OUT)]
    text = HEAD.format(seeds=", ".join(map(str, args.seeds)))
    with tempfile.TemporaryDirectory() as folder:
        trained = {seed: Path(folder) / f"{seed}" for seed in args.seeds}
        for seed, output in trained.items():
            run(STATIC, seed, args.threads, ["--output_dir", str(output)])
        rows = (row_of(config, args, trained) for config in [STATIC, *(args.configs or found)])
        write_rows(text, rows, args.output)


def row_of(config, args, trained):
    """The row of the table for a config, from the static runs of all seeds."""
    accuracies = [from_static(config, seed, args.threads, output) for seed, output in trained.items()]
    starts, ends = (spread(values) for values in zip(*accuracies, strict=True))
    return f"| {name_of(config)} | [{Path(config).stem}](../{config}) | {starts} | {ends} |"


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
