#!/usr/bin/env python
"""Train every config of configs/glyphs with three seeds, and report accuracy over parameters and multiply-adds.

    python scripts/make_glyphs.py --output glyphs
    python scripts/study.py --data_path glyphs                    # all runs that are not finished, one after the other
    python scripts/study.py --data_path glyphs --jobs 2           # two at a time
    python scripts/study.py --report                              # table and plot of the runs so far

Every run is main.py with a config and a seed. A finished run is a row of results/study.csv, and is not repeated. An
interrupted run continues from its last checkpoint in --work_dir. Runs with other data or settings have separate rows.
"""

import argparse
import concurrent.futures
import csv
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import parse_command_line
from models.options import MODEL_KEYS

FIELDS = (
    "config", "seed", "data", "settings", "options", "parameters", "multiply_adds", "acc1", "acc5", "loss",
    "train_loss", "seconds", "threads",
)  # fmt: skip
LOCK = threading.Lock()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", help="config files; default: all of configs/glyphs")
    parser.add_argument("--data_path", default="", help="folder that scripts/make_glyphs.py wrote")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run; default %(default)s")
    parser.add_argument("--hours", type=float, default=math.inf, help="start no run after this many hours")
    parser.add_argument("--csv", type=Path, default=ROOT / "results/study.csv", help="file for rows of finished runs")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "study_runs", help="folder for logs and checkpoints")
    parser.add_argument("--report", action="store_true", help="only write the table and the plot, beside the CSV")
    parser.add_argument("--options", nargs="...", default=[], help="all that follows: options of main.py for every run")
    args = parser.parse_args()
    if not args.report and not (Path(args.data_path) / "glyphs.npz").is_file():
        parser.error("--data_path must be a folder that scripts/make_glyphs.py wrote")
    return args


def read_rows(path):
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add_row(path, row):
    """Append the row of a finished run. A crash leaves the old file or the whole new one."""
    with LOCK:
        rows = [*read_rows(path), row]
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".tmp")
        with open(fresh, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)


def key_of(row):
    return row["config"], int(row["seed"]), row["data"], row["settings"]


def options_of(config, options):
    """The settings that a config, its recipe and the options of main.py give."""
    _, given = parse_command_line(["--kw_config", str(ROOT / config), *options])
    return {name: value for name, value in given.items() if name != "kw_config"}


def digest_of_options(given):
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]


def train(config, seed, settings, args, data, classes):
    """Run main.py, and add the row of the run."""
    folder = args.work_dir / f"{Path(config).stem}-{seed}-{data}-{settings}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "main.py", "--kw_config", config, "--seed", str(seed), "--device", "cpu"]
    command += ["--data_path", str(Path(args.data_path).resolve()), "--output_dir", str(folder.resolve())]
    command += ["--save_ckpt_num", "1", *args.options]
    seconds = run(command, folder, args.threads, f"{config}, seed {seed}")
    last = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    row = {
        "config": config, "seed": seed, "data": data, "settings": settings, "options": " ".join(args.options),
        "parameters": last["n_parameters"],
        "multiply_adds": multiply_adds(options_of(config, args.options), classes),
        "acc1": f"{last['test_acc1']:.3f}", "acc5": f"{last['test_acc5']:.3f}",
        "loss": f"{last['test_loss']:.4f}", "train_loss": f"{last['train_loss']:.4f}", "seconds": round(seconds),
        "threads": args.threads,
    }  # fmt: skip
    add_row(args.csv, row)
    print(f"{config} seed {seed}: top-1 {row['acc1']} in {row['seconds']} s", file=sys.stderr, flush=True)


def run(command, folder, threads, name):
    """Run a command; returns its seconds, including those of interrupted attempts."""
    spent = folder / "seconds.txt"
    before, started = float(spent.read_text()) if spent.is_file() else 0.0, time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(folder / "output.txt", "a") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        while True:
            try:
                code = process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                code = None
            seconds = before + time.perf_counter() - started
            spent.write_text(str(seconds))
            if code is not None:
                break
    if code != 0:
        raise RuntimeError(f"{name}: {(folder / 'output.txt').read_text().strip().splitlines()[-1]}")
    return seconds


def multiply_adds(given, classes):
    """Multiply-adds for one image, of the model that the options describe."""
    import torch

    from models import build_model
    from models.counting import count_layers

    with torch.device("meta"):
        model = build_model({key: given[key] for key in MODEL_KEYS if key in given}, num_classes=classes)
    return sum(layer.multiply_adds for layer in count_layers(model, given["input_size"]))


def summarise(rows):
    """A dict for every config, data and options: mean top-1, half of its 95 % confidence interval, and more."""
    from scipy.stats import t

    groups = {}
    for row in rows:
        groups.setdefault((row["config"], row["data"], row["settings"], row["options"]), []).append(row)
    result = []
    for (config, data, _, options), runs in groups.items():
        values = [float(run["acc1"]) for run in runs]
        half = None
        if len(values) > 1:
            half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        result.append({
            "config": config, "data": data, "options": options, "runs": len(values), "mean": statistics.mean(values),
            "half": half, "values": values, "lowest": min(values), "highest": max(values),
            "parameters": int(runs[0]["parameters"]), "multiply_adds": int(runs[0]["multiply_adds"]),
            "train_loss": statistics.mean(float(run["train_loss"]) for run in runs),
            "hours": sum(float(run["seconds"]) * int(run["threads"]) for run in runs) / 3600,
        })  # fmt: skip
    return result


