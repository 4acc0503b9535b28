"""Downloads files whose SHA-256 is known beforehand, and keeps them.

A URL must be of https, and must tell the hash of its file: at its end (`#sha256=` and 64 digits), or as torch.hub's
files do, in the name of the file (`model-0123abcd.pth`, at least 8 digits).
"""

import contextlib
import hashlib
import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from .messages import first_line, printable

# http is accepted from servers on this machine, since nobody stands between
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# for which a server may be silent, before its first byte and between two of them
SECONDS = 30
# bytes a second, on average; a server that is slower would hold a run for days
SLOWEST = 10_000
MAX_BYTES = 16 << 30
REMEDY = "download the file, check it, and give its path"


@dataclass(frozen=True)
class Address:
    """A URL that may be downloaded.

    Attributes:
        url: with the hash at its end, if it has one.
        name: of the file.
        digests: beginnings of the file's SHA-256, in hexadecimal.
    """

    url: str
    name: str
    digests: tuple[str, ...]

    def fits(self, digest: str) -> bool:
        return all(digest.startswith(promised) for promised in self.digests)


def parse_url(url: str) -> Address:
    """Check a URL, before anything is downloaded.

    Raises:
        ValueError: it is not of https, or does not tell the SHA-256 of its file; says what to do.
    """
    try:
        parts = urlsplit(url)
        # reading the port raises where it is no number
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise ValueError(f"{printable(url)}: not a URL ({first_line(error)}); {REMEDY}") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{printable(url)}: {printable(parts.scheme)}:// is not supported; {REMEDY}")
    if not host or "@" in parts.netloc or re.search(r"[^!-~]", url):
        raise ValueError(f"{printable(url)}: no host, a password, or a character that a URL cannot have; {REMEDY}")
    if not _is_protected(parts):
        raise ValueError(f"{url}: http:// can be changed on its way; use https://, or {REMEDY}")
    name = Path(parts.path).name or "checkpoint"
    at_end = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", parts.fragment)
    in_name = re.search(r"-([0-9a-f]{8,64})\.", name)
    if not (at_end or in_name) or (parts.fragment and not at_end):
        raise ValueError(
            f"{url}: does not tell the SHA-256 of its file; append #sha256= and its 64 digits to the URL, or {REMEDY}"
        )
    digests = tuple(match[1].lower() for match in (at_end, in_name) if match)
    return Address(url, name, digests)


def _is_protected(parts: SplitResult) -> bool:
    return parts.scheme == "https" or parts.hostname in LOOPBACK


def download(address: Address, folder: Path) -> Path:
    """The file of a URL, whose SHA-256 is checked whenever it is used; a file that differs is downloaded again.

    Args:
        address: what to download.
        folder: where the file is kept. Each URL has a file of its own, also where two end in one name.

    Raises:
        ValueError: it cannot be downloaded, or is not the promised file; nothing of it is kept.
    """
    label = re.sub(r"[^\w.-]", "_", address.name)[-80:]
    key = hashlib.sha256(address.url.encode()).hexdigest()
    path = folder / f"{key[:32]}-{label}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.is_file() and address.fits(sha256_of(path)):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        _Transfer(address.url, temporary).finish()
        digest = sha256_of(temporary)
        if not address.fits(digest):
            raise OSError(f"its SHA-256 is {digest}, not {' and '.join(address.digests)}")
        os.replace(temporary, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"checkpoint '{address.url}' cannot be downloaded: {printable(first_line(error))}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


class _Transfer(threading.Thread):
    """Downloads a URL to a file, in a thread of its own.

    The time-out of a socket begins anew with each byte, and looking up a name has none, so that only another thread
    can bound how long all of it takes.
    """

    def __init__(self, url: str, path: Path) -> None:
        super().__init__(daemon=True)
        self.url, self.path = url, path
        self.received, self.error, self.stopped = 0, None, False

    def finish(self) -> None:
        """Wait for the whole file.

        Raises:
            OSError, ValueError, HTTPException: it did not come, or too slowly.
        """
        started = time.monotonic()
        self.start()
        while self.is_alive():
            self.join(0.05)
            if time.monotonic() - started > SECONDS + self.received / SLOWEST:
                self.stopped = True
                raise OSError(f"timed out: {self.received} bytes came in {time.monotonic() - started:.0f} s")
        if self.error is not None:
            raise self.error

    def run(self) -> None:
        try:
            self._copy()
        except Exception as error:
            self.error = error

    def _copy(self) -> None:
        opener = urllib.request.build_opener(_Redirects)
        with opener.open(self.url, timeout=SECONDS) as answer, open(self.path, "wb") as file:
            expected = answer.headers.get("Content-Length")
            # read() would wait until a whole block has come
            while not self.stopped and (block := answer.read1(1 << 20)):
                file.write(block)
                self.received += len(block)
                if self.received > MAX_BYTES:
                    raise OSError(f"more than {MAX_BYTES} bytes came")
        if expected is not None and self.received != int(expected):
            raise OSError(f"{self.received} of {expected} bytes came")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects as long as they are protected."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        new, old = urlsplit(newurl), urlsplit(req.full_url)
        if not _is_protected(new) or (old.scheme == "https" and new.scheme != "https"):
            raise urllib.error.URLError(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
