"""Build the data sets and loaders of a run from its options; their parts are in `loading/`.

Every random choice in loading an image depends on (seed, epoch, index) alone. A run is therefore the same with any
number of loader processes, and a resumed run is the same as an unbroken one.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from loading.digits import DigitsData
from loading.images import CIFAR_FILES, CIFARData, GlyphsData, ImageFolderData
from loading.readers import StreamData, reader_data
from loading.sampling import EvalSampler, SeededData, TrainSampler, collate
from loading.shard_lists import find_shards
from loading.shards import ShardData
from loading.transforms import make_transform
from models.config import ConfigError
from stopping import leave_signals_to_parent
from utils import Process, log

CIFAR_NAMES = {"CIFAR": "CIFAR100", "CIFAR10": "CIFAR10", "CIFAR100": "CIFAR100"}


def make_data(args: argparse.Namespace, is_train: bool) -> Dataset:
    """The training or the evaluation images of `--data_set`.

    Raises:
        ConfigError: the data do not exist; names the path.
    """
    transform = make_transform(args, is_train)
    name, root = args.data_set, Path(args.data_path)
    if name == "digits":
        return DigitsData(is_train, transform)
    if name.startswith("wds/"):
        return ShardData(find_shards(args, is_train), transform)
    if not args.data_path and not name.startswith(("hfds/", "hfids/")):
        raise ConfigError(f"--data_set {name} needs --data_path, the folder that holds the data")
    if name in ("IMNET", "image_folder"):
        data = _folder(args, is_train, transform)
        if data.note:
            log(data.note)
        return data
    if name == "glyphs":
        return GlyphsData(root, is_train, transform)
    if name in CIFAR_NAMES:
        return CIFARData(CIFAR_NAMES[name], root, is_train, transform)
    return reader_data(args, is_train, transform)


def _folder(args: argparse.Namespace, is_train: bool, transform: Callable[[Image.Image], Any]) -> ImageFolderData:
    """The training or the evaluation images of a folder with a folder per class."""
    root = Path(args.data_path)
    if args.data_set == "IMNET":
        return ImageFolderData(root / ("train" if is_train else "val"), transform)
    if is_train:
        return ImageFolderData(root, transform)
    if not args.eval_data_path:
        raise ConfigError("--data_set image_folder needs --eval_data_path, or --disable_eval true")
    return ImageFolderData(Path(args.eval_data_path), transform, "--eval_data_path")


def known_classes(name: str) -> int | None:
    """The number of classes of a `--data_set` that has the same ones in every folder; None for the others."""
    if name == "digits":
        return len(DigitsData.classes)
    return CIFAR_FILES[CIFAR_NAMES[name]].classes if name in CIFAR_NAMES else None


@dataclass
class Loaders:
    """The loaders of a run, and its classes.

    `train` is None in a run that only evaluates, `evaluation` in one that never does, `classes` where the data do not
    name them.
    """

    train: DataLoader | None
    evaluation: DataLoader | None
    nb_classes: int
    classes: list[str] | None = None

    @property
    def positioned(self) -> bool:
        """Whether training can begin within an epoch; streams begin at its first image."""
        return not isinstance(self.train.dataset, StreamData)

    def set_epoch(self, epoch: int, consumed: int = 0) -> None:
        """Choose the order of the training images; call it before every epoch.

        Args:
            epoch: counted from 0 over the whole run.
            consumed: images of the epoch that all processes together have used up.
        """
        if self.positioned:
            self.train.sampler.epoch, self.train.sampler.consumed = epoch, consumed
        else:
            self.train.dataset.set_epoch(epoch)


def make_loaders(args: argparse.Namespace, given: dict[str, Any], process: Process) -> Loaders:
    """Build the data sets, check that they fit each other, and wrap them in loaders.

    Args:
        args: all options.
        given: the options that the user gave, to tell a chosen `nb_classes` from the default.
        process: this process among those of the run, which divide the images.

    Raises:
        ConfigError: the data do not exist, their classes differ, or the images are too few for one update.
    """
    train_data = None if args.eval else make_data(args, is_train=True)
    eval_data = None if args.disable_eval and not args.eval else make_data(args, is_train=False)
    nb_classes, classes = _classes(args, given, train_data, eval_data)

    workers = min(args.num_workers, max(1, cores() // process.local_world))
    if workers < args.num_workers and "num_workers" in given:
        log(f"num_workers {args.num_workers} reduced to {workers}, the cores of each process")
    if isinstance(train_data, StreamData) and process.world > 1:
        # timm's reader of TFDS divides the images by loader process; without any, all processes would get the same ones
        workers = max(1, workers)
    common = {
        "batch_size": args.batch_size,
        "num_workers": workers,
        "pin_memory": args.pin_mem and process.device.type == "cuda",
        "persistent_workers": workers > 0,
        "worker_init_fn": leave_signals_to_parent,
    }
    loaders = Loaders(None, None, nb_classes, None if classes is None else list(map(str, classes)))
    if isinstance(train_data, StreamData):
        generator = train_data.divide(process.rank, workers)
        loaders.train = DataLoader(train_data, drop_last=True, generator=generator, **common)
    elif train_data is not None:
        order = getattr(train_data, "order", None)
        sampler = TrainSampler(len(train_data), process.rank, process.world, args.seed, order)
        seeded = SeededData(train_data, args.seed, replaces=args.bad_images > 0)
        loaders.train = DataLoader(
            seeded, sampler=sampler, drop_last=True, generator=_own_generator(args),
            collate_fn=collate if seeded.replaces else None, **common,
        )  # fmt: skip
    if loaders.train is not None and len(loaders.train) < args.update_freq:
        needed = args.batch_size * args.update_freq * process.world
        raise ConfigError(
            f"{len(train_data)} training images are too few for one update of {needed} (--batch_size x --update_freq x "
            "processes); lower one of them"
        )
    if eval_data is not None:
        rank, world = (process.rank, process.world) if args.dist_eval else (0, 1)
        sampler = None
        if isinstance(eval_data, StreamData):
            eval_data.rank, eval_data.world = rank, world
        else:
            sampler = EvalSampler(len(eval_data), rank, world)
        loaders.evaluation = DataLoader(eval_data, sampler=sampler, generator=_own_generator(args), **common)
    return loaders


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _own_generator(args: argparse.Namespace) -> torch.Generator:
    # A loader draws a seed when it starts. Drawn from the global generator, it would change the numbers that a resumed
    # run draws after it.
    return torch.Generator().manual_seed(args.seed)


def _classes(
    args: argparse.Namespace, given: dict[str, Any], train_data: Dataset | None, eval_data: Dataset | None
) -> tuple[int, list[Any] | None]:
    """The number of classes of a run, and their names where the data have them.

    Raises:
        ConfigError: the data have other classes than each other, or than the user says, or one to train on.
    """
    if train_data is not None and eval_data is not None:
        _check_same_classes(train_data, eval_data)
    classes = getattr(train_data, "classes", None) or getattr(eval_data, "classes", None)
    nb_classes = args.nb_classes if classes is None else len(classes)
    shards = [data for data in (train_data, eval_data) if isinstance(data, ShardData)]
    if shards and "nb_classes" not in given:
        # some labels may be missing among those to evaluate, so the checkpoint comes first
        largest = max(int(data.labels.max()) for data in shards)
        nb_classes = getattr(args, "trained_classes", largest + 1)
    if given.get("nb_classes", nb_classes) != nb_classes:
        raise ConfigError(
            f"--nb_classes is {given['nb_classes']} on the command line or in a config, but the data have {nb_classes} "
            f"classes: add --nb_classes {nb_classes}, or leave it out of both to take it from the data"
        )
    for data in shards:
        data.check_labels(nb_classes)
    if train_data is not None and nb_classes < 2:
        only = f" ({classes[0]})" if classes else ""
        raise ConfigError(
            f"the training data have one class{only}, so that there is nothing to tell apart; give a folder of images "
            "for each of two or more classes"
        )
    return nb_classes, classes


def _check_same_classes(train_data: Dataset, eval_data: Dataset) -> None:
    train, evaluation = getattr(train_data, "classes", None), getattr(eval_data, "classes", None)
    if train is None or evaluation is None or train == evaluation:
        return
    difference = sorted(set(train) ^ set(evaluation))[:3]
    raise ConfigError(
        f"the training data have {len(train)} classes and the evaluation data {len(evaluation)}, and they differ, "
        f"first in: {', '.join(map(str, difference))}; both folders must hold the same classes"
    )
