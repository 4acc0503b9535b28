"""Reads checkpoint files from a path or a URL, verifies them, and never runs code from them."""

import argparse
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .download import download, parse_url
from .messages import first_line, printable
from .safetensors_file import read_safetensors

# a tensor may repeat numbers of its storage (a stride of 0), but one that claims more of them is refused
REPEATED = 1 << 20
# holes that a file may have; one of terabytes takes no room on the disk, but hours to read
HOLES = 1 << 30


def read_checkpoint(source: str | os.PathLike) -> Any:
    """Read the content of a checkpoint file. No code in the file is run.

    Args:
        source: path, or URL that `parse_url` accepts, of a file of torch.save or of safetensors (by its suffix). A
            downloaded file is kept in torch.hub's folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is not a checkpoint, holds anything but tensors and plain values, claims more
            than it holds, or cannot be downloaded; the URL is not of https, or tells no SHA-256.
    """
    if "://" in str(source):
        address = parse_url(str(source))
        return _read(download(address, Path(torch.hub.get_dir()) / "checkpoints"), address.url, address.name)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint '{path}' does not exist" if not path.exists() else f"'{path}' is not a file"
        )
    return _read(path, path, path.name)


def _read(path: Path, source: str | os.PathLike, file_name: str) -> Any:
    """Read a file.

    Args:
        path: of the file, or of the copy of a download.
        source: what error messages call it.
        file_name: its suffix tells the format.
    """
    is_safetensors = file_name.endswith(".safetensors")
    try:
        _check_holes(path)
        if is_safetensors:
            return read_safetensors(path)
        # torch does not notice a flipped bit, but the checksums of the zip file do
        if zipfile.is_zipfile(path):
            _check_archive(path)
        # released checkpoints hold their options in a Namespace, which is plain data
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(content)
        return content
    except _Refused as error:
        raise ValueError(f"checkpoint '{source}' {error}; use another copy") from None
    except Exception as error:
        # on a damaged file, readers raise exceptions of any type
        reason, known = printable(first_line(error)), isinstance(error, pickle.UnpicklingError)
        if known and ("weights_only" in str(error).lower() or "unsupported" in str(error).lower()):
            raise ValueError(
                f"checkpoint '{source}' holds Python objects other than tensors and plain values, which could run "
                "code, or is not a checkpoint; nothing was loaded. Save its state dict alone and load that"
            ) from None
        if is_safetensors:
            raise ValueError(f"checkpoint '{source}' is not a safetensors file: {reason}") from None
        wrong = "is not a checkpoint" if known else "is truncated or not a checkpoint"
        raise ValueError(f"checkpoint '{source}' {wrong}: {reason}") from None


class _Refused(Exception):
    """A file that is not what torch.save writes."""


def _check_holes(path: Path) -> None:
    status = os.stat(path)
    if status.st_size - 2 * 512 * status.st_blocks > HOLES:
        raise _Refused(f"is damaged ({status.st_size} bytes, nearly all of them a hole)")


def _check_archive(path: Path) -> None:
    """Refuse a zip file that is damaged, or that claims more than it holds.

    torch.save compresses nothing; a compressed entry may grow to a thousand times its size. Other tools may find other
    entries in a file whose first one does not lie at its beginning, or which has two of one name.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise _Refused(f"holds a compressed entry, {printable(entry.filename)}, which torch.save never writes")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise _Refused("is damaged (its entries claim to be larger than the file)")
        names = [entry.filename for entry in entries]
        if len(set(names)) < len(names) or min((entry.header_offset for entry in entries), default=0) != 0:
            raise _Refused("is damaged (its entries are not those of one archive)")
        damaged = archive.testzip()
    if damaged:
        raise _Refused(f"is damaged (checksum of {printable(damaged)})")


def _check_tensors(content: Any) -> None:
    """Refuse a tensor of few bytes that would take all memory as soon as it is copied."""
    for tensor in _tensors_in(content):
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            continue
        claimed = tensor.numel() * tensor.element_size()
        if claimed > max(REPEATED, tensor.untyped_storage().nbytes()):
            raise _Refused(f"holds a tensor of {claimed} bytes in {tensor.untyped_storage().nbytes()} bytes of data")


def _tensors_in(content: Any) -> Iterator[torch.Tensor]:
    """The tensors in dicts, lists and tuples; one that holds itself is visited once."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
