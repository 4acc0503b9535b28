"""Data that timm's readers read: folders, tar files, WebDataset, TFDS, and Hugging Face's data sets."""

import contextlib

import torch
from PIL import ImageOps
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from models.config import ConfigError

from .hugging_face import import_hugging_face_datasets
from .images import read_image, to_rgb
from .sampling import seeded


class ReaderData(Dataset):
    """A timm reader with random access (folders, tar files, hfds)."""

    def __init__(self, reader, transform):
        self.reader, self.transform = reader, transform
        self.classes = list(getattr(reader, "class_to_idx", None) or {}) or None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int):
        file, label = self.reader[index]
        with contextlib.closing(file):
            image = read_image(file, f"image {index} ({self.reader.filename(index)})")
        return self.transform(image), label


class StreamData(IterableDataset):
    """A timm reader without random access (wds, tfds, hfids).

    In training the reader divides the stream among the processes and their loader processes; what is random about an
    image follows from (seed, epoch, process, loader process, position in its stream). In evaluation every process reads
    all of it and takes every world-th image, so that each counts once.
    """

    classes = None

    def __init__(self, reader, transform, is_train: bool, seed: int = 0):
        self.reader, self.transform, self.is_train, self.seed = reader, transform, is_train, seed
        self.rank, self.world = 0, 1
        # loader processes live on from epoch to epoch
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        # to tell whether the reader left out any; only in evaluation is each to be taken once
        self.total = None if is_train else reader.num_samples
        if not is_train:
            reader.dist_rank, reader.dist_num_replicas = 0, 1

    def __len__(self) -> int:
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        self.reader.set_epoch(epoch)

    def __iter__(self):
        worker = get_worker_info()
        stream = (self.seed, int(self.epoch), self.rank, worker.id if worker else 0)
        for index, (image, label) in enumerate(self.reader):
            if self.is_train or index % self.world == self.rank:
                with seeded((*stream, index)) if self.is_train else contextlib.nullcontext():
                    image = self.transform(to_rgb(ImageOps.exif_transpose(image)))
                yield image, label


def reader_data(args, is_train: bool, transform) -> ReaderData | StreamData:
    """The training or the validation split of `--data_set`, a reader string such as wds/NAME.

    Raises:
        ConfigError: the reader cannot be made; names the split and the reason.
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
