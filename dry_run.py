"""What a run would do, told without doing it: --dry_run. Nothing is written."""

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoints import model_settings
from datasets import Loaders, known_classes, make_loaders
from elastic import divide_update, scale_lr
from engine import autocast
from models import build_model, report_model
from models.build import PREFIXES, parse_name
from models.counting import count_layers
from models.messages import first_line, quiet
from optim_factory import create_optimizer
from option_checks import check_data
from utils import Process, log, peak_memory, read_launcher

# seconds that measuring may take, beside the step that it begins with
BUDGET = 5.0
# multiply-adds of an image beyond which nothing is measured: one step would take longer than that
LARGEST = {"cpu": 5e10, "cuda": 5e12}
# names of classes that are shown
SHOWN = 8


@dataclass
class Measured:
    """Forward and backward passes on the device.

    Args:
        images: of the largest pass that was measured.
        seconds: that it took.
        memory: estimate of the greatest memory with the whole batch, in bytes.
    """

    images: int
    seconds: float
    memory: float


def dry_run(args: argparse.Namespace, given: dict[str, Any], asked: dict[str, Any]) -> None:
    """Print the data, the model, its costs, the updates, and an estimate of memory and time.

    Args:
        args: all options; extended by what the data tell.
        given: those of them that the command line, the config, the recipe or the checkpoint gave.
        asked: those on the command line itself.

    Raises:
        ConfigError: names the option, or the data.
    """
    _, world, _, local_world, _ = read_launcher(args)
    cuda = args.device.startswith("cuda") and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    loaders = _data(args, given, asked, Process(0, world, 0, local_world, device))
    if loaders is None:
        classes = args.nb_classes if "nb_classes" in given else known_classes(args.data_set) or args.nb_classes
    else:
        classes = loaders.nb_classes

    settings = model_settings(args, given)
    cost = _model(args, settings, classes)
    if args.eval:
        return

    images = divide_update(args, None, None, world)["target"]
    scale_lr(args, images)
    each = f"{args.batch_size} x {args.update_freq} x {world}"
    steps = 0 if loaders is None else len(loaders.train) // args.update_freq
    whole = f", {steps:,} updates an epoch, {steps * args.epochs:,} in {args.epochs} epochs" if steps else ""
    log(f"updates: {each} = {images} images an update{whole}")

    if cost is not None and cost > LARGEST[device.type]:
        log(f"memory and time: not measured, since a step takes long on {device}")
        return
    with _own_caches(), quiet():
        try:
            measured = measure(args, build_model(settings, num_classes=classes).to(device), classes, device)
        except (RuntimeError, ValueError, AssertionError) as error:
            # of memory that does not suffice, of images too small for the network, of a batch of one
            log(f"memory and time: a step fails: {first_line(error)}")
            return
    _estimate(args, measured, steps, device)


def _data(args: argparse.Namespace, given: dict[str, Any], asked: dict[str, Any], process: Process) -> Loaders | None:
    """The loaders of the run; None where the data are not looked at, and a line tells why."""
    fetched = args.data_set.startswith(("hfds/", "hfids/", "tfds/"))
    fetched |= any("://" in (path or "") for path in (args.data_path, args.eval_data_path))
    if fetched:
        log(f"data: {args.data_set}, not looked at, since a dry run fetches nothing")
        return None
    if args.data_set != "digits" and not args.data_path and not (args.eval and args.eval_data_path):
        log(f"data: {args.data_set}, not looked at, since there is no --data_path")
        return None
    check_data(args, asked)
    loaders = make_loaders(args, given, process)
    parts = {"to train": loaders.train, "to evaluate": loaders.evaluation}
    counts = ", ".join(f"{len(loader.dataset):,} images {what}" for what, loader in parts.items() if loader is not None)
    names = loaders.classes or []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    listed = f": {', '.join(names[:SHOWN])}{more}" if names else ""
    log(f"data: {args.data_set}, {counts}; {loaders.nb_classes} classes{listed}")
    return loaders


