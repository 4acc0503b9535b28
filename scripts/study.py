#!/usr/bin/env python
"""Trains every config of configs/glyphs over three seeds, and reports accuracy over parameters and multiply-adds.

    python scripts/make_glyphs.py --output glyphs
    python scripts/study.py --data_path glyphs                    # all runs, one after the other; goes on where it was
    python scripts/study.py --data_path glyphs --jobs 2           # two at a time
    python scripts/study.py --report                              # table and plot of the runs so far

Every run is main.py with a config and a seed.  When it ends, it is a row of results/study.csv, and is not run again; a
run that was interrupted goes on from its last checkpoint in --work_dir.  Rows of other data or settings are kept apart.
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

from models.config import parse_command_line
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
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--hours", type=float, default=math.inf, help="start no run after so many hours")
    parser.add_argument("--csv", type=Path, default=ROOT / "results/study.csv", help="rows of finished runs")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "study_runs", help="folder of logs and checkpoints")
    parser.add_argument("--report", action="store_true", help="only write the table and the plot, beside the CSV")
    parser.add_argument("--options", nargs="...", default=[], help="the rest are options of main.py, for every run")
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
    """Append a row of a finished run, whole or not at all."""
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
    """All that a config, its recipe and the options of main.py say."""
    _, given = parse_command_line(["--kw_config", str(ROOT / config), *options])
    return {name: value for name, value in given.items() if name != "kw_config"}


def digest_of_options(given):
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]


def train(config, seed, settings, args, data, classes):
    """Run main.py, and add its row."""
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
    """Run a command; its seconds, those of attempts that were interrupted included."""
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
    """Of an image, by the model that the options make."""
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
            "half": half, "lowest": min(values), "highest": max(values), "parameters": int(runs[0]["parameters"]),
            "multiply_adds": int(runs[0]["multiply_adds"]),
            "train_loss": statistics.mean(float(run["train_loss"]) for run in runs),
            "hours": sum(float(run["seconds"]) * int(run["threads"]) for run in runs) / 3600,
        })  # fmt: skip
    return result


def write_report(path):
    """The table of all finished runs as Markdown, and their plot, beside the CSV."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    groups = summarise(read_rows(path))
    if not groups:
        sys.exit(f"error: {path} holds no finished run")
    page, plot = path.with_suffix(".md"), path.with_suffix(".png")
    lines = [
        "| network | options | parameters, M | multiply-adds, M | top-1, mean | 95 % interval | seeds | core hours |"
    ]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for group in groups:
        about = json.loads((ROOT / group["config"]).read_text())["_about"]["what"].split(";")[0]
        interval = "" if group["half"] is None else f"± {group['half']:.2f}"
        lines.append(
            f"| [{about}](../{group['config']}) | {group['options']} | {group['parameters'] / 1e6:.2f} | "
            f"{group['multiply_adds'] / 1e6:.1f} | {group['mean']:.2f} | {interval} | {group['runs']} | "
            f"{group['hours']:.2f} |"
        )
    table = "\n".join(lines)
    begin, end = "<!-- table -->\n", "\n<!-- end of table -->"
    text = page.read_text() if page.is_file() else f"{begin}{end}\n"
    head, _, rest = text.partition(begin)
    page.write_text(head + begin + table + end + rest.partition(end)[2])

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for group in (group for group in groups if not group["options"]):
        name = Path(group["config"]).stem
        family = next((f for f in ("kw", "od", "dy", "kr") if name.startswith(f)), "static")
        colour = {"static": "#000000", "kw": "#D55E00", "od": "#0072B2", "dy": "#009E73", "kr": "#CC79A7"}[family]
        marker = {"static": "s", "kw": "o", "od": "^", "dy": "v", "kr": "D"}[family]
        for axis, key in zip(axes, ("parameters", "multiply_adds"), strict=True):
            x, error = group[key] / 1e6, group["half"] or 0.0
            axis.errorbar(x, group["mean"], error, color=colour, marker=marker, capsize=3, linestyle="none")
            shown = ("static_" + name if family == "static" else name).replace("resnet18_", "").replace("_", " ")
            axis.annotate(shown, (x, group["mean"]), (5, 4), textcoords="offset points", size=8)
    for axis, label in zip(axes, ("parameters, millions", "multiply-adds of an image, millions"), strict=True):
        axis.set(xscale="log", xlabel=label)
        axis.margins(x=0.2, y=0.1)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(True, which="both", alpha=0.25)
    axes[0].set_ylabel("top-1 in fonts not trained on, %\n(mean of the seeds, 95 % interval)")
    figure.savefig(plot, dpi=130)
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
    print(f"{len(runs)} runs to go, of data {data}", file=sys.stderr, flush=True)
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
