"""One run per output folder: the first process of a run locks the folder as long as it lives."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from models.config import ConfigError

NAME = ".run.lock"
# a process that was just killed still holds its locks for a moment
PATIENCE = 1.0
# ranks that launchers tell
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


class RunLock:
    """The lock of an output folder, as a context. Without a folder, and in other processes than the first, it is none.

    It is a record lock: the operating system releases it when the process dies, whichever way, and the loader processes
    that it has forked do not hold it. It works across the machines of a shared file system that has locks.

    Args:
        folder: the output folder; None: there is none.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = Path(folder) if folder and is_first() else None
        self._descriptor: int | None = None

    def take(self) -> None:
        """Lock the folder, which exists; again, it does nothing.

        Raises:
            ConfigError: another run has locked it.
        """
        if self.folder is None or self._descriptor is not None:
            return
        path = self.folder / NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
        deadline = time.monotonic() + PATIENCE
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                owner = _owner(descriptor)
                os.close(descriptor)
                raise ConfigError(
                    f"{self.folder}: another run{owner} is writing into this folder; wait for its end, stop it, or "
                    "give another --output_dir"
                )
            time.sleep(0.1)
        self._descriptor = descriptor
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
        except OSError:
            # on a full disk the lock holds without its note
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_first(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the first process of a run, by what its launcher tells."""
    told = next((env[name] for name in RANKS if env.get(name)), "0")
    return told == "0"


def _locked(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        print(f"note: this file system has no locks ({error.strerror}): start one run at a time", flush=True)
    return True


def _owner(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 1000, 0))
        return f" (process {int(about['pid'])} on {str(about['host'])[:60]}, since {str(about['since'])[:20]})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
