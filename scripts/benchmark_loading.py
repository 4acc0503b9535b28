#!/usr/bin/env python
"""Measure how fast images are read, decoded and augmented, beside the training step that needs them.

    python scripts/benchmark_loading.py --kw_config configs/resnet18/kw1x_resnet18.json --data_path /data/imagenet

Prints images per second of the training loader for every number of loader processes, then of the training step alone;
the device would wait for a loader that is slower than the step. Without --data_path the script generates JPEGs of
ImageNet's usual size; they are smoother than most photographs, and therefore decoded faster. --csv writes the numbers
to a file.
"""

import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import numpy as np
import torch
from PIL import Image

from command_line import parse_command_line
from datasets import cores, make_loaders
from measure import device_name, seconds
from models import ConfigError, build_model
from models.options import MODEL_KEYS
from utils import Process


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kw_config", default="configs/resnet18/kw1x_resnet18.json")
    parser.add_argument("--data_path", type=Path, help="a folder with train/CLASS/IMAGE; default: generated images")
    parser.add_argument("--images", type=int, default=256, help="number of images to generate; default %(default)s")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument(
        "--workers", type=int, nargs="+", help="loader processes; default: 0, 1, 2, 4 ... up to the cores"
    )
    parser.add_argument("--repeats", type=int, default=3, help="epochs of the loader, and steps; default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def make_images(folder, count):
    """Write JPEGs of 500 x 375 pixels, coloured waves with noise, and return the folder."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:375, 0:500]
    for split in ("train", "val"):
        for index in range(count if split == "train" else 2):
            waves = [np.sin(rows / a + columns / b) for a, b in rng.uniform(5, 60, (3, 2))]
            pixels = 128 + 70 * np.stack(waves, 2) + rng.normal(0, 12, (375, 500, 3))
            path = folder / split / str(index % 2) / f"{index}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def loading_speed(args, given, workers, repeats, process):
    """Images per second of the training loader, without the start of its processes."""
    args.num_workers = workers
    loaders = make_loaders(args, {**given, "num_workers": workers}, process)
    speeds = []
    for epoch in range(repeats + 1):
        loaders.set_epoch(epoch)
        start = time.perf_counter()
        images = sum(len(batch) for batch, _ in loaders.train)
        if epoch > 0:  # the first epoch starts the processes
            speeds.append(images / (time.perf_counter() - start))
    return statistics.median(speeds)


def step_speed(args, config, repeats, device):
    """Images per second of a forward and a backward pass."""
    torch.manual_seed(0)
    model = build_model(config).to(device).train()
    x = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            model(x).square().mean().backward()

    step()
    return args.batch_size / statistics.median(seconds(step, device) for _ in range(repeats))


def main():
    ours = parse_arguments()
    with tempfile.TemporaryDirectory() as made:
        folder = ours.data_path or make_images(Path(made), ours.images)
        words = ["--kw_config", ours.kw_config, "--data_path", str(folder), "--batch_size", str(ours.batch_size)]
        try:
            args, given = parse_command_line([*words, "--device", ours.device, "--mixup", "0", "--cutmix", "0"])
            process = Process(0, 1, 0, 1, torch.device(ours.device))
            # make_loaders starts no more processes than cores, since more gain nothing
            counts = ours.workers or [0, *(2**i for i in range(cores().bit_length()))]
            rows = [(f"loader, {n} workers", loading_speed(args, given, n, ours.repeats, process)) for n in counts]
        except ConfigError as error:
            sys.exit(f"error: {error}")
    config = {key: given[key] for key in MODEL_KEYS & set(given)}
    rows.append(("training step", step_speed(args, config, ours.repeats, ours.device)))
    print(f"{args.model}, batch {ours.batch_size}, {args.input_size}x{args.input_size}, {device_name(ours.device)}")
    for what, speed in rows:
        print(f"  {what:24s} {speed:9.1f} images/s")
    fastest = max(speed for what, speed in rows[:-1])
    print(f"  the loader is {fastest / rows[-1][1]:.1f} times as fast as the step")
    if ours.csv:
        ours.csv.parent.mkdir(parents=True, exist_ok=True)
        with ours.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("model", "batch", "size", "what", "images_per_s", "device", "torch"))
            for what, speed in rows:
                common = (device_name(ours.device), torch.__version__)
                writer.writerow((args.model, ours.batch_size, args.input_size, what, f"{speed:.4g}", *common))


if __name__ == "__main__":
    main()
