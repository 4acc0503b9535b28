"""Checkpoints of detectors: read without running code, written so that a crash never leaves a damaged one."""

import re
from pathlib import Path

import numpy as np
from mmdet.registry import HOOKS
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.runner.checkpoint import CheckpointLoader

from checkpoints import newest, read, replace_checkpoint
from models.config import ConfigError


class AtomicBackend(LocalBackend):
    """Local files; a file that is written replaces the old one only when it is whole and reads back."""

    def put(self, obj, filepath):
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_checkpoint(path, lambda file: file.write(obj))


register_backend("atomic", AtomicBackend, force=True)


def _read(filename, map_location=None):
    return read(filename)


def _refuse(filename, map_location=None):
    raise ConfigError(f"{filename}: fetch the file and give its path; files of this kind could run code")


# mmengine's own loaders unpickle whatever they get
CheckpointLoader.register_scheme(["", "http://", "https://"], loader=_read, force=True)
CheckpointLoader.register_scheme([p for p in CheckpointLoader._schemes if p not in ("", "http://", "https://")],
                                 loader=_refuse, force=True)  # fmt: skip


def plain(value):
    """A value with its arrays, numbers of NumPy and buffers as lists, numbers and dicts; anything else as text."""
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
    """mmengine's hook, with files that torch reads back as plain data, that are whole, and of which two are left.

    Arguments are those of `CheckpointHook`; max_keep_ckpts is at least 2, or -1 for all.
    """

    def __init__(self, *args, max_keep_ckpts=3, backend_args=None, **kwargs):
        if 0 <= max_keep_ckpts < 2:
            raise ConfigError(
                f"max_keep_ckpts {max_keep_ckpts}: a crash could leave none; use 2 or more, or -1 for all"
            )
        backend_args = {"backend": "atomic"} if backend_args is None else backend_args
        super().__init__(*args, max_keep_ckpts=max_keep_ckpts, backend_args=backend_args, **kwargs)

    def before_save_checkpoint(self, runner, checkpoint):
        for key in ("meta", "message_hub"):
            checkpoint[key] = plain(checkpoint.get(key, {}))

    def after_load_checkpoint(self, runner, checkpoint):
        self.require_detector(runner.model.module if is_model_wrapper(runner.model) else runner.model, checkpoint)
        scalars = checkpoint.get("message_hub", {}).get("log_scalars", {})
        for key, value in scalars.items():
            scalars[key] = HistoryBuffer(value["history"], value["counts"], value["max_length"])

    @staticmethod
    def require_detector(model, checkpoint):
        """Raise ConfigError unless a checkpoint is this detector's, whole: mmengine would load what fits and go on."""
        if not isinstance(checkpoint.get("meta"), dict) or not isinstance(checkpoint.get("state_dict"), dict):
            raise ConfigError(
                f"the checkpoint holds {', '.join(map(str, list(checkpoint)[:5]))} and not what a detector saves; give "
                "a classification checkpoint by --cfg-options model.backbone.init_cfg.checkpoint=PATH"
            )
        if "config" in checkpoint["meta"]:
            # mmengine evaluates this text as Python
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


def newest_detector(folder):
    """The newest good checkpoint of a work directory, or None where there is none at all.

    Raises ConfigError where there are checkpoints and none is good.
    """
    found = ((re.fullmatch(r"(?:epoch|iter)_(\d+)\.pth", path.name), path) for path in Path(folder).glob("*.pth"))
    numbered = sorted((int(match[1]), path) for match, path in found if match)
    return newest([path for _, path in reversed(numbered)], folder, "another --work-dir")