def _model(args: argparse.Namespace, settings: dict[str, Any], classes: int) -> int | None:
    """Print what the model is; returns its multiply-adds for an image, None where they cannot be counted.

    Raises:
        ConfigError: a setting is wrong.
    """
    prefix, _ = parse_name(args.model)
    log(f"model: {args.model}, {classes} classes, {args.input_size}x{args.input_size} pixels")
    if PREFIXES.get(prefix, (None, {}))[0] is not None:
        report = report_model(settings, num_classes=classes, input_size=args.input_size)
        print(report, flush=True)
        return None if report.multiply_adds is None else report.multiply_adds[1]
    with torch.device("meta"):
        model = build_model(settings, num_classes=classes)
    parameters, cost = sum(parameter.numel() for parameter in model.parameters()), None
    with contextlib.suppress(RuntimeError, ValueError, AssertionError), quiet():
        # a network may do with numbers what it cannot do with shapes alone, or refuse the size
        cost = sum(row.multiply_adds for row in count_layers(model, args.input_size, args.in_chans))
    counted = "" if cost is None else f", {cost / 1e6:,.2f} M multiply-adds an image"
    log(f"static: {parameters / 1e6:,.2f} M parameters{counted}")
    return cost


def measure(args: argparse.Namespace, model: nn.Module, classes: int, device: torch.device) -> Measured:
    """Time steps on random images: of two images, then of four times as many, up to the batch or while there is time.

    Args:
        args: options `batch_size`, `input_size`, `use_amp`, `channels_last` and those of the optimizer.
        model: on the device; trained a little.
        classes: of the model.
        device: the device.
    """
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer(args, model.train())
    images, sizes, begin = min(2, args.batch_size), [], None
    while True:
        # the first step of a shape also chooses algorithms, and others on the machine may disturb one
        first, *others = (_step(args, model, optimizer, classes, images, device) for _ in range(3))
        sizes.append((images, peak_memory(device)))
        begin = begin or time.perf_counter()
        seconds, following = min(others), min(4 * images, args.batch_size)
        left = BUDGET - (time.perf_counter() - begin)
        if images == args.batch_size or 3 * seconds * following / images > left:
            break
        images = following
    (less, lower), (more, higher) = sizes[-2:] if len(sizes) > 1 else sizes * 2
    slope = (higher - lower) / (more - less) if more > less else 0.0
    return Measured(images, seconds, higher + slope * (args.batch_size - images))


def _step(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    classes: int,
    images: int,
    device: torch.device,
) -> float:
    """Seconds of a forward and a backward pass and an update."""
    x = torch.randn(images, args.in_chans, args.input_size, args.input_size, device=device)
    targets = torch.randint(classes, (images,), device=device)
    _wait(device)
    start = time.perf_counter()
    with autocast(args, device):
        logits = model(x)
    torch.nn.functional.cross_entropy(logits.float(), targets).backward()
    # the rate of the optimizer is that of the options, which random images could drive to infinity
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _estimate(args: argparse.Namespace, measured: Measured, steps: int, device: torch.device) -> None:
    passes = measured.seconds * args.batch_size / measured.images
    part = "" if measured.images == args.batch_size else f", from a step of {measured.images} images"
    log(
        f"memory: about {measured.memory / 2**20:,.0f} MiB a process on {device} for batches of {args.batch_size}{part}"
    )
    text = f"time: about {passes:.3g} s for {args.batch_size} images"
    if steps:
        epoch = passes * args.update_freq * steps
        text += f", {_duration(epoch)} an epoch, {_duration(epoch * args.epochs)} in all"
    log(f"{text}; loading images, the evaluation and other processes come on top")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


@contextlib.contextmanager
def _own_caches() -> Iterator[None]:
    """Within this context compilers write into a temporary folder, which begins as a copy of their own ones."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    triton = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    with tempfile.TemporaryDirectory() as folder:
        for source, name in ((base / "kernelwarehouse", "kernelwarehouse"), (Path(triton), "triton")):
            with contextlib.suppress(OSError, shutil.Error):
                shutil.copytree(source, Path(folder) / name)
        own = {
            "XDG_CACHE_HOME": folder, "TRITON_CACHE_DIR": f"{folder}/triton",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch",
        }  # fmt: skip
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
