"""Reads checkpoint files from a path or a URL, verifies them, and never runs code from them."""

import argparse
import contextlib
import hashlib
import os
import pickle
import re
import urllib.request
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError

from .messages import first_line
from .safetensors_file import read_safetensors

# timeout for a server that does not answer
SECONDS = 30


def read_checkpoint(source: str | os.PathLike) -> Any:
    """Read the content of a checkpoint file. No code in the file is run.

    Args:
        source: path, or URL (http, https), of a file of torch.save or of safetensors (by its suffix). A downloaded file
            is kept in torch.hub's folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is not a checkpoint, holds anything but tensors and plain values, or cannot be
            downloaded; the URL has another scheme.
    """
    check_scheme(str(source))
    if "://" in str(source):
        return _read(_download(str(source)), source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint '{path}' does not exist" if not path.exists() else f"'{path}' is not a file"
        )
    return _read(path, path)


def check_scheme(source: str) -> None:
    """Refuse URLs that are not downloaded.

    Raises:
        ValueError: the scheme is neither http nor https.
    """
    scheme, separator, _ = source.partition("://")
    if separator and scheme not in ("http", "https"):
        raise ValueError(f"{source}: {scheme}:// is not supported; download the file and give its path")


def _read(path: Path, name: str | os.PathLike) -> Any:
    """Read a file; error messages call it by the given name, such as its URL."""
    if str(name).endswith(".safetensors"):
        try:
            return read_safetensors(path)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise ValueError(f"checkpoint '{name}' is not a safetensors file: {first_line(error)}") from None
    try:
        # torch does not notice a flipped bit, but the checksums of the zip file do
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"checkpoint '{name}' is damaged (checksum of {damaged}); use another copy")
        # released checkpoints hold their options in a Namespace, which is plain data
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise ValueError(
                f"checkpoint '{name}' holds Python objects other than tensors and plain values, which could run code, "
                "or is not a checkpoint; nothing was loaded. Save its state dict alone and load that"
            ) from None
        raise ValueError(f"'{name}' is not a checkpoint: {first_line(error)}") from None
    except (RuntimeError, EOFError, zipfile.BadZipFile, KeyError, AttributeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"checkpoint '{name}' is truncated or not a checkpoint: {first_line(error)}") from None


def _download(url: str) -> Path:
    """Download the file of a URL, unless an unchanged copy from an earlier download exists, and return its path.

    As for torch.hub, a file name such as `model-0123abcd.pth` holds the first digits of the file's SHA-256.
    """
    name = Path(urlsplit(url).path).name or "checkpoint"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    # several URLs may end in the same file name
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    record = path.with_name(path.name + ".sha256")
    if path.is_file() and record.is_file() and record.read_text() == sha256_of(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer, open(temporary, "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
            size, expected = file.tell(), answer.headers.get("Content-Length")
        digest, promised = sha256_of(temporary), re.search(r"-([0-9a-f]{8,64})\.", name)
        if expected is not None and size != int(expected):
            raise OSError(f"{size} of {expected} bytes came")
        if promised and not digest.startswith(promised[1]):
            raise OSError(f"its SHA-256 begins with {digest[:8]}, not with {promised[1]}")
        # the record is written first: a record without its file does no harm
        record.write_text(digest)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint '{url}' cannot be downloaded: {first_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
