"""Checkpoints: written so that a crash never leaves a damaged one, read without running code, restored in full.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts: `model`, `model_ema`, `optimizer`, `scaler`,
`epoch`, `temperature`, `best` (accuracies), `rng` (of every process), `args`, `versions`, `world_size`, `format`.
"""

import math
import os
import random
import re
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from models import load_weights, set_temperature, temperature_range, warehouse_layers
from models.config import ConfigError
from models.reader import read_checkpoint
from models.weights import matched_state, state_dict_of
from utils import Process, gather, is_main_process, log, set_seed

FORMAT = 1


def write_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint so that `path` holds either the old file or the whole new one, whenever the process dies.

    Args:
        path: file to write.
        state: tensors, numbers, strings, and lists, tuples and dicts of them.

    Raises:
        OSError, RuntimeError: nothing was replaced, for example because the disk is full.
    """
    replace_checkpoint(path, lambda file: torch.save(state, file))


def replace_checkpoint(path: Path, write) -> None:
    """`write_checkpoint` of what `write` writes to the file that it is given."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # torch reads a damaged file without a word; the container's checksums tell
        with zipfile.ZipFile(temporary) as archive:
            if archive.testzip() is not None:
                raise OSError("it does not read back as written")
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict) -> bool:
    """`write_checkpoint` on the first process; a failure is a warning, and the run goes on."""
    if not is_main_process():
        return True
    try:
        write_checkpoint(path, state)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0]
        print(f"warning: {path} was not saved ({reason}); older checkpoints are intact", file=sys.stderr, flush=True)
        return False
    return True


