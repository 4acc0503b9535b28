"""Images in WebDataset shards, tar files of images and labels, read in any order where they lie."""

import io
import json
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from models.config import ConfigError
from models.messages import first_line

from .fetching import fetch_all
from .images import UnreadableImage, prepared
from .shard_lists import ShardList
from .tar_index import Archive, BadTar, Member

IMAGES = {"jpg", "jpeg", "png", "webp", "bmp", "ppm"}
# bytes of an image, of a .cls and of a .json
MAX_IMAGE, MAX_CLS, MAX_JSON = 1 << 28, 64, 1 << 24
# A label counts the classes of the model, so a damaged one must not ask for a model without end.
MAX_LABEL = 999_999
# Shards whose samples are shuffled together. Few, so that their pages stay in memory; at a usual 1,000 images and more
# in a shard, many times a batch.
WINDOW = 8


class Index(NamedTuple):
    """Where the images of a shard are, and their labels: three arrays of the same length, in the order of the tar."""

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def read_index(file: int, label_key: str = "") -> Index:
    """Read the headers and the labels of a shard.

    A sample is an image and, under the same name up to the first point, its label: a `.cls` with an integer, or a
    `.json` with an integer under "label". Other files are left out.

    Args:
        file: descriptor of the open shard.
        label_key: the entry of the `.json` that holds the label; no `.cls` is read then.

    Raises:
        BadTar: names the member that is wrong.
        OSError: the shard cannot be read.
    """
    archive, images, labels = Archive(file), {}, {}
    for member in archive.members():
        key, suffix = split_name(member.name)
        if suffix in IMAGES:
            if key in images:
                raise BadTar(f"{member.name} is a second image of the sample {key}")
            if not 0 < member.size <= MAX_IMAGE:
                raise BadTar(f"{member.name} has {member.size} bytes; an image has 1 to {MAX_IMAGE}")
            images[key] = member
        elif suffix == "json" or (suffix == "cls" and not label_key):
            if (key, suffix) in labels:
                raise BadTar(f"{member.name} is a second label of the sample {key}")
            # a .json often lies beside a .cls for other purposes, and is read only where it must be
            labels[key, suffix] = _label(archive, member) if suffix == "cls" else member
    for (key, suffix), label in labels.items():
        # an image of a kind that is not read would be left out without a word
        if key not in images and (suffix == "cls" or _label_in_json(archive, label, label_key or "label") is not None):
            raise BadTar(f"{key}.{suffix} has no image ({', '.join(sorted(IMAGES))}) beside it")
    found = []
    for key, member in images.items():
        label = labels.get((key, "cls"))
        if label is None and (key, "json") in labels:
            label = _label_in_json(archive, labels[key, "json"], label_key or "label")
        if label is None:
            raise BadTar(f"{member.name} has no label, neither a .cls nor a .json that holds one")
        found.append((member.offset, member.size, label))
    if not found:
        raise BadTar("it holds no images")
    offsets, sizes, labels = zip(*found)
    return Index(np.array(offsets, np.int64), np.array(sizes, np.int32), np.array(labels, np.int32))


def split_name(name: str) -> tuple[str, str]:
    """The key of the sample that a member belongs to, and the suffix, both empty where it belongs to none.

    As WebDataset does, at the first point of the last part of the path: "a/b.seg.png" is "a/b" and "seg.png".
    """
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem else ("", "")


def _label(archive: Archive, member: Member) -> int:
    """The label in a .cls."""
    content = _content(archive, member, MAX_CLS)
    return _checked(int(content) if re.fullmatch(rb"\s*[0-9]+\s*", content) else content, member)


def _label_in_json(archive: Archive, member: Member, key: str) -> int | None:
    """The label in a .json; None where it has none."""
    try:
        content = json.loads(_content(archive, member, MAX_JSON))
    except BadTar:
        raise
    except (ValueError, RecursionError) as error:
        raise BadTar(f"{member.name} is no JSON ({first_line(error)})") from None
    return _checked(content[key], member) if isinstance(content, dict) and key in content else None


def _content(archive: Archive, member: Member, most: int) -> bytes:
    if member.size > most:
        raise BadTar(f"{member.name} has {member.size} bytes, too many for a label")
    return archive.read(member.offset, member.size)


def _checked(label: Any, member: Member) -> int:
    if type(label) is not int or not 0 <= label <= MAX_LABEL:
        raise BadTar(f"{member.name} holds {ascii(label)[:60]}; a label is an integer from 0 to {MAX_LABEL}")
    return label


def indexed(path: Path, name: str, shards: ShardList, remedy: str) -> tuple[Index, tuple[int, int]]:
    """The index of a shard, and the state of its file, which must stay so during the run.

    Args:
        path: its file.
        name: what to call it in an error, its path or URL.
        shards: the list that it is of.
        remedy: what to do where it is damaged.

    Raises:
        ConfigError: names the shard and the member that is wrong.
    """
    file = _open(path, name, ConfigError)
    try:
        index, state = read_index(file, shards.label_key), _state(file)
    except BadTar as error:
        raise ConfigError(f"{name}: {error}; {remedy}") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    finally:
        os.close(file)
    count = len(index.labels)
    if shards.counts.get(name, count) != count:
        raise ConfigError(f"{name}: holds {count} images, but {shards.table} says {shards.counts[name]}; {remedy}")
    return index, state


