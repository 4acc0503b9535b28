"""Data sets, transforms and loaders.

Every random choice in loading an image follows from (seed, epoch, index) alone, so that a run is the same with any
number of loader processes, and a resumed run the same as an unbroken one.
"""

import contextlib
import importlib
import os
import random
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from models.config import ConfigError
from utils import UnreadableImage, log

# half an image is no image, and a picture of more than 179 million pixels an attack
ImageFile.LOAD_TRUNCATED_IMAGES = False
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

DIGITS_TEST_IMAGES = 360


def read_image(source, name: str) -> Image.Image:
    """Decode an image to RGB, upright.

    The EXIF rotation is applied; grey, palette, 16-bit and CMYK images are converted.

    Args:
        source: path or open binary file.
        name: what to call it in an error.

    Raises:
        UnreadableImage: names the image.
    """
    try:
        with Image.open(source) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
    except Exception as error:
        # decoders raise whatever a damaged file leads them to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UnreadableImage(f"{name}: cannot be read as an image ({reason}); replace or remove it") from None
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as RGB."""
    if image.mode.startswith("I"):
        # 16-bit grey: convert() would clip it to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB")


class ImageFolderData(Dataset):
    """A folder with one folder of images per class.

    Raises:
        ConfigError: the folder does not exist or holds no image.
    """

    def __init__(self, root: Path, transform, option: str = "--data_path"):
        if not root.is_dir():
            raise ConfigError(f"{root}: no such folder of images; check {option}")
        try:
            folder = ImageFolder(str(root))
        except FileNotFoundError as error:
            raise ConfigError(f"{root}: holds no images in folders of classes: {str(error).splitlines()[0]}") from None
        self.samples, self.classes, self.transform = folder.samples, folder.classes, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return self.transform(read_image(path, path)), label


class GreyData(Dataset):
    """Images in memory: `images` [N, H, W] with 256 grey levels, `labels`, and the `transform` of each."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index]).convert("RGB")), self.labels[index]