def numbered_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(epoch, path) of the checkpoints of a folder, oldest first. The epoch counts as a number: 10 comes after 9."""
    found = ((re.fullmatch(r"checkpoint-(\d+)\.pth", path.name), path) for path in folder.glob("checkpoint-*.pth"))
    return sorted((int(match[1]), path) for match, path in found if match)


def prune_checkpoints(folder: Path, epoch: int, keep: int) -> None:
    """Delete all but the last `keep` checkpoints up to `epoch`. Call it only after that of `epoch` was verified."""
    if is_main_process():
        for _, path in [entry for entry in numbered_checkpoints(folder) if entry[0] <= epoch][:-keep]:
            path.unlink(missing_ok=True)


def remove_stale_files(folder: Path) -> None:
    """Remove what a killed process was writing."""
    for path in folder.glob(".checkpoint*.tmp"):
        path.unlink(missing_ok=True)


def set_aside(folder: Path, start_epoch: int, fresh: bool) -> None:
    """Move what a run that starts at `start_epoch` does not go on from into a folder beside its own checkpoints.

    Otherwise a longer run that was there before would outrank this one's checkpoints at the next start.

    Args:
        fresh: the run goes on from none of them.
    """
    if not is_main_process():
        return
    old = [path for epoch, path in numbered_checkpoints(folder) if fresh or epoch >= start_epoch]
    for best in (folder / "checkpoint-best.pth", folder / "checkpoint-best-ema.pth"):
        if best.is_file() and (fresh or (old and _epoch_of(best) >= start_epoch)):
            old.append(best)
    if old:
        aside = folder / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}"
        aside.mkdir(exist_ok=True)
        for path in old:
            path.rename(aside / path.name)
        log(f"{len(old)} checkpoints of an earlier run, which this one does not go on from, were moved to {aside}")


def _epoch_of(path: Path) -> float:
    """The epoch of a checkpoint; one that cannot be read counts as the last."""
    try:
        return read(path).get("epoch", math.inf)
    except ConfigError:
        return math.inf


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest good checkpoint of a folder, or None where there is none at all. All processes get the same answer.

    A bad one is named and passed over for the one before it.

    Raises:
        ConfigError: there are checkpoints, and none is good. Starting again from epoch 0 would lose the run.
    """
    answer = [None, None]
    if is_main_process():
        best = folder / "checkpoint-best.pth"
        candidates = [path for _, path in reversed(numbered_checkpoints(folder))] + ([best] if best.is_file() else [])
        try:
            answer[0] = newest(candidates, folder, "another --output_dir or with --auto_resume false")
        except ConfigError as error:
            answer[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(answer, 0)
    if answer[1]:
        raise ConfigError(answer[1])
    return answer[0]


def newest(candidates: list[Path], folder: str | Path, instead: str) -> Path | None:
    """The first good one of the checkpoints of a folder, None where there are none; says which are bad.

    Raises:
        ConfigError: none is good; `instead` is how to start anew.
    """
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


def read(path: str | Path) -> dict:
    """Read a checkpoint from a path or URL, with its checksums verified. It never runs code.

    Raises:
        ConfigError: damaged, not a checkpoint, or not to be had.
    """
    try:
        content = read_checkpoint(path)
    except Exception as error:
        # a damaged file makes its readers raise anything
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(text if str(path) in text else f"{path}: {text}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    return content


def find(args, output: Path | None) -> tuple[dict | None, str | Path | None]:
    """The checkpoint of --resume, else the newest good one of the output folder, else None; and its path."""
    path = args.resume or None
    if path is None and args.auto_resume and output is not None and not (args.eval and args.finetune):
        path = newest_checkpoint(output)
    if path is None:
        return None, None
    log(f"{'evaluating' if args.eval else 'resuming from'} {path}")
    return read(path), path


def load(model: torch.nn.Module, checkpoint: dict, path: str | Path) -> None:
    """Load the weights of a checkpoint, and the temperature that they were saved at (where none was, the last one).

    Raises:
        ConfigError: of another model; lists the first keys that differ.
    """
    try:
        load_weights(model, checkpoint)
        set_temperature(model, checkpoint.get("temperature", temperature_range(model)[1]))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def finetune(model: torch.nn.Module, args) -> None:
    """Load the weights of --finetune. The classifier keeps its initial weights where its size differs.

    Raises:
        ConfigError: of another model.
    """
    path, prefix = args.finetune, args.model_prefix
    checkpoint = read(path)
    try:
        state = state_dict_of(checkpoint, args.model_key)
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        state, missing, unexpected, wrong = matched_state(model, state)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    head = _classifier_keys(model)
    if any(key.startswith(head) for key in wrong):
        state = {key: value for key, value in state.items() if not key.startswith(head)}
        log(f"{path}: its classifier has another size and is left out")
        missing, unexpected, wrong = (
            [key for key in keys if not key.startswith(head)] for keys in (missing, unexpected, wrong)
        )
    differing = missing + unexpected + wrong
    if differing:
        raise ConfigError(f"{path}: of another model; the first keys that differ: {', '.join(differing[:5])}")
    model.load_state_dict(state, strict=False)


def _classifier_keys(model: torch.nn.Module) -> tuple[str, ...]:
    """Prefixes of the keys of the classifier, with the warehouses that it alone uses."""
    names = model.pretrained_cfg.get("classifier") or ()
    names = {names} if isinstance(names, str) else set(names)
    warehouses = [name for name, layers in warehouse_layers(model).items() if layers and names.issuperset(layers)]
    return (*(f"{name}." for name in names), *warehouses)


def training_state(model, ema, optimizer, scaler, epoch, best, temperature, args, process) -> dict:
    """All that a resumed run needs, in plain types. Every process must call it."""
    return {
        "format": FORMAT,
        "model": model.state_dict(),
        "model_ema": ema.module.state_dict() if ema is not None else None,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": epoch,
        "temperature": temperature,
        "best": dict(best),
        "rng": gather(rng_state(process.device)),
        "args": dict(vars(args)),
        "versions": {"torch": str(torch.__version__)},
        "world_size": process.world,
    }


def ema_state(state: dict) -> dict:
    """The EMA weights of a training state as a checkpoint of their own, to evaluate and to fine-tune."""
    kept = ("format", "epoch", "temperature", "best", "args", "versions")
    return {"model": state["model_ema"], **{name: state[name] for name in kept}}


def restore(checkpoint: dict, path, model, ema, optimizer, scaler, args, process: Process) -> tuple[int, dict]:
    """Put a run back to where `checkpoint` was saved.

    Returns:
        The epoch to start with, and the best accuracies so far.

    Raises:
        ConfigError: the checkpoint is of another model, or of another optimizer.
    """
    load(model, checkpoint, path)
    if ema is not None:
        load(ema.module, {**checkpoint, "model": checkpoint.get("model_ema") or state_dict_of(checkpoint)}, path)
    if "optimizer" not in checkpoint or "rng" not in checkpoint:
        log(f"{path} holds weights only: the optimizer and the schedules start at epoch {args.start_epoch}")
        return args.start_epoch, {"acc1": None, "acc1_ema": None}
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if scaler.is_enabled() and checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        saved_by = len(checkpoint["rng"])
        if saved_by == process.world:
            set_rng_state(checkpoint["rng"][process.rank], process.device)
        else:
            log(f"note: saved by {saved_by} processes and continued by {process.world}, with other random numbers")
            set_seed(args.seed + process.rank + process.world * (checkpoint["epoch"] + 1))
        return checkpoint["epoch"] + 1, dict(checkpoint["best"])
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: its optimizer or state does not fit ({reason}); use that run's options") from None


def rng_state(device: torch.device) -> dict:
    """State of every random generator of this process, in types that load without running code."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def set_rng_state(state: dict, device: torch.device) -> None:
    """Inverse of `rng_state`."""
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
