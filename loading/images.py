"""Read images from files and from memory, and make data sets of them."""

import functools
import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import Resize

from models.config import ConfigError
from models.messages import first_line, printable

from .folders import LeftOut, images_of_classes

# Of images above 89 million pixels Pillow would only warn, and refuse those above twice as many.
MAX_PIXELS = 1024**3 // 12
ImageFile.LOAD_TRUNCATED_IMAGES = False
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

# What a file holds counts, whatever its suffix is. Pillow knows other formats, too: for EPS it starts Ghostscript,
# which runs the file as a program.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "JPEG2000", "AVIF")
# pixels of a resized image: a long and narrow one grows to many more than it has, which takes seconds and gigabytes
MAX_RESIZED = 100_000_000


class UnreadableImage(RuntimeError):
    """An image that cannot be decoded; the message names its file."""

    def __init__(self, message: str) -> None:
        # a loader process passes the error on with its traceback in front of the message
        super().__init__(printable(message.rsplit("UnreadableImage: ", 1)[-1].strip()))


def read_image(source: str | Path | IO[bytes], name: str) -> Image.Image:
    """Decode an image to RGB, upright.

    The EXIF rotation is applied; grey, palette, 16-bit and CMYK images are converted.

    Args:
        source: path or open binary file.
        name: what to call it in an error.

    Raises:
        UnreadableImage: names the image.
    """
    if isinstance(source, (str, Path)) and os.path.exists(source) and not os.path.isfile(source):
        # opening a pipe without a writer would wait forever
        raise _unreadable(name, "it is no regular file")
    try:
        with Image.open(source, formats=readable_formats()) as image:
            # a library may have changed how warnings are treated
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} are more than {MAX_PIXELS:,} pixels")
            image.load()
            image = ImageOps.exif_transpose(image)
    except Exception as error:
        # on a damaged file, decoders raise exceptions of any type
        raise _unreadable(name, first_line(error)) from None
    return to_rgb(image)


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Those of the formats that are read that this Pillow knows; it would stop at the name of another one."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _unreadable(name: str, reason: str) -> UnreadableImage:
    return UnreadableImage(f"{name}: cannot be read as an image ({reason}); replace or remove it")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any mode to RGB."""
    if image.mode.startswith("I"):
        # convert() would clip 16-bit grey to white; images of 32 bits often hold 8-bit grey
        grey = np.asarray(image).astype(np.int64)
        shift = 0 if image.mode == "I" and grey.max(initial=0) < 256 else 8
        image = Image.fromarray((grey >> shift).clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB")


def prepared(source: str | IO[bytes], transform: Callable[[Image.Image], Any], name: str | None = None) -> Any:
    """Read an image as RGB, and transform it.

    Args:
        source: path or open binary file.
        transform: applied to the image.
        name: what to call it in an error; None: its path.

    Raises:
        UnreadableImage: names the image; also one that would have more than `MAX_RESIZED` pixels once it is resized.
    """
    name = str(source) if name is None else name
    image = read_image(source, name)
    width, height = _resized(image.size, transform)
    if width * height > MAX_RESIZED:
        raise _unreadable(name, f"{image.width}x{image.height} pixels would be resized to {width}x{height}")
    return transform(image)


def _resized(size: tuple[int, int], transform: Callable[[Image.Image], Any]) -> tuple[int, int]:
    """Width and height to which a transform resizes an image; `size`, its own, where it does not begin with that."""
    first = next(iter(getattr(transform, "transforms", [])), None)
    if not isinstance(first, Resize):
        return size
    if not isinstance(first.size, int):
        return first.size[-1], first.size[0]
    return tuple(first.size * side // min(size) for side in size)


class ImageFolderData(Dataset):
    """A folder with one folder of images per class.

    Args:
        root: the folder.
        transform: applied to every image, an RGB `PIL.Image`.
        option: the option that named the folder, for the error message.

    Attributes:
        note: a line about files that are left out; empty where there are none.

    Raises:
        ConfigError: the folder does not exist or holds no image.
    """

    def __init__(self, root: Path, transform: Callable[[Image.Image], Any], option: str = "--data_path") -> None:
        if not root.is_dir():
            raise ConfigError(f"{root}: no such folder of images; check {option}")
        left_out = LeftOut()
        self.samples, self.classes = images_of_classes(root, left_out)
        self.transform, self.note = transform, left_out.note(root)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return prepared(path, self.transform), label


class ImageFiles(Dataset):
    """Image files without classes. Item i is (i, transformed image), or (i, why there is none).

    Args:
        files: paths of the files.
        transform: applied to every image, an RGB `PIL.Image`.
    """

    def __init__(self, files: list[str], transform: Callable[[Image.Image], Any]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        file = self.files[index]
        try:
            return index, prepared(file, self.transform)
        except UnreadableImage as error:
            return index, str(error)
        except Exception as error:
            # Pillow's resampling raises exceptions of any type
            return index, f"{file}: cannot be prepared for the model ({first_line(error)})"


class GreyData(Dataset):
    """Images in memory: `images` [N, H, W] with 256 grey levels, their `labels`, and a `transform` of RGB images."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index]).convert("RGB")), self.labels[index]


