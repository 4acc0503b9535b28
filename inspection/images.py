"""The images that are looked at: a random but fixed selection, with their classes where these are known."""

import argparse
import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset, Subset

from datasets import make_data
from loading.folders import images_in
from loading.images import ImageFiles, ImageFolderData
from loading.readers import StreamData
from models.config import ConfigError
from trained import Trained


def chosen(total: int, count: int) -> list[int]:
    """At most `count` of `total` indices, in an order that is random and always the same."""
    return random.Random(0).sample(range(total), min(total, count))


@dataclass
class Images:
    """Images to look at.

    Attributes:
        data: gives (image [3, H, W], class, or index of the file where classes are unknown).
        classes: names of the classes; None: unknown.
    """

    data: Dataset
    classes: list[str] | None


class _Readable(Dataset):
    """`ImageFiles`, whose unreadable images are errors."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index, image = self.files[index]
        if isinstance(image, str):
            raise ConfigError(image)
        return image, index


def open_images(trained: Trained, count: int, paths: Sequence[str] | None, given: dict[str, Any]) -> Images:
    """A selection of images, prepared as the model's run did in its evaluation.

    Args:
        trained: the model and its preprocessing.
        count: the most images.
        paths: files, and folders; a single folder with a folder per class tells the classes. None: a data set.
        given: `data_set`, `data_path` and `eval_data_path`, where the user gave them; otherwise the checkpoint's.

    Raises:
        ConfigError: there are no images.
    """
    if paths is not None:
        return _of_paths(trained, count, paths)
    args = argparse.Namespace(**vars(copy.copy(trained.args)))
    args.trained_on = getattr(args, "trained_on", args.data_set)
    for name, value in given.items():
        setattr(args, name, value)
    data = make_data(args, is_train=False)
    if isinstance(data, StreamData):
        raise ConfigError(f"--data_set {args.data_set} is a stream, which has no positions; give --images FOLDER")
    classes = getattr(data, "classes", None) or trained.classes
    names = [str(i) for i in range(args.nb_classes)] if classes is None else [str(name) for name in classes]
    return Images(Subset(data, chosen(len(data), count)), names)


def _of_paths(trained: Trained, count: int, paths: Sequence[str]) -> Images:
    if len(paths) == 1 and Path(paths[0]).is_dir():
        folder = Path(paths[0])
        try:
            data = ImageFolderData(folder, trained.transform, "--images")
            return Images(Subset(data, chosen(len(data), count)), list(data.classes))
        except ConfigError:
            # not a folder of folders of images: the images in it have no classes
            pass
    files = images_in(list(paths), lambda note: None)
    data = _Readable(ImageFiles(files, trained.transform))
    return Images(Subset(data, chosen(len(data), count)), None)


def shown_image(image: Tensor, args: argparse.Namespace) -> Tensor:
    """A prepared image [3, H, W] as it looks: [H, W, 3] from 0 to 1."""
    imagenet = args.imagenet_default_mean_and_std
    mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if imagenet else ((0.5,) * 3, (0.5,) * 3)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (image.detach().cpu().float() * std + mean).clamp(0, 1).permute(1, 2, 0)
