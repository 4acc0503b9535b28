"""The state of a run: everything that the resumed run needs to equal the unbroken one."""

import argparse
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.config import ConfigError
from models.weights import state_dict_of
from utils import Process, gather, gather_to_first, log, set_seed

from .files import FORMAT, is_number
from .weights import load

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

NAMES = ("acc1", "acc1_ema")


@dataclass
class EpochProgress:
    """What this process has done of an epoch.

    Attributes:
        epoch: counted from 0 over the whole run.
        update: updates that are done.
        samples: images of the epoch that all processes together have used up.
        sums: of the loss, of correct images and of images, float64 [3].
        skipped: updates that were left out since their loss or gradient was not finite.
        unreadable: training images that this process could not read.
        last: metrics of the last update.
    """

    epoch: int = 0
    update: int = 0
    samples: int = 0
    sums: torch.Tensor | None = None
    skipped: int = 0
    unreadable: int = 0
    last: dict[str, float] = field(default_factory=dict)


@dataclass
class Live:
    """The objects of a run whose state is saved.

    Attributes:
        run: identity of the run.
        images: number of training images.
        images_per_update: "images" of an update, and their "target" (`elastic.divide_update`).
        asked: options as they were asked for, where others are used.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    args: argparse.Namespace
    process: Process
    ema: "ModelEmaV3 | None" = None
    run: str = ""
    images: int = 0
    images_per_update: dict[str, int] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)

    def modules(self) -> list[torch.nn.Module]:
        """The model, and the average of its weights."""
        return [self.model] if self.ema is None else [self.model, self.ema.module]


@dataclass
class Resumed:
    """Where a restored run goes on.

    Attributes:
        epoch: the first epoch to train, or to finish.
        best, best_epoch: "acc1" and "acc1_ema" -> the best accuracy so far, and its epoch; None: there is none.
        progress: what is done of the epoch.
    """

    epoch: int
    best: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(NAMES))
    best_epoch: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(NAMES))
    progress: EpochProgress | None = None


def training_state(
    live: Live,
    epoch: int,
    temperature: float,
    best: dict[str, float | None],
    best_epoch: dict[str, int | None],
    progress: EpochProgress | None = None,
) -> dict[str, Any]:
    """Everything that a resumed run needs, in plain types. Every process must call it; the first one's is complete.

    Args:
        live: the objects of the run.
        epoch: the epoch that is done, or in progress.
        temperature: of the dynamic layers.
        best, best_epoch: as in `Resumed`.
        progress: of this process in the epoch; None: the epoch and its evaluation are done.
    """
    return {
        "format": FORMAT,
        "run": live.run,
        "model": live.model.state_dict(),
        "model_ema": live.ema.module.state_dict() if live.ema is not None else None,
        "optimizer": live.optimizer.state_dict(),
        "scaler": live.scaler.state_dict(),
        "epoch": epoch,
        "progress": None if progress is None else _shared_progress(live, progress),
        "temperature": temperature,
        "best": dict(best),
        "best_epoch": dict(best_epoch),
        "rng": gather(rng_state(live.process.device)),
        "args": {**vars(live.args), **live.asked},
        "images_per_update": dict(live.images_per_update),
        "versions": {"torch": str(torch.__version__)},
        "world_size": live.process.world,
    }


def _shared_progress(live: Live, progress: EpochProgress) -> dict[str, Any]:
    """The progress of all processes. Until the end of an epoch each has BatchNorm statistics of its own."""
    buffers = None
    if live.process.rank:
        # the first process's are in its state dicts
        buffers = [buffer.detach().cpu() for module in live.modules() for buffer in module.buffers()]
    own = {
        "sums": progress.sums.cpu(), "unreadable": progress.unreadable, "last": dict(progress.last), "buffers": buffers
    }  # fmt: skip
    return {
        "update": progress.update,
        "samples": progress.samples,
        "images": live.images,
        "skipped": progress.skipped,
        "processes": gather_to_first(own),
    }


def position_of(checkpoint: dict[str, Any] | None) -> tuple[int, float] | None:
    """(epoch, updates of it) that a checkpoint has come to; infinite updates for a whole epoch; None: not known."""
    epoch = None if checkpoint is None else checkpoint.get("epoch")
    if type(epoch) is not int or epoch < 0:
        return None
    progress = checkpoint.get("progress")
    update = progress.get("update") if isinstance(progress, dict) else None
    return epoch, update if type(update) is int else math.inf


def restore(checkpoint: dict[str, Any], path: str | Path, live: Live) -> Resumed:
    """Restore a run to the state in which `checkpoint` was saved.

    A checkpoint of weights alone leaves the optimizer and the random generators unchanged. The options of the optimizer
    are those of this run.

    Raises:
        ConfigError: the checkpoint is of another model, or of another optimizer.
    """
    args = live.args
    load(live.model, checkpoint, path)
    if live.ema is not None:
        if not checkpoint.get("model_ema"):
            log(f"note: {path} holds no averaged weights: the average begins with its weights")
        averages = {**checkpoint, "model": checkpoint.get("model_ema") or state_dict_of(checkpoint)}
        load(live.ema.module, averages, path)
    elif checkpoint.get("model_ema"):
        log(f"note: the averaged weights of {path} are not continued, since --model_ema is false")
    if "optimizer" not in checkpoint or "rng" not in checkpoint:
        log(f"{path} holds weights only: the optimizer and the schedules start at epoch {args.start_epoch}")
        return Resumed(args.start_epoch)
    try:
        resumed = _resumed(checkpoint, live)
        _restore_optimizer(checkpoint["optimizer"], live.optimizer)
        if live.scaler.is_enabled() and checkpoint["scaler"]:
            live.scaler.load_state_dict(checkpoint["scaler"])
        _restore_random(checkpoint, live)
        return resumed
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: its optimizer or state does not fit ({reason}); use that run's options") from None


def _resumed(checkpoint: dict[str, Any], live: Live) -> Resumed:
    """Where a run goes on.

    Raises:
        KeyError, ValueError, TypeError: the checkpoint does not tell, or not in numbers.
    """
    if position_of(checkpoint) is None:
        raise ValueError(f"its epoch is {ascii(checkpoint['epoch'])[:60]}")
    epoch, best = checkpoint["epoch"], checkpoint["best"]
    best_epoch = checkpoint.get("best_epoch") or dict.fromkeys(NAMES)
    values = [best[name] for name in NAMES] if isinstance(best, dict) else [best]
    fits = isinstance(best, dict) and isinstance(best_epoch, dict)
    fits = fits and all(value is None or (is_number(value) and math.isfinite(value)) for value in values)
    if not fits:
        raise ValueError(f"its best accuracies are {ascii(best)[:60]}")
    best, best_epoch = dict(best), {name: best_epoch.get(name) for name in NAMES}
    if checkpoint.get("progress") is None:
        return Resumed(epoch + 1, best, best_epoch)
    return Resumed(epoch, best, best_epoch, _own_progress(checkpoint, live))


def _own_progress(checkpoint: dict[str, Any], live: Live) -> EpochProgress:
    """The part of this process in an epoch in progress; restores the process's own buffers."""
    shared, process = checkpoint["progress"], live.process
    parts = shared["processes"]
    if shared["images"] != live.images:
        raise ValueError(
            f"it was saved within an epoch of {shared['images']} training images, and there are {live.images} now"
        )
    progress = EpochProgress(checkpoint["epoch"], shared["update"], shared["samples"], skipped=shared["skipped"])
    if len(parts) == process.world:
        own = parts[process.rank]
        progress.sums, progress.unreadable, progress.last = own["sums"], own["unreadable"], dict(own["last"])
        _restore_buffers(live, own["buffers"])
    else:
        log("note: the statistics of BatchNorm within this epoch go on from those of the first process")
        progress.last = dict(parts[0]["last"])
        total = torch.stack([part["sums"] for part in parts]).sum(0)
        # the epoch's loss is averaged over the processes
        total[0] *= process.world / len(parts)
        progress.sums = total if process.is_main else torch.zeros_like(total)
        progress.unreadable = sum(part["unreadable"] for part in parts) if process.is_main else 0
    if progress.sums.shape != (3,) or min(progress.update, progress.samples) < 0:
        raise ValueError("its progress in the epoch is of another form")
    return progress


