"""Fetch files over http and https, each once per machine, and keep them only whole."""

import contextlib
import fcntl
import hashlib
import io
import os
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

import torch

from models.config import ConfigError
from models.messages import first_line
from utils import log

# how long a server may be silent
SECONDS = 30
# files that are fetched at the same time, as one connection rarely fills a line
AT_ONCE = 4
# age of a temporary file that nobody writes any more
STALE = 3600


def cache_path(url: str) -> Path:
    """The file that a URL is kept in, in torch.hub's folder.

    Its name begins with the SHA-256 of the URL and ends with the name of the URL's file.
    """
    name = Path(unquote(urlsplit(url).path)).name[-80:]
    return Path(torch.hub.get_dir()) / "shards" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{name}"


def fetch_all(urls: list[str], check: Callable[[Path, str], object]) -> list[Path]:
    """The files of some URLs, from the cache or over the net; arguments and errors as for `fetch`."""
    missing = sum(not cache_path(url).is_file() for url in urls)
    if missing:
        log(f"fetching {missing} of {len(urls)} shards, such as {urls[0]}, into {cache_path(urls[0]).parent}")
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(lambda url: fetch(url, check), urls))
    finally:
        # after an error, only the files that are being fetched are waited for
        pool.shutdown(cancel_futures=True)


def fetch(url: str, check: Callable[[Path, str], object]) -> Path:
    """The file of a URL, from the cache or over the net.

    Of several processes that ask for it, one fetches it and the others wait. On a file system without locks each
    fetches a copy, and the last one stays.

    Args:
        url: address, http or https.
        check: called with the fetched file and the URL before the file is kept; raises if it is damaged.

    Raises:
        ConfigError: it cannot be fetched or kept.
    """
    path = cache_path(url)
    try:
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            # another process may have fetched it meanwhile
            if not path.is_file():
                _fetch(url, path, check)
    except ConfigError:
        raise
    except (OSError, ValueError, HTTPException) as error:
        raise ConfigError(f"{url}: cannot be fetched into {path.parent}: {_reason(error)}") from None
    return path


def read_small(url: str, most: int) -> bytes | None:
    """The content of a small file; None where the server has no such file.

    Args:
        url: address, http or https.
        most: bytes that it may have.

    Raises:
        ConfigError: it cannot be fetched, or is larger.
    """
    content = io.BytesIO()
    try:
        _download(url, content, most)
    except HTTPError as error:
        if error.code in (404, 410):
            return None
        raise ConfigError(f"{url}: cannot be fetched: {_reason(error)}") from None
    except (OSError, ValueError, HTTPException) as error:
        raise ConfigError(f"{url}: cannot be fetched: {_reason(error)}") from None
    return content.getvalue()


def _fetch(url: str, path: Path, check: Callable[[Path, str], object]) -> None:
    start = f".{path.name[:32]}-"
    for left in path.parent.glob(f"{start}*.tmp"):
        # of a process that was killed; another machine may be writing younger ones
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()
    temporary = path.with_name(f"{start}{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            _download(url, file)
        check(temporary, url)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _download(url: str, file: IO[bytes], most: float = float("inf")) -> None:
    """Write the file of a URL to an open file.

    Raises:
        OSError, ValueError, HTTPException: it cannot be fetched whole, or has more than `most` bytes.
    """
    with urllib.request.urlopen(url, timeout=SECONDS) as answer:
        while block := answer.read(1 << 20):
            file.write(block)
            if file.tell() > most:
                raise ValueError(f"it has more than {most} bytes")
        size, expected = file.tell(), answer.headers.get("Content-Length")
    if expected is not None and size != int(expected):
        raise OSError(f"{size} of {expected} bytes came")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Context that only one process of this machine is in; every process, where the file system has no locks."""
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return f"the server was silent for {SECONDS} s"
    return first_line(error)