class GlyphsData(GreyData):
    """The characters that `scripts/make_glyphs.py` draws, 32 x 32 with 256 grey levels; the test has fonts of its own.

    Args:
        root: the folder that the script wrote.
        is_train: take the training fonts, else those of the test.
        transform: applied to every image, an RGB `PIL.Image`.

    Raises:
        ConfigError: the folder lacks `glyphs.npz`, or that file is damaged.
    """

    def __init__(self, root: Path, is_train: bool, transform: Callable[[Image.Image], Any]) -> None:
        path, part = root / "glyphs.npz", "train" if is_train else "test"
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; make it with scripts/make_glyphs.py --output {root}")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                self.classes = tuple(arrays["classes"].tolist())
                self.images, self.labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].tolist()
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path}: damaged, or not from scripts/make_glyphs.py: {error}") from None
        self.transform = transform


@dataclass(frozen=True)
class CIFARFiles:
    """The address, the files and the layout of the binary version of CIFAR-10 or CIFAR-100."""

    url: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: int  # label bytes of an image; the last is its class
    classes: int
    python_folder: str


CIFAR_FILES = {
    "CIFAR10": CIFARFiles(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "cifar-10-batches-bin",
        tuple(f"data_batch_{number}.bin" for number in range(1, 6)), ("test_batch.bin",), 1, 10, "cifar-10-batches-py",
    ),
    "CIFAR100": CIFARFiles(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "cifar-100-binary", ("train.bin",), ("test.bin",),
        2, 100, "cifar-100-python",
    ),
}  # fmt: skip


class CIFARData(Dataset):
    """CIFAR-10 or CIFAR-100 in the binary version.

    A file is a sequence of any number of images. Each image has its label bytes (CIFAR-100: coarse, fine), then a red,
    a green and a blue plane of 32 x 32 bytes, row by row. The Python version is not read: a pickle can run code.

    Args:
        name: "CIFAR10" or "CIFAR100".
        root: folder of the files, or of the subfolder that their archive makes.
        is_train: take the training images, else those of the test.
        transform: applied to every image, an RGB `PIL.Image`.

    Raises:
        ConfigError: names the folder that lacks a file, or the file that is damaged.
    """

    def __init__(self, name: str, root: Path, is_train: bool, transform: Callable[[Image.Image], Any]) -> None:
        self.files, self.transform = CIFAR_FILES[name], transform
        self.classes = [str(label) for label in range(self.files.classes)]
        names = self.files.train if is_train else self.files.test
        folder = root if os.path.isfile(root / names[0]) else root / self.files.folder
        missing = [file for file in names if not os.path.isfile(folder / file)]
        if missing:
            pickles = [root / where / Path(names[0]).stem for where in ("", self.files.python_folder)]
            only_python = len(missing) == len(names) and any(map(os.path.isfile, pickles))
            reason = "only its Python version is" if only_python else f"{missing[0]} is missing"
            raise ConfigError(
                f"{root}: no {name} here in the binary version ({reason}); unpack {self.files.url} into it "
                f"(it must hold {self.files.folder}/)"
            )
        self.records = np.concatenate([self._read(folder / file) for file in names])
        if not len(self.records):
            raise ConfigError(f"{folder / names[0]}: holds no images; unpack {self.files.url} again")

    def _read(self, path: Path) -> np.ndarray:
        """The images of a file, [N, label bytes + 3072]."""
        length = self.files.labels + 3 * 32 * 32
        again = f"the file is damaged or of another data set, unpack {self.files.url} again"
        try:
            content = np.fromfile(path, np.uint8)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        if len(content) % length:
            raise ConfigError(f"{path}: {len(content)} bytes are no multiple of an image's {length}; {again}")
        records = content.reshape(-1, length)
        labels = records[:, self.files.labels - 1]
        wrong = np.flatnonzero(labels >= self.files.classes)
        if len(wrong):
            last = self.files.classes - 1
            raise ConfigError(f"{path}: image {wrong[0]} has the label {labels[wrong[0]]}, above {last}; {again}")
        return records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        record, labels = self.records[index], self.files.labels
        planes = record[labels:].reshape(3, 32, 32)
        image = Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))
        return self.transform(image), int(record[labels - 1])