def title(config):
    """The description of a config, without its recipe."""
    return json.loads((ROOT / config).read_text())["_about"]["what"].split(";")[0]


def table(groups, with_options):
    """Lines of a Markdown table, sorted by parameters."""
    heads = [
        "network",
        "options",
        "parameters, M",
        "multiply-adds, M",
        "top-1, mean",
        "95 % interval",
        "lowest to highest",
    ]
    heads += ["seeds", "core hours"]
    lines, kept = [], [head for head in heads if with_options or head != "options"]
    for group in sorted(groups, key=lambda group: group["parameters"]):
        about = title(group["config"])
        cells = {
            "network": f"[{about}](../{group['config']})", "options": f"`{group['options']}`",
            "parameters, M": f"{group['parameters'] / 1e6:.2f}",
            "multiply-adds, M": f"{group['multiply_adds'] / 1e6:.1f}", "top-1, mean": f"{group['mean']:.2f}",
            "95 % interval": "" if group["half"] is None else f"± {group['half']:.2f}",
            "lowest to highest": "" if group["runs"] == 1 else f"{group['lowest']:.2f} to {group['highest']:.2f}",
            "seeds": group["runs"], "core hours": f"{group['hours']:.2f}",
        }  # fmt: skip
        lines.append("| " + " | ".join(str(cells[head]) for head in kept) + " |")
    rule = "|" + "|".join("---" if head in ("network", "options") else "---:" for head in kept) + "|"
    return ["| " + " | ".join(kept) + " |", rule, *lines]


def draw(groups, path):
    """Plot the error over parameters and over multiply-adds: every run, the mean of the seeds, and its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    colours = {"static": "#000000", "kw": "#D55E00", "od": "#0072B2", "dy": "#009E73", "kr": "#CC79A7"}
    used = {}
    for group in sorted(groups, key=lambda group: group["config"]):
        name = Path(group["config"]).stem
        family = next((f for f in colours if name.startswith(f)), "static")
        marker = "so^Dv"[used.setdefault(family, 0) % 5]
        used[family] += 1
        shown = title(group["config"])
        shown = shown.partition(" with ")[2] or shown.replace("ResNet18 of", "static,").removesuffix(", static")
        errors, mean = [100 - value for value in group["values"]], 100 - group["mean"]
        low, high = mean - (group["half"] or 0), mean + (group["half"] or 0)
        for axis, key in zip(axes, ("parameters", "multiply_adds"), strict=True):
            x = group[key] / 1e6
            axis.plot(x, mean, marker, color=colours[family], label=shown, markersize=8)
            axis.plot([x] * len(errors), errors, ".", color=colours[family], alpha=0.6)
            # an interval of two or three seeds may extend beyond the scale
            axis.plot([x, x], [max(low, 1), min(high, 100)], "-", color=colours[family], linewidth=1)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis, label in zip(axes, ("parameters, millions", "multiply-adds of an image, millions"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.margins(x=0.15, y=0.1)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter(plain)
            scale.set_minor_formatter(NullFormatter())
        axis.grid(True, which="major", alpha=0.25)
    axes[0].set_ylabel(
        "top-1 error in fonts not trained on, % (lower is better)\nruns, their mean, and its 95 % interval"
    )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(path):
    """Write the tables of all finished runs as Markdown, and the plot of those without options, beside the CSV."""
    groups = summarise(read_rows(path))
    if not groups:
        sys.exit(f"error: {path} holds no finished run")
    page, plot = path.with_suffix(".md"), path.with_suffix(".png")
    plain, others = ([group for group in groups if bool(group["options"]) == given] for given in (False, True))
    lines = table(plain, False) if plain else []
    if others:
        lines += [*([""] if plain else []), "With other options:", "", *table(others, True)]
    begin, end = "<!-- table -->\n", "\n<!-- end of table -->"
    text = page.read_text() if page.is_file() else f"{begin}{end}\n"
    head, _, rest = text.partition(begin)
    page.write_text(head + begin + "\n".join(lines) + end + rest.partition(end)[2])
    draw(plain or others, plot)
    print(f"{page} and {plot}", file=sys.stderr)


def main():
    args = parse_arguments()
    if args.report:
        write_report(args.csv)
        return
    import numpy as np
    from make_glyphs import digest_of

    with np.load(Path(args.data_path) / "glyphs.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    data, classes = digest_of(arrays)[:12], len(arrays["classes"])
    configs = args.configs or sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/glyphs/*.json"))
    done = {key_of(row) for row in read_rows(args.csv)}
    settings = {config: digest_of_options(options_of(config, args.options)) for config in configs}
    runs = [(config, seed, settings[config]) for seed in args.seeds for config in configs]
    runs = [run for run in runs if (run[0], run[1], data, run[2]) not in done]
    print(f"{len(runs)} runs to go, with data {data}", file=sys.stderr, flush=True)
    until = time.monotonic() + 3600 * args.hours

    def train_in_time(run):
        return train(*run, args, data, classes) if time.monotonic() < until else None

    try:
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(train_in_time, runs))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    write_report(args.csv)


if __name__ == "__main__":
    main()
