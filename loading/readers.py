"""Data sets of timm's readers: folders, tar files, TFDS, and Hugging Face's data sets."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from models.config import ConfigError

from .hugging_face import import_hugging_face_datasets
from .images import read_image, to_rgb
from .sampling import seeded


class ReaderData(Dataset):
    """The images of a timm reader with random access (folders, tar files, hfds).

    Args:
        reader: yields open binary files and labels by index.
        transform: applied to every image, an RGB `PIL.Image`.
    """

    def __init__(self, reader: Any, transform: Callable[[Image.Image], Any]) -> None:
        self.reader, self.transform = reader, transform
        self.classes = list(getattr(reader, "class_to_idx", None) or {}) or None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, label = self.reader[index]
        with contextlib.closing(file):
            image = read_image(file, f"image {index} ({self.reader.filename(index)})")
        return self.transform(image), label


class StreamData(IterableDataset):
    """The images of a timm reader without random access (tfds, hfids).

    In training the reader divides the stream among the processes and their loader processes. Every random choice for an
    image depends on (seed, epoch, process, loader process, position in the stream of that loader process). In
    evaluation every process reads the whole stream and takes every `world`-th image, so that each image counts once.

    A stream cannot be positioned: a run that is resumed in the middle of an epoch begins this epoch's stream again, and
    sees some of its images twice. The order of the images is the reader's. It depends on the number of processes, and
    a reader that keeps a state from one epoch to the next does not repeat the order of an unbroken run.

    Args:
        reader: yields decoded images and labels.
        transform: applied to every image, an RGB `PIL.Image`.
        is_train: read as in training, else as in evaluation.
        seed: seed of the random choices.
    """

    classes = None

    def __init__(self, reader: Any, transform: Callable[[Image.Image], Any], is_train: bool, seed: int = 0) -> None:
        self.reader, self.transform, self.is_train, self.seed = reader, transform, is_train, seed
        self.rank, self.world = 0, 1
        # shared memory, because loader processes stay alive from epoch to epoch and must see a new value
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        # The number of images shows whether the reader left any out. Only evaluation must take each exactly once.
        self.total = None if is_train else reader.num_samples
        if not is_train:
            reader.dist_rank, reader.dist_num_replicas = 0, 1

    def divide(self, rank: int, workers: int) -> torch.Generator:
        """Take the share of a process in training; call it before a loader is made.

        Args:
            rank: index of the process.
            workers: its number of loader processes.

        Returns:
            The generator for the loader. The reader shuffles with the seeds that the loader draws from it for its
            processes, so they must differ from those of the other processes of the run.
        """
        self.rank = rank
        self.reader.set_loader_cfg(workers)
        seed = int(np.random.SeedSequence((self.seed, rank)).generate_state(1)[0])
        if hasattr(self.reader, "worker_seed"):
            # without loader processes the reader keeps this one, which is the same in all processes of the run
            self.reader.worker_seed = seed
        return torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the images and the random choices; call it before every epoch."""
        self.epoch.fill_(epoch)
        self.reader.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        stream = (self.seed, int(self.epoch), self.rank, worker.id if worker else 0)
        for index, (image, label) in enumerate(self.reader):
            if self.is_train or index % self.world == self.rank:
                with seeded((*stream, index)) if self.is_train else contextlib.nullcontext():
                    image = self.transform(to_rgb(ImageOps.exif_transpose(image)))
                yield image, label


def reader_data(
    args: argparse.Namespace, is_train: bool, transform: Callable[[Image.Image], Any]
) -> ReaderData | StreamData:
    """The training or the validation split of `--data_set`, a reader string such as hfds/NAME.

    Raises:
        ConfigError: timm cannot make the reader; names the split and the reason.
    """
    split = "train" if is_train else "validation"
    try:
        if args.data_set.startswith(("hfds/", "hfids/")):
            import_hugging_face_datasets()
        data = create_dataset(
            args.data_set, root=args.data_path or None, split=split, is_training=is_train, batch_size=args.batch_size,
            seed=args.seed, input_img_mode="",
        )  # fmt: skip
    except ConfigError:
        raise
    except (ImportError, AssertionError, ValueError, RuntimeError, OSError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--data_set {args.data_set}, {split} split of {args.data_path}: {reason}") from None
    if isinstance(data, IterableDataset):
        return StreamData(data.reader, transform, is_train, args.seed)
    return ReaderData(data.reader, transform)
