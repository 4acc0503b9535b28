"""Checkpoints of detectors: reading one never runs code, and a crash while writing never leaves a damaged one."""

import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from checkpoints import newest, read, replace_checkpoint
from models.config import ConfigError


class AtomicBackend(LocalBackend):
    """Local files; a new file replaces the old one only after it was written whole and read back."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_checkpoint(path, lambda file: file.write(obj))


register_backend("atomic", AtomicBackend, force=True)


def _read(filename: str, map_location: Any = None) -> dict[str, Any]:
    return read(filename)


def _refuse(filename: str, map_location: Any = None) -> NoReturn:
    raise ConfigError(f"{filename}: fetch the file and give its path; files of this kind could run code")


# mmengine's own loaders unpickle any file, which can run code
CheckpointLoader.register_scheme(["", "http://", "https://"], loader=_read, force=True)
CheckpointLoader.register_scheme([p for p in CheckpointLoader._schemes if p not in ("", "http://", "https://")],
                                 loader=_refuse, force=True)  # fmt: skip


def plain(value: Any) -> Any:
    """Convert a value to plain data, which torch reads back without running code.

    NumPy's arrays and numbers and mmengine's history buffers become lists, numbers and dicts, other objects text.
    """
    if isinstance(value, HistoryBuffer):
        history, counts = value.data
        return {"history": history.tolist(), "counts": counts.tolist(), "max_length": value.max_length}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's `CheckpointHook`, with files of plain data that a crash never damages, and at least two of them.

    Args:
        args, kwargs: other arguments of `CheckpointHook`.
        max_keep_ckpts: number of checkpoints to keep, at least 2; -1 keeps all.
        backend_args: where files are written; None: by `AtomicBackend`.

    Raises:
        ConfigError: `max_keep_ckpts` is 0 or 1.
    """

    def __init__(
        self, *args: Any, max_keep_ckpts: int = 3, backend_args: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if 0 <= max_keep_ckpts < 2:
            raise ConfigError(
                f"max_keep_ckpts {max_keep_ckpts}: a crash could leave none; use 2 or more, or -1 for all"
            )
        backend_args = {"backend": "atomic"} if backend_args is None else backend_args
        super().__init__(*args, max_keep_ckpts=max_keep_ckpts, backend_args=backend_args, **kwargs)

    def before_train(self, runner: Runner) -> None:
        """Find out where checkpoints are written, and remove what killed processes left half-written there."""
        super().before_train(runner)
        if is_main_process():
            remove_stale_files(self.out_dir)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        """Save a checkpoint, and only then remove one that is too many; mmengine itself does it the other way round."""
        keep, outdated = self.max_keep_ckpts, []
        if keep > 0 and step not in self.keep_ckpt_ids:
            steps = [*self.keep_ckpt_ids, step]
            outdated = steps[:-keep]
            # a deque of at most this many
            self.keep_ckpt_ids.append(step)
            # all of them are saved: a run that goes on from here removes what this one could not
            runner.message_hub.update_info("keep_ckpt_ids", steps)
        try:
            self.max_keep_ckpts = -1
            super()._save_checkpoint_with_step(runner, step, meta)
        finally:
            self.max_keep_ckpts = keep
        for old in outdated if is_main_process() else ():
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Convert the entries that mmengine would pickle to plain data."""
        for key in ("meta", "message_hub"):
            checkpoint[key] = plain(checkpoint.get(key, {}))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and restore the history buffers that `plain` converted."""
        self.require_detector(runner.model.module if is_model_wrapper(runner.model) else runner.model, checkpoint)
        scalars = checkpoint.get("message_hub", {}).get("log_scalars", {})
        for key, value in scalars.items():
            scalars[key] = HistoryBuffer(value["history"], value["counts"], value["max_length"])

    @staticmethod
    def require_detector(model: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that is not a complete one of this detector.

        mmengine would load the entries that fit, and continue without the others.

        Raises:
            ConfigError: the checkpoint is of a classifier or of another detector, or carries code.
        """
        if not isinstance(checkpoint.get("meta"), dict) or not isinstance(checkpoint.get("state_dict"), dict):
            raise ConfigError(
                f"the checkpoint holds {', '.join(map(str, list(checkpoint)[:5]))} and not what a detector saves; give "
                "a classification checkpoint by --cfg-options model.backbone.init_cfg.checkpoint=PATH"
            )
        if "config" in checkpoint["meta"]:
            # mmengine runs this text as Python code
            raise ConfigError(
                "the checkpoint carries code in meta['config']; remove that entry if you trust where it comes from"
            )
        own = {key: value.shape for key, value in model.state_dict().items()}
        state = {key.removeprefix("module."): value.shape for key, value in checkpoint["state_dict"].items()}
        differ = sorted(key for key in own.keys() | state.keys() if own.get(key) != state.get(key))
        if differ:
            raise ConfigError(
                f"the checkpoint is of another model: {len(differ)} of {len(own)} entries differ "
                f"({', '.join(differ[:3])}{', ...' if len(differ) > 3 else ''}); use the config that made it"
            )


def remove_stale_files(folder: str | Path) -> None:
    """Remove the temporary files of checkpoints, which a process that is killed while it writes leaves behind."""
    for path in Path(folder).glob(".*.tmp"):
        if re.fullmatch(r"\.(epoch|iter|best)_.*\.pth\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def newest_detector(folder: str | Path) -> Path | None:
    """The newest good checkpoint of a work directory, or None where there is none at all.

    What mmengine notes in `last_checkpoint` does not count: after a crash it may be empty, or name a missing file.

    Raises:
        ConfigError: there are checkpoints, and none is good.
    """
    found = ((re.fullmatch(r"(?:epoch|iter)_(\d+)\.pth", path.name), path) for path in Path(folder).glob("*.pth"))
    numbered = sorted((int(match[1]), path) for match, path in found if match)
    return newest([path for _, path in reversed(numbered)], folder, "another --work-dir")
