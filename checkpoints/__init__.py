"""Checkpoints: a crash never leaves a damaged one, reading one never runs code, and a run is restored in full.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts:

- `model`, `model_ema`: state dicts; `optimizer`, `scaler`, `temperature`: as after the last update;
- `epoch`: the epoch that is done, or in progress; `progress`: None, or what of it is done;
- `best`, `best_epoch`: the best accuracies so far, and their epochs; `rng`: the random generators of every process;
- `args`: all options; `images_per_update`: how an update was divided; `world_size`, `versions`, `run`, `format`.
"""

from .choice import find, newest, newest_checkpoint, numbered_checkpoints
from .comparison import compare
from .files import (
    FORMAT,
    copy_checkpoint,
    read,
    replace_checkpoint,
    weights_path,
    write_checkpoint,
    write_safetensors,
    write_weights,
)
from .folder import RunFolder, file_name, remove_stale_files
from .manifest import Manifest
from .settings import adopt, check_classes, check_size, model_settings, own_options
from .state import EpochProgress, Live, Resumed, position_of, restore, rng_state, set_rng_state, training_state
from .weights import averaged, ema_state, finetune, load, weights_of

__all__ = [
    "FORMAT",
    "EpochProgress",
    "Live",
    "Manifest",
    "Resumed",
    "RunFolder",
    "adopt",
    "averaged",
    "check_classes",
    "check_size",
    "compare",
    "copy_checkpoint",
    "ema_state",
    "file_name",
    "find",
    "finetune",
    "load",
    "model_settings",
    "newest",
    "newest_checkpoint",
    "numbered_checkpoints",
    "own_options",
    "position_of",
    "read",
    "remove_stale_files",
    "replace_checkpoint",
    "restore",
    "rng_state",
    "set_rng_state",
    "training_state",
    "weights_of",
    "weights_path",
    "write_checkpoint",
    "write_safetensors",
    "write_weights",
]
