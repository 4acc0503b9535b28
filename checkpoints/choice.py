"""Which checkpoint of a folder a run continues from, or evaluates.

The first process reads the folder, and all processes learn the outcome.
"""

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist

from models.config import ConfigError
from models.download import sha256_of
from utils import gather, is_main_process, log, share

from .files import read
from .manifest import NAME as MANIFEST
from .manifest import Manifest
from .state import position_of

# saves of this process that are not in their places yet
JOBS: set[Future] = set()
# (epoch, updates of it that are done); infinite for a whole epoch with its evaluation
Position = tuple[int, float]
# of the best weights so far, which has no number, and is the last resort
BEST = "checkpoint-best.pth"


def find(args: argparse.Namespace, output: Path | None) -> tuple[dict[str, Any] | None, str | Path | None]:
    """The checkpoint to resume or to evaluate, and its path; (None, None) where there is none.

    It is that of --resume, else the newest good one of the output folder.

    Raises:
        ConfigError: it cannot be read, or the processes do not all see the same file.
    """
    for job in list(JOBS):
        # of an earlier run in this process
        job.result()
    JOBS.clear()
    path = args.resume or None
    starts = args.eval and (args.finetune or args.init_static)
    if path is None and args.auto_resume and output is not None and not starts:
        path = newest_checkpoint(output)
    if path is None:
        return None, None
    log(f"{'evaluating' if args.eval else 'resuming from'} {path}")
    _same_everywhere(path)
    return read(path), path


def _same_everywhere(path: str | Path) -> None:
    """Refuse a checkpoint that is another file, or none, for some of the processes."""
    if not dist.is_initialized() or "://" in str(path):
        return
    digests = gather(sha256_of(Path(path)) if Path(path).is_file() else None)
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise ConfigError(
            f"{path}: process {different[0]} sees another file than process 0, or none; the folder must be shared by "
            "all machines"
        )


def newest_checkpoint(folder: Path) -> Path | None:
    """The good checkpoint of a folder that has come farthest, or None where there is none at all.

    What counts is the position that a checkpoint holds, not its name, its time or that of another file. Bad ones and
    those of another run are logged and skipped. All processes get the same answer.

    Raises:
        ConfigError: there are checkpoints, and none is good. Starting again from epoch 0 would lose the run.
    """

    def choose() -> Path | None:
        return newest(_by_position(folder), folder, "another --output_dir or with --auto_resume false")

    return _on_first_process(choose)


def _on_first_process(choose: Callable[[], Any]) -> Any:
    """What a function returns or raises on the first process, on all of them."""
    answer, reason = None, None
    if is_main_process():
        try:
            answer = choose()
        except ConfigError as error:
            reason = str(error)
    answer, reason = share((answer, reason))
    if reason:
        raise ConfigError(reason)
    return answer


def newest(candidates: Iterable[Path], folder: str | Path, instead: str) -> Path | None:
    """The first good one of some checkpoints, or None where there are none; logs those that are bad.

    Args:
        candidates: paths, the preferred one first.
        folder: their folder, for the error message.
        instead: how to start a new run, for the error message.

    Raises:
        ConfigError: there are checkpoints, and none is good.
    """
    candidates = list(candidates)
    for path in candidates:
        try:
            read(path)
        except ConfigError as error:
            log(f"passing over a bad checkpoint: {error}")
            continue
        return path
    if candidates:
        raise ConfigError(
            f"{folder}: none of its {len(candidates)} checkpoints can be read; restore one, or start anew with "
            f"{instead}"
        )
    return None


def _by_position(folder: Path) -> list[Path]:
    """The checkpoints of a folder: bad ones, then the one that has come farthest, last those that tell no position."""
    manifest = Manifest(folder)
    if manifest.damaged:
        log(f"note: {manifest.path} is damaged: the files are verified by their own checksums alone")
    known: list[tuple[Position, Position, Path]] = []
    unknown: list[Path] = []
    bad: list[Path] = []
    for by_name, path in named(folder):
        entry = manifest.files.get(path.name)
        position = listed(entry) if entry is not None else None
        if position is None:
            # the process died before it was listed, or an earlier version of this project wrote it
            content = content_of(path)
            if content is None:
                bad.append(path)
                continue
            own = content.get("run")
            if own is not None and manifest.run is not None and own != manifest.run:
                log(f"passing over {path}: it is of another run than {MANIFEST} beside it")
                continue
            position = position_of(content)
        if position is None:
            unknown.append(path)
        else:
            known.append((position, by_name, path))
    best = [folder / BEST] if (folder / BEST).is_file() else []
    return bad[::-1] + [path for *_, path in sorted(known, reverse=True)] + unknown[::-1] + best


def numbered_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(epoch, path) of the checkpoints of whole epochs, oldest first, by name. The epoch is a number: 10 is after 9."""
    return [(int(epoch), path) for (epoch, update), path in named(folder) if update == math.inf]


def named(folder: Path) -> list[tuple[Position, Path]]:
    """(position, path) of all checkpoints but the best ones, by name, oldest first."""
    found = []
    for path in folder.glob("checkpoint-*.pth"):
        match = re.fullmatch(r"checkpoint-(\d{1,18})(?:-(\d{1,18}))?\.pth", path.name)
        if match:
            found.append(((int(match[1]), int(match[2]) if match[2] else math.inf), path))
    return sorted(found)


def listed(entry: dict[str, Any]) -> Position:
    return entry["epoch"], math.inf if entry["update"] is None else entry["update"]


def content_of(path: Path) -> dict[str, Any] | None:
    """The content of a checkpoint; None if it is bad."""
    with contextlib.suppress(ConfigError):
        return read(path)
    return None