class DigitsData(GreyData):
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 with 17 grey levels; 1,437 train, 360 test.

    The split is stratified and fixed. Source: UCI ML hand-written digits, test set.
    """

    classes = tuple("0123456789")

    def __init__(self, is_train: bool, transform):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        train, test = train_test_split(
            np.arange(len(labels)), test_size=DIGITS_TEST_IMAGES, stratify=labels, random_state=0
        )
        chosen = np.sort(train if is_train else test)
        self.images = (images[chosen] * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)
        self.labels = labels[chosen].tolist()
        self.transform = transform


class GlyphsData(GreyData):
    """Characters in the fonts of `scripts/make_glyphs.py`, 32 x 32 with 256 grey levels; other fonts for the test.

    Raises:
        ConfigError: the folder does not hold its file, or that file is damaged.
    """

    def __init__(self, root: Path, is_train: bool, transform):
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
    """Where the binary version of a CIFAR comes from, and what it holds."""

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
    """CIFAR-10 or CIFAR-100 in the binary version, in a folder or in the subfolder that its archive makes.

    A file is a row of images, each its label bytes (CIFAR-100: coarse, fine), then a red, a green and a blue plane of
    32 x 32 bytes, row by row. Any number of images is taken. The Python version is not read: a pickle can run code.

    Raises:
        ConfigError: names the folder that lacks a file, or the file that is damaged.
    """

    def __init__(self, name: str, root: Path, is_train: bool, transform):
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

    def __getitem__(self, index: int):
        record, labels = self.records[index], self.files.labels
        planes = record[labels:].reshape(3, 32, 32)
        image = Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))
        return self.transform(image), int(record[labels - 1])


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
                with _seeded((*stream, index)) if self.is_train else contextlib.nullcontext():
                    image = self.transform(to_rgb(ImageOps.exif_transpose(image)))
                yield image, label


class SeededData(Dataset):
    """Loads (epoch, index) with the random generators set by (seed, epoch, index), and sets them back after it."""

    def __init__(self, data: Dataset, seed: int):
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: tuple[int, int]):
        epoch, index = position
        with _seeded((self.seed, epoch, index)):
            return self.data[index]


@contextlib.contextmanager
def _seeded(position: tuple[int, ...]):
    """Within it all random generators of the CPU are those of a position; then they go on where they were."""
    seed = int(np.random.SeedSequence(position).generate_state(1)[0])
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed would seed the GPUs as well
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class TrainSampler(Sampler):
    """A new permutation every epoch, the same on all processes, of which each takes every world-th.

    Yields (epoch, index). The last images that do not fill all processes are left out.
    """

    def __init__(self, size: int, rank: int, world: int, seed: int):
        self.size, self.rank, self.world, self.seed, self.epoch = size, rank, world, seed, 0

    def __len__(self) -> int:
        return self.size // self.world

    def __iter__(self):
        order = np.random.Generator(np.random.PCG64((self.seed, self.epoch))).permutation(self.size)
        for index in order[: len(self) * self.world][self.rank :: self.world]:
            yield self.epoch, int(index)


class EvalSampler(Sampler):
    """Every world-th image from `rank` on: all processes together take each exactly once, some one more than others."""

    def __init__(self, size: int, rank: int, world: int):
        self.indices = range(rank, size, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)


def make_transform(args, is_train: bool):
    """Image -> tensor [3, input_size, input_size], normalised.

    Advanced preprocessing (the papers' 300-epoch recipe): random resized crop, flip, RandAugment or colour jitter,
    random erasing, bicubic; evaluation resizes to input_size / crop_pct (to a square without cropping from 384 on) and
    crops. Traditional: random resized crop and flip, bilinear; evaluation resizes to 8/7 of the crop. CIFAR at its own
    size is cropped from a padded image; digits are only moved, turned and scaled a little, and never flipped.
    """
    size, imagenet = args.input_size, args.imagenet_default_mean_and_std
    mean = IMAGENET_DEFAULT_MEAN if imagenet else (0.5, 0.5, 0.5)
    std = IMAGENET_DEFAULT_STD if imagenet else (0.5, 0.5, 0.5)
    to_tensor = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
    small = size <= 32 and args.data_set.startswith("CIFAR")

    if args.data_set == "digits":
        moved = transforms.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=bilinear)
        resized = transforms.Resize((size, size), bicubic)
        return transforms.Compose([resized, *([moved] if is_train else []), *to_tensor])
    if not is_train:
        if small:
            steps = [transforms.Resize((size, size), bicubic)]
        elif args.traditional_preprocess:
            steps = [transforms.Resize(round(size * 256 / 224), bilinear), transforms.CenterCrop(size)]
        elif size >= 384:
            steps = [transforms.Resize((size, size), bicubic)]
        else:
            resized = int(size / (args.crop_pct or 224 / 256))
            steps = [transforms.Resize(resized, bicubic), transforms.CenterCrop(size)]
        return transforms.Compose([*steps, *to_tensor])
    if args.traditional_preprocess and not small:
        crop = transforms.RandomResizedCrop(size, interpolation=bilinear)
        return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *to_tensor])
    if args.traditional_preprocess:
        steps = [transforms.RandomHorizontalFlip(), *to_tensor]
    else:
        try:
            transform = create_transform(
                size, is_training=True, color_jitter=args.color_jitter, auto_augment=args.aa,
                interpolation=args.train_interpolation, re_prob=args.reprob, re_mode=args.remode,
                re_count=args.recount, mean=mean, std=std,
            )  # fmt: skip
        except (AssertionError, KeyError, ValueError, IndexError) as error:
            raise ConfigError(
                f'"aa" must be a policy such as rand-m9-mstd0.5-inc1; got {args.aa!r} ({error})'
            ) from None
        if not small:
            return transform
        steps = transform.transforms[1:]
    padded = [transforms.Resize((size, size), bicubic), transforms.RandomCrop(size, padding=4)]
    return transforms.Compose([*padded, *steps])


def make_data(args, is_train: bool) -> Dataset:
    """The training or the evaluation images of `--data_set`.

    Raises:
        ConfigError: the data are not there; names the path.
    """
    transform = make_transform(args, is_train)
    name, root = args.data_set, Path(args.data_path)
    if name == "digits":
        return DigitsData(is_train, transform)
    if not args.data_path and not name.startswith(("hfds/", "hfids/")):
        raise ConfigError(f"--data_set {name} needs --data_path, the folder that holds the data")
    if name == "IMNET":
        return ImageFolderData(root / ("train" if is_train else "val"), transform)
    if name == "image_folder":
        if is_train:
            return ImageFolderData(root, transform)
        if not args.eval_data_path:
            raise ConfigError("--data_set image_folder needs --eval_data_path, or --disable_eval true")
        return ImageFolderData(Path(args.eval_data_path), transform, "--eval_data_path")
    if name == "glyphs":
        return GlyphsData(root, is_train, transform)
    if name in ("CIFAR", "CIFAR10", "CIFAR100"):
        return CIFARData("CIFAR10" if name == "CIFAR10" else "CIFAR100", root, is_train, transform)
    return _reader_data(args, is_train, transform)


def _reader_data(args, is_train: bool, transform) -> Dataset:
    split = "train" if is_train else "validation"
    try:
        if args.data_set.startswith(("hfds/", "hfids/")):
            _find_hugging_face_datasets()
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


def _find_hugging_face_datasets() -> None:
    """Make `import datasets` find Hugging Face's package, which timm needs, in place of this file of the same name."""
    own, paths = sys.modules.get("datasets"), sys.path
    if hasattr(own, "load_dataset"):
        return
    here = Path(__file__).resolve().parent
    sys.modules.pop("datasets", None)
    sys.path = [path for path in paths if Path(path or ".").resolve() != here]
    try:
        importlib.import_module("datasets")
    except ImportError:
        sys.modules["datasets"] = own
        raise ConfigError("hfds/ and hfids/ need Hugging Face's package: pip install datasets") from None
    finally:
        sys.path = paths


@dataclass
class Loaders:
    """What `make_loaders` returns: `train` is None when only evaluating, `evaluation` when that is disabled."""

    train: DataLoader | None
    evaluation: DataLoader | None
    nb_classes: int

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the training images; call it before every epoch."""
        if isinstance(self.train.dataset, StreamData):
            self.train.dataset.set_epoch(epoch)
        else:
            self.train.sampler.epoch = epoch


def make_loaders(args, given: dict, process) -> Loaders:
    """Build the data sets, check that they fit each other, and wrap them in loaders.

    Args:
        given: the options that the user gave, to tell a chosen `nb_classes` from the default.

    Raises:
        ConfigError: data that are not there, classes that differ, or too few images for one update.
    """
    train_data = None if args.eval else make_data(args, is_train=True)
    eval_data = None if args.disable_eval and not args.eval else make_data(args, is_train=False)
    classes = getattr(train_data, "classes", None) or getattr(eval_data, "classes", None)
    if train_data is not None and eval_data is not None:
        _check_same_classes(train_data, eval_data)
    nb_classes = args.nb_classes if classes is None else len(classes)
    if given.get("nb_classes", nb_classes) != nb_classes:
        raise ConfigError(
            f"--nb_classes is {given['nb_classes']}, but the data have {nb_classes} classes; "
            "correct it, or leave it out to take it from the data"
        )

    workers = min(args.num_workers, max(1, cores() // process.local_world))
    if workers < args.num_workers and "num_workers" in given:
        log(f"num_workers {args.num_workers} reduced to {workers}, the cores of each process")
    common = {
        "batch_size": args.batch_size,
        "num_workers": workers,
        "pin_memory": args.pin_mem and process.device.type == "cuda",
        "persistent_workers": workers > 0,
    }
    loaders = Loaders(None, None, nb_classes)
    if isinstance(train_data, StreamData):
        train_data.reader.set_loader_cfg(workers)
        train_data.rank = process.rank
        loaders.train = DataLoader(train_data, drop_last=True, generator=_own_generator(args), **common)
    elif train_data is not None:
        sampler = TrainSampler(len(train_data), process.rank, process.world, args.seed)
        seeded = SeededData(train_data, args.seed)
        loaders.train = DataLoader(seeded, sampler=sampler, drop_last=True, generator=_own_generator(args), **common)
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


def _own_generator(args) -> torch.Generator:
    # loaders draw a seed at start; drawn from the global generator, it would move what a resumed run draws
    return torch.Generator().manual_seed(args.seed)


def _check_same_classes(train_data: Dataset, eval_data: Dataset) -> None:
    train, evaluation = getattr(train_data, "classes", None), getattr(eval_data, "classes", None)
    if train is None or evaluation is None or train == evaluation:
        return
    difference = sorted(set(train) ^ set(evaluation))[:3]
    raise ConfigError(
        f"the training data have {len(train)} classes and the evaluation data {len(evaluation)}, and they differ, "
        f"first in: {', '.join(map(str, difference))}; both folders must hold the same classes"
    )
