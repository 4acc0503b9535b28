"""Write checkpoints so that a crash never damages one, and read them without running code from them."""

import os
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from models.config import ConfigError
from models.download import sha256_of
from models.reader import read_checkpoint
from models.safetensors_file import to_safetensors
from utils import beside, check_target, put_in_place, replace_file

from .manifest import forget, verify

# 2: saved within an epoch, too; with the run and its updates. Both are read.
FORMAT = 2


def write_checkpoint(path: Path, state: dict[str, Any]) -> str:
    """Write a checkpoint; whenever the process dies, `path` holds either the old file or the whole new one.

    Args:
        path: file to write.
        state: tensors, numbers, strings, and lists, tuples and dicts of them.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        OSError, RuntimeError: writing failed, for example because the disk is full; the old file is intact.
    """
    return replace_checkpoint(path, lambda file: torch.save(state, file))


def replace_checkpoint(path: Path, write: Callable[[IO[bytes]], Any]) -> str:
    """Like `write_checkpoint`, but `write` is called with an open file and writes the content into it."""
    digests = []
    forget(path)
    replace_file(path, write, lambda written: digests.append(_verified(written)))
    return digests[0]


def write_aside(path: Path, state: dict[str, Any]) -> Path:
    """Write a checkpoint beside `path`, for `finish`; returns the temporary file.

    Raises:
        OSError, RuntimeError: writing failed; nothing is left of it.
    """
    temporary = beside(path)
    try:
        # by its name: torch then writes the file itself, which takes three quarters of the time
        torch.save(state, temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def finish(temporary: Path, path: Path) -> str:
    """Verify a checkpoint that was written aside, and put it in its place; returns its SHA-256.

    Raises:
        OSError, zipfile.BadZipFile: that failed; the older file is intact, and nothing is left of the new one.
    """
    try:
        digest = _verified(temporary)
        forget(path)
        put_in_place(temporary, path)
        return digest
    finally:
        temporary.unlink(missing_ok=True)


def copy_checkpoint(source: Path, path: Path, digest: str) -> None:
    """Copy a checkpoint as `write_checkpoint` writes one.

    Raises:
        OSError: it cannot be written, or the copy has not the given SHA-256.
    """

    def same(written: Path) -> None:
        if sha256_of(written) != digest:
            raise OSError("it does not read back as written")

    forget(path)
    with open(source, "rb") as file:
        replace_file(path, lambda target: shutil.copyfileobj(file, target, 1 << 20), same)


def _verified(path: Path) -> str:
    """SHA-256 of a file that was just written, whose checksums hold.

    Raises:
        OSError, zipfile.BadZipFile: they do not.
    """
    # torch reads a damaged file without an error; only the checksums of the zip container reveal the damage
    with ThreadPoolExecutor(1) as pool, zipfile.ZipFile(path) as archive:
        digest = pool.submit(sha256_of, path)
        if archive.testzip() is not None:
            raise OSError("it does not read back as written")
        return digest.result()


def write_safetensors(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file, which `read` reads as the checkpoint {**metadata, "model": state}, as safely.

    Args:
        path: file to write.
        state: state dict of a model.
        metadata: the other entries of the checkpoint, such as `args` and `temperature`: numbers, texts, lists, dicts.

    Raises:
        OSError: writing failed; the old file is intact.
        ValueError: an entry of the state dict is no tensor, or the metadata do not fit into JSON.
    """
    content = to_safetensors(state, metadata)
    forget(path)
    replace_file(path, lambda file: file.write(content))


def weights_path(path: str | Path) -> Path:
    """The path of a file of weights to write, checked before anything slow is done.

    Raises:
        ConfigError: it has a suffix that `write_weights` does not know, or cannot be written.
    """
    if Path(path).suffix not in (".pth", ".safetensors"):
        raise ConfigError(f"{path}: weights are written to .pth or .safetensors; give a name that ends so")
    return check_target(path)


def write_weights(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint of weights in the format of the file's suffix, .pth or .safetensors.

    Raises:
        ConfigError: it cannot be written; an older file is intact.
    """
    try:
        if path.suffix == ".safetensors":
            rest = {name: value for name, value in checkpoint.items() if name != "model"}
            write_safetensors(path, checkpoint["model"], rest)
        else:
            write_checkpoint(path, checkpoint)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from None


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint from a path or URL, with its checksums and entries verified. It never runs code.

    A file beside a `manifest.json` that lists it must be the one that was saved.

    Raises:
        ConfigError: the file is damaged, is not a checkpoint, or cannot be fetched; an entry is of a wrong type.
    """
    try:
        if os.path.isfile(path):
            verify(Path(path))
        content = read_checkpoint(path)
    except ConfigError:
        raise
    except Exception as error:
        # on a damaged file, its readers raise exceptions of any type
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(text if str(path) in text else f"{path}: {text}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    _check_entries(content, path)
    return content


def _check_entries(checkpoint: dict[Any, Any], path: str | Path) -> None:
    """Check the entries that are used without a further check.

    Raises:
        ConfigError: names the first entry that is not of its type.
    """
    if all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        # a bare state dict, which may have a weight of any name
        return
    own = checkpoint.get("args")
    own = own if isinstance(own, dict) else {}
    number = checkpoint.get("format")
    if number is not None and (type(number) is not int or not 1 <= number <= FORMAT):
        raise ConfigError(
            f"{path}: its format is {ascii(number)[:60]}, and this version reads 1 to {FORMAT}; use the version of "
            "this project that wrote it"
        )
    temperature, averages = checkpoint.get("temperature"), checkpoint.get("model_ema")
    classes, given, count = own.get("classes"), own.get("given", []), own.get("nb_classes")
    for name, value, kind, fits in (
        ("temperature", temperature, "a number", temperature is None or is_number(temperature)),
        ("model_ema", averages, "a state dict", averages is None or isinstance(averages, dict)),
        ('args["classes"]', classes, "a list of names", classes is None or _is_texts(classes)),
        ('args["given"]', given, "a list of options", _is_texts(given)),
        ('args["nb_classes"]', count, "an integer above 0", count is None or (type(count) is int and count > 0)),
    ):
        if not fits:
            raise ConfigError(
                f"{path}: its entry {name} must be {kind}, got {ascii(value)[:60]}; use another copy, or save its "
                "state dict alone and give --kw_config"
            )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)
