"""The output folder of a run: what is saved there, under which names, and what is kept.

`checkpoint-E.pth` was saved after epoch E and its evaluation, `checkpoint-E-U.pth` after U updates of epoch E. The
first process writes the folder, and all processes learn the outcome.
"""

import contextlib
import functools
import math
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from models.config import ConfigError
from models.download import sha256_of
from utils import is_main_process, log, share

from .choice import BEST as BEST_NAME
from .choice import JOBS, Position, content_of, listed, named
from .files import copy_checkpoint, finish, write_aside, write_checkpoint
from .manifest import NAME as MANIFEST
from .manifest import Manifest
from .state import position_of
from .weights import ema_state

# written when the accuracy of the weights, or of the averaged weights, is the best so far
BEST = {"acc1": BEST_NAME, "acc1_ema": "checkpoint-best-ema.pth"}
# a damaged newest checkpoint costs no more than the work since the one before
AT_LEAST = 2


class RunFolder:
    """The output folder of the run that writes it.

    Args:
        path: the folder.
        keep: number of checkpoints of whole epochs to keep; at least `AT_LEAST` checkpoints are kept.

    Attributes:
        run: identity of the run.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, max(keep, AT_LEAST)
        self.run = ""
        self._manifest = Manifest(path)
        # best checkpoints that could not be written yet
        self._pending: dict[str, dict[str, Any]] = {}
        self._pool, self._job = ThreadPoolExecutor(1, "save"), None

    def begin(self, checkpoint: dict[str, Any] | None, path: str | Path | None) -> None:
        """Take over the folder: clean it up, and keep what this run does not continue apart.

        Args:
            checkpoint: content of the checkpoint that the run continues from; None: it starts anew.
            path: its path.
        """
        own = checkpoint is not None and Path(str(path)).resolve().parent == self.path.resolve()
        known = checkpoint.get("run") if own else None
        if is_main_process():
            remove_stale_files(self.path)
            self._set_aside(position_of(checkpoint), fresh=not own)
            self._manifest.run = known if isinstance(known, str) else uuid.uuid4().hex
            self._manifest.files = {n: e for n, e in self._manifest.files.items() if (self.path / n).is_file()}
            self._list_others()
            self._try(MANIFEST, self._manifest.write)
            if own:
                self._repair_best(checkpoint)
        self.run = share(self._manifest.run)

    def _list_others(self) -> None:
        """List what this run saved, and a crash or a damaged manifest left out, so that it is deleted in its turn."""
        files = self._manifest.files
        for position, path in named(self.path):
            content = None if path.name in files else content_of(path)
            # a copy under another name is the user's
            if content is None or content.get("run") != self._manifest.run or position_of(content) != position:
                continue
            epoch, update = position
            files[path.name] = _entry(path, sha256_of(path), epoch, None if update == math.inf else int(update))

    def _set_aside(self, position: Position | None, fresh: bool) -> None:
        """Move the files of a run that this one does not continue into a subfolder.

        Otherwise the next start would continue from the other run, where that one has come farther.
        """
        later = [path for by_name, path in named(self.path) if fresh or self._position(path, by_name) > position]
        best = [self.path / name for name in BEST.values() if (self.path / name).is_file()]
        later += [path for path in best if fresh or self._position(path, (0, 0)) > position]
        count = len(later)
        if fresh:
            names = ("log.txt", "steps.jsonl", "times.jsonl", "curves.png", "report.json", "report.html", MANIFEST)
            later += [self.path / name for name in names if (self.path / name).is_file()]
        if not [path for path in later if path.name != MANIFEST]:
            return
        aside = _new_folder(self.path, f"earlier-{time.strftime('%Y%m%d-%H%M%S')}")
        for path in later:
            path.rename(aside / path.name)
        if fresh:
            self._manifest = Manifest(self.path)
        what = f"{count} checkpoints" if count else "the logs"
        log(f"{what} of an earlier run, which this one does not continue, were moved to {aside}")

    def _position(self, path: Path, otherwise: Position) -> Position:
        entry = self._manifest.files.get(path.name)
        return listed(entry) if entry is not None else position_of(content_of(path)) or otherwise

    def save(
        self, state: dict[str, Any], epoch: int, update: int | None = None, best: Iterable[str] = (), wait: bool = True
    ) -> bool:
        """Save a checkpoint, and the best ones; delete old ones only after that.

        A failure prints a warning, and the run continues with the older files intact. A best checkpoint that could not
        be written is tried again at every later save.

        Args:
            state: of `training_state`; other processes than the first may give any value.
            epoch, update: position of the state; update None: the epoch is whole.
            best: those of `BEST` for which this state is the best so far.
            wait: whether to verify the file, flush it to the disk and put it in its place before this returns;
                otherwise a thread does so while the run goes on, and the next save waits for it.

        Returns:
            Whether the checkpoint was saved, or, without `wait`, written, on all processes.
        """
        saved, best = False, set(best)
        if is_main_process():
            self.wait()
            name = file_name(epoch, update)
            temporary = self._try(name, lambda: write_aside(self.path / name, state))
            if temporary is not None:
                later = functools.partial(self._complete, name, temporary, epoch, update)
                if wait or best or self._pending:
                    saved = later()
                else:
                    self._job, saved = self._pool.submit(later), True
                    JOBS.add(self._job)
            self._pending |= dict.fromkeys(best, state if saved else _copied(state))
            if self._pending:
                self._write_pending(name if saved else None, best)
        return share(saved)

    def wait(self) -> None:
        """Wait until the last checkpoint is in its place."""
        if self._job is not None:
            self._job.result()
            JOBS.discard(self._job)
            self._job = None

    def _complete(self, name: str, temporary: Path, epoch: int, update: int | None) -> bool:
        """Put a checkpoint that was written aside in its place, list it, and delete what is not needed any more."""
        saved = self._write(name, functools.partial(finish, temporary), epoch, update)
        if saved:
            self._prune()
        return saved

    def save_best(self, state: dict[str, Any], best: Iterable[str]) -> None:
        """Save best checkpoints of a state that is not saved otherwise."""
        if is_main_process():
            self.wait()
            self._pending |= dict.fromkeys(best, state)
            self._write_pending(None, set())
            self._pending = {which: _copied(state) for which, state in self._pending.items()}

    def _write(self, name: str, write: Callable[[Path], str], epoch: int, update: int | None) -> bool:
        path = self.path / name
        digest = self._try(name, lambda: write(path))
        # the write has removed the file's old entry
        self._manifest.files.pop(name, None)
        if digest is None:
            return False
        self._manifest.files[name] = _entry(path, digest, epoch, update)
        self._try(MANIFEST, self._manifest.write)
        return True

    def _write_pending(self, saved: str | None, same: set[str]) -> None:
        """Write best checkpoints; those of `same` are of the state in the file `saved`."""
        for which, state in list(self._pending.items()):
            if which == "acc1" and saved and which in same:
                digest = self._manifest.files[saved]["sha256"]
                write = _copier(self.path / saved, digest)
            else:
                content = ema_state(state) if which == "acc1_ema" and "model_ema" in state else state
                write = _writer(content)
            if self._write(BEST[which], write, state["epoch"], None):
                del self._pending[which]
            elif which in same and saved:
                self._pending[which] = _copied(state)

    def _repair_best(self, checkpoint: dict[str, Any]) -> None:
        """Write best checkpoints that a crash kept from being written, where a checkpoint with the weights is there."""
        for which, epoch in (checkpoint.get("best_epoch") or {}).items():
            if which not in BEST or type(epoch) is not int:
                continue
            path = self.path / BEST[which]
            content = content_of(path) if path.is_file() else None
            if content is not None and content.get("epoch") == epoch:
                continue
            source = content_of(self.path / file_name(epoch))
            if source is None:
                log(f"warning: {path} is not that of epoch {epoch}, the best so far, which is not there any more")
                continue
            state = ema_state(source) if which == "acc1_ema" else source
            if self._write(BEST[which], _writer(state), epoch, None):
                log(f"{path} was written again, from {file_name(epoch)}")

    def _prune(self) -> None:
        """Delete checkpoints that are not needed any more."""
        entries = [(listed(entry), name) for name, entry in self._manifest.files.items() if name not in BEST.values()]
        entries.sort()
        whole = [entry for entry in entries if entry[0][1] == math.inf]
        kept = set(whole[-self.keep :])
        # within an epoch: what is newer than its last whole one, and as many older ones as make two
        kept |= set([entry for entry in entries if not whole or entry[0] > whole[-1][0]][-AT_LEAST:])
        for entry in reversed(entries):
            if len(kept) >= AT_LEAST:
                break
            kept.add(entry)
        old = [name for position, name in entries if (position, name) not in kept]
        for name in old:
            with contextlib.suppress(OSError):
                (self.path / name).unlink(missing_ok=True)
                del self._manifest.files[name]
        if old:
            self._try(MANIFEST, self._manifest.write)

    def _try(self, name: str, write: Callable[[], Any]) -> Any:
        """What a function returns that writes a file; None, after a warning, where it fails."""
        try:
            return write()
        except Exception as error:
            # zipfile, torch and the operating system raise exceptions of many types, and a run must outlive them
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(
                f"warning: {self.path / name} was not saved ({reason}); older checkpoints are intact",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            return None


def file_name(epoch: int, update: int | None = None) -> str:
    """The name of a checkpoint: of a whole epoch, or of one in which `update` updates are done."""
    return f"checkpoint-{epoch}.pth" if update is None else f"checkpoint-{epoch}-{update}.pth"


def remove_stale_files(folder: Path) -> None:
    """Remove the temporary files that killed processes left behind."""
    for pattern in (".checkpoint*.tmp", ".manifest*.tmp", ".log*.tmp", ".steps*.tmp", ".curves*.tmp"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _entry(path: Path, digest: str, epoch: int, update: int | None) -> dict[str, Any]:
    return {"sha256": digest, "bytes": path.stat().st_size, "epoch": epoch, "update": update}


def _writer(state: dict[str, Any]) -> Callable[[Path], str]:
    return lambda path: write_checkpoint(path, state)


def _copier(source: Path, digest: str) -> Callable[[Path], str]:
    def copy(path: Path) -> str:
        copy_checkpoint(source, path, digest)
        return digest

    return copy


def _copied(value: Any) -> Any:
    """A copy of a state that later updates do not change, in the CPU's memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value


def _new_folder(parent: Path, name: str) -> Path:
    """A folder that did not exist, with a number after its name where that is needed."""
    for number in range(1, 1000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise ConfigError(f"{parent}: has too many folders {name}; remove some")