def _restore_buffers(live: Live, saved: list[torch.Tensor] | None) -> None:
    if saved is None:
        return
    buffers = [buffer for module in live.modules() for buffer in module.buffers()]
    if len(buffers) != len(saved):
        raise ValueError(f"it has {len(saved)} buffers of a process, and the model {len(buffers)}")
    with torch.no_grad():
        for buffer, value in zip(buffers, saved):
            buffer.copy_(value)


def _restore_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Load the state of an optimizer, and keep the options that this run gave it.

    What its last update had of the schedule stays until the next one, so that a run that is stopped before saves it.
    """
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    names = [group.get("names") for group in saved["param_groups"]]
    if any(names) and names != [group["names"] for group in groups]:
        raise ValueError(
            "its parameters are grouped in another way: --layer_decay, --decay_norm_and_bias or --decay_layer_scale "
            "differ"
        )
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, groups):
        scheduled = ("lr", "weight_decay") if own["decayed"] else ("lr",)
        group.update({name: value for name, value in own.items() if name not in scheduled or name not in group})


def _restore_random(checkpoint: dict[str, Any], live: Live) -> None:
    saved_by, process = len(checkpoint["rng"]), live.process
    if saved_by == process.world:
        set_rng_state(checkpoint["rng"][process.rank], process.device)
        return
    log(f"note: saved by {saved_by} processes and continued by {process.world}, with other random numbers")
    # in the same epoch again after another change, others again
    set_seed(live.args.seed + process.rank + process.world * (checkpoint["epoch"] + 1))


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of every random generator of this process, in types that load without running code."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `rng_state` returned."""
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
