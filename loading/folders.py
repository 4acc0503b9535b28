"""Find the images in folders, each real folder once, whatever links there are."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from torchvision.datasets.folder import IMG_EXTENSIONS

from models.config import ConfigError
from models.messages import printable


@dataclass
class LeftOut:
    """The files of folders that are no images by their suffix; hidden ones (.DS_Store) do not count."""

    suffixes: Counter[str] = field(default_factory=Counter)

    def add(self, names: list[str]) -> None:
        self.suffixes.update(Path(name).suffix or "none" for name in names if not name.startswith("."))

    def note(self, folder: str | Path) -> str:
        """What to tell of them, in one line; empty where there are none."""
        if not self.suffixes:
            return ""
        counts = ", ".join(f"{suffix[:20]} {count}" for suffix, count in self.suffixes.most_common(6))
        more = ", ..." if len(self.suffixes) > 6 else ""
        return printable(
            f"note: {folder}: {self.suffixes.total()} files are left out for their suffix ({counts}{more}); images are "
            f"{' '.join(IMG_EXTENSIONS)}"
        )


def images_below(folder: str, seen: set[str], left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Folders, each with the images in it by name: the given folder, and those below it.

    Links to folders are followed, but a folder that was visited already is passed over, as are those below it. Where
    no two paths lead to one folder, these are the folders that torchvision visits.

    Args:
        folder: where to search.
        seen: real paths of the folders that were visited already; extended.
        left_out: counts the other files.

    Raises:
        ConfigError: a folder cannot be read.
    """
    for path, inside, names in os.walk(folder, onerror=_refuse, followlinks=True):
        inside.sort()
        real = os.path.realpath(path)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        images = [name for name in sorted(names) if name.lower().endswith(IMG_EXTENSIONS)]
        left_out.add(sorted(set(names).difference(images)))
        yield path, images


def _refuse(error: OSError) -> NoReturn:
    raise ConfigError(f"{error.filename}: cannot be searched for images: {error.strerror}")


def images_of_classes(root: Path, left_out: LeftOut) -> tuple[list[tuple[str, int]], list[str]]:
    """The images of a folder with one folder per class.

    They are those of torchvision's `ImageFolder`, in its order, except that a link to a folder above, which would
    repeat the images again and again, counts neither as a class nor within one.

    Args:
        root: the folder.
        left_out: counts the other files in the folders of the classes.

    Returns:
        (path, index of the class) of every image, and the names of the classes.

    Raises:
        ConfigError: there is no class, a class has no images, or a folder cannot be read.
    """
    real = Path(os.path.realpath(root))
    above = {str(folder) for folder in (real, *real.parents)}
    try:
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError as error:
        _refuse(error)
    classes = [name for name in classes if os.path.realpath(root / name) not in above]
    if not classes:
        raise ConfigError(f"{root}: holds no images in folders of classes: it has no folder inside")
    samples, empty = [], []
    for index, name in enumerate(classes):
        # one class may have a link to another's folder
        found = sorted(images_below(str(root / name), set(above), left_out))
        paths = [os.path.join(folder, image) for folder, images in found for image in images]
        samples += [(path, index) for path in paths]
        if not paths:
            empty.append(name)
    if empty:
        names = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise ConfigError(
            f"{root}: holds no images in folders of classes: none in {len(empty)} of {len(classes)} ({names}); images "
            f"are {' '.join(IMG_EXTENSIONS)}"
        )
    return samples, classes


def images_in(paths: list[str], note: Callable[[str], None]) -> list[str]:
    """The image files among some paths: the files themselves, and those below the folders, folder by folder.

    Args:
        paths: files, and folders, which are searched for the suffixes of images. Links are followed.
        note: called with a line about the files that are left out.

    Raises:
        ConfigError: a path does not exist, a folder cannot be searched, or there is no image at all.
    """
    files, seen = [], set()
    for path in paths:
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise ConfigError(f"{path}: no such image or folder")
            files.append(path)
            continue
        left_out = LeftOut()
        for folder, images in images_below(path, seen, left_out):
            files += [os.path.join(folder, image) for image in images]
        if left_out.suffixes:
            note(left_out.note(path))
    if not files:
        raise ConfigError(f"{', '.join(paths)}: no images ({' '.join(IMG_EXTENSIONS)})")
    return files
