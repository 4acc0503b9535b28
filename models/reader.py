"""Reading checkpoint files, from a path or a URL: verified, and without running code."""

import argparse
import contextlib
import hashlib
import os
import pickle
import re
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import torch

# of a server that says nothing
SECONDS = 30


def read_checkpoint(source):
    """The content of a checkpoint file, which never runs code.

    source: a path, or a URL (http, https), whose file is kept in torch.hub's folder.
    Raises FileNotFoundError, or ValueError for a file that is damaged, is no checkpoint, holds anything but tensors and
    plain values, or cannot be downloaded.
    """
    if str(source).startswith(("http://", "https://")):
        return _read(_download(str(source)), source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint '{path}' does not exist" if not path.exists() else f"'{path}' is no file")
    return _read(path, path)


def _read(path, name):
    """The content of a file that messages call by another name."""
    try:
        # torch notices no flipped bit, the container's checksums do
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"checkpoint '{name}' is damaged (checksum of {damaged}); use another copy")
        # released checkpoints keep their options in this plain record
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise ValueError(
                f"checkpoint '{name}' holds Python objects other than tensors and plain values, which could run code, "
                "or is no checkpoint; nothing was loaded. Save its state dict alone and load that"
            ) from None
        raise ValueError(f"'{name}' is no checkpoint: {_first_line(error)}") from None
    except (RuntimeError, EOFError, zipfile.BadZipFile, KeyError, AttributeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"checkpoint '{name}' is truncated or no checkpoint: {_first_line(error)}") from None


def _first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _download(url):
    """The path of the file that a URL names, downloaded unless it is there, whole and as it came.

    A file name such as `model-0123abcd.pth` holds the first digits of its SHA-256, as torch.hub has it.
    """
    name = Path(urlsplit(url).path).name or "checkpoint"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    # several URLs may end in the same name
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    record = path.with_name(path.name + ".sha256")
    if path.is_file() and record.is_file() and record.read_text() == _digest(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer, open(temporary, "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
            size, expected = file.tell(), answer.headers.get("Content-Length")
        digest, promised = _digest(temporary), re.search(r"-([0-9a-f]{8,64})\.", name)
        if expected is not None and size != int(expected):
            raise OSError(f"{size} of {expected} bytes came")
        if promised and not digest.startswith(promised[1]):
            raise OSError(f"its SHA-256 begins with {digest[:8]}, not with {promised[1]}")
        # a record without its file is no harm
        record.write_text(digest)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint '{url}' cannot be downloaded: {_first_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0][:200]