class ShardData(Dataset):
    """The images of WebDataset shards. Shards of URLs are fetched first.

    The index takes 16 bytes an image. Names of images are not kept: where one is needed for an error, the headers of
    its shard are read again.

    Args:
        shards: which they are.
        transform: applied to every image, an RGB `PIL.Image`.

    Raises:
        ConfigError: names the shard that is missing or wrong, and the member.
    """

    # labels are numbers
    classes = None

    def __init__(self, shards: ShardList, transform: Callable[[Image.Image], Any]) -> None:
        self.names, self.transform = shards.names, transform
        self.paths, where = list(map(Path, self.names)), "replace this shard by a good copy"
        if "://" in self.names[0]:
            self.paths = fetch_all(self.names, lambda path, url: indexed(path, url, shards, "replace it on the server"))
            where = f"delete its copy in {self.paths[0].parent}, to fetch it again"
        found = [indexed(path, name, shards, where) for path, name in zip(self.paths, self.names)]
        indices, self.states = zip(*found)
        self.offsets, self.sizes, self.labels = (np.concatenate(parts) for parts in zip(*indices))
        self.starts = np.cumsum([0, *(len(index.labels) for index in indices)])
        self._files = OrderedDict()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        shard = int(np.searchsorted(self.starts, index, "right")) - 1
        content = self._read(shard, int(self.sizes[index]), int(self.offsets[index]))
        label = int(self.labels[index])
        try:
            return prepared(io.BytesIO(content), self.transform, self.names[shard]), label
        except UnreadableImage:
            # once more, for an error that names the member
            return prepared(io.BytesIO(content), self.transform, self.name_of(index)), label

    def _read(self, shard: int, size: int, offset: int) -> bytes:
        name = self.names[shard]
        try:
            if shard not in self._files:
                self._files[shard] = self._reopened(shard)
                if len(self._files) > 2 * WINDOW:
                    os.close(self._files.popitem(last=False)[1])
            # os.pread moves no position in the file, so that forked loader processes may share the open files
            self._files.move_to_end(shard)
            content = os.pread(self._files[shard], size, offset)
        except OSError as error:
            raise UnreadableImage(f"{name}: cannot be read: {error.strerror}") from None
        if len(content) < size:
            raise UnreadableImage(f"{name}: became shorter during the run; restore it and resume")
        return content

    def _reopened(self, shard: int) -> int:
        name = self.names[shard]
        file = _open(self.paths[shard], name, UnreadableImage)
        if _state(file) != self.states[shard]:
            os.close(file)
            raise UnreadableImage(f"{name}: was changed during the run; restore it and resume")
        return file

    def __getstate__(self) -> dict[str, Any]:
        # descriptors mean nothing in a process that was not forked from this one
        return {**self.__dict__, "_files": OrderedDict()}

    def name_of(self, index: int) -> str:
        """The shard of an image and its name in there, for an error."""
        shard = int(np.searchsorted(self.starts, index, "right")) - 1
        name, file = self.names[shard], _open(self.paths[shard], self.names[shard], UnreadableImage)
        try:
            members = Archive(file).members()
            return next((f"{name}: {member.name}" for member in members if member.offset == self.offsets[index]), name)
        except BadTar:
            return name
        finally:
            os.close(file)

    def check_labels(self, nb_classes: int) -> None:
        """Refuse labels that are no class of the model.

        Raises:
            ConfigError: names the first image with such a label.
        """
        wrong = np.flatnonzero(self.labels >= nb_classes)
        if len(wrong):
            raise ConfigError(
                f"{self.name_of(wrong[0])}: has the label {self.labels[wrong[0]]}, but a model of {nb_classes} classes "
                f"has 0 to {nb_classes - 1}; correct it, or give --nb_classes"
            )

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """A permutation of the images for an epoch, in which only the images of `WINDOW` shards are mixed.

        The shards are permuted first, so that every epoch mixes others.
        """
        shards = generator.permutation(len(self.starts) - 1)
        windows = []
        for first in range(0, len(shards), WINDOW):
            mixed = [np.arange(self.starts[shard], self.starts[shard + 1]) for shard in shards[first : first + WINDOW]]
            windows.append(generator.permutation(np.concatenate(mixed)))
        return np.concatenate(windows)


def _open(path: Path, name: str, error: type[Exception]) -> int:
    """Open a shard, which must be a regular file: opening a pipe without a writer would wait forever."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as reason:
        raise error(f"{name}: cannot be opened: {reason.strerror}; restore this shard, or list only others") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise error(f"{name}: is no regular file; give the path of a tar file")
    return file


def _state(file: int) -> tuple[int, int]:
    """Size and time of the last change of an open file."""
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns
