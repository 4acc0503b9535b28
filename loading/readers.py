"""Data sets of timm's readers: folders, tar files, WebDataset, TFDS, and Hugging Face's data sets."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

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
    """The images of a timm reader without random access (wds, tfds, hfids).

    In training the reader divides the stream among the processes and their loader processes. Every random choice for an
    image depends on (seed, epoch, process, loader process, position in the stream of that loader process). In
    evaluation every process reads the whole stream and takes every `world`-th image, so that each image counts once.

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
    """The training or the validation split of `--data_set`, a reader string such as wds/NAME.

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
