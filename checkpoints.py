"""Checkpoints: a crash never leaves a damaged one, reading one never runs code, and a run is restored in full.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts: `model`, `model_ema`, `optimizer`, `scaler`,
`epoch`, `temperature`, `best` (accuracies), `rng` (of every process), `args`, `versions`, `world_size`, `format`.
"""

import argparse
import itertools
import math
import random
import re
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from models import build_model, load_weights, set_temperature, temperature_range
from models.config import ConfigError, check_value
from models.options import MODEL_KEYS, all_options
from models.reader import read_checkpoint
from models.safetensors_file import to_safetensors
from models.weights import load_fitting, state_dict_of
from utils import Process, check_target, gather, is_main_process, log, replace_file, set_seed

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

FORMAT = 1
# options of a machine, which a checkpoint of another one does not decide
LOCAL = {"data_path", "eval_data_path", "device", "num_workers", "pin_mem", "nb_classes"}
# options that choose how an evaluation resizes and crops its images
CROPS = {"crop_pct", "traditional_preprocess"}
# parameters that a network may have beyond twice those of its checkpoint's weights, before its settings are refused
SPARE = 10_000_000


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; whenever the process dies, `path` holds either the old file or the whole new one.

    Args:
        path: file to write.
        state: tensors, numbers, strings, and lists, tuples and dicts of them.

    Raises:
        OSError, RuntimeError: writing failed, for example because the disk is full; the old file is intact.
    """
    replace_checkpoint(path, lambda file: torch.save(state, file))


def replace_checkpoint(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Like `write_checkpoint`, but `write` is called with an open file and writes the content into it."""
    replace_file(path, write, _verify_checksums)


def _verify_checksums(path: Path) -> None:
    # torch reads a damaged file without an error; only the checksums of the zip container reveal the damage
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise OSError("it does not read back as written")


def write_safetensors(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file, which `read` reads as the checkpoint {**metadata, "model": state}, as safely.

    Args:
        path: file to write.
        state: state dict of a model.
        metadata: the other entries of the checkpoint, such as `args` and `temperature`: numbers, texts, lists, dicts.

    Raises:
        OSError: writing failed; the old file is intact.
        ValueError: an entry of the state dict is no tensor, or the metadata do not fit into JSON.
    """
    content = to_safetensors(state, metadata)
    replace_file(path, lambda file: file.write(content))


def weights_path(path: str | Path) -> Path:
    """The path of a file of weights to write, checked before anything slow is done.

    Raises:
        ConfigError: it has a suffix that `write_weights` does not know, or cannot be written.
    """
    if Path(path).suffix not in (".pth", ".safetensors"):
        raise ConfigError(f"{path}: weights are written to .pth or .safetensors; give a name that ends so")
    return check_target(path)


def write_weights(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint of weights in the format of the file's suffix, .pth or .safetensors.

    Raises:
        ConfigError: it cannot be written; an older file is intact.
    """
    try:
        if path.suffix == ".safetensors":
            rest = {name: value for name, value in checkpoint.items() if name != "model"}
            write_safetensors(path, checkpoint["model"], rest)
        else:
            write_checkpoint(path, checkpoint)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from None


def save_checkpoint(path: Path, state: dict[str, Any]) -> bool:
    """`write_checkpoint` on the first process; a failure prints a warning and returns False, and the run continues."""
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
    """Delete all but the last `keep` checkpoints up to `epoch`.

    Call it only after the checkpoint of `epoch` was written and verified.
    """
    if is_main_process():
        for _, path in [entry for entry in numbered_checkpoints(folder) if entry[0] <= epoch][:-keep]:
            path.unlink(missing_ok=True)


def remove_stale_files(folder: Path) -> None:
    """Remove the temporary files that killed processes left behind."""
    for path in folder.glob(".checkpoint*.tmp"):
        path.unlink(missing_ok=True)


def set_aside(folder: Path, start_epoch: int, fresh: bool) -> None:
    """Move the checkpoints of an earlier run that this run does not continue into a subfolder.

    Otherwise the next start would continue from the earlier run, where that has more epochs than this one.

    Args:
        folder: folder of the checkpoints of both runs.
        start_epoch: first epoch of this run; checkpoints from it on are moved.
        fresh: this run continues from no checkpoint; all are moved.
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
        log(f"{len(old)} checkpoints of an earlier run, which this one does not continue, were moved to {aside}")


def _epoch_of(path: Path) -> float:
    """The epoch of a checkpoint; one that cannot be read counts as the last."""
    try:
        return _progress_of(read(path))[0]
    except (ConfigError, KeyError, ValueError):
        return math.inf


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest good checkpoint of a folder, or None where there is none at all. All processes get the same answer.

    Bad checkpoints are logged and skipped.

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
    """The first good one of some checkpoints, or None where there are none; logs those that are bad.

    Args:
        candidates: paths, the preferred one first.
        folder: their folder, for the error message.
        instead: how to start a new run, for the error message.

    Raises:
        ConfigError: there are checkpoints, and none is good.
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


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint from a path or URL, with its checksums and entries verified. It never runs code.

    Raises:
        ConfigError: the file is damaged, is not a checkpoint, or cannot be fetched; an entry is of a wrong type.
    """
    try:
        content = read_checkpoint(path)
    except Exception as error:
        # on a damaged file, its readers raise exceptions of any type
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(text if str(path) in text else f"{path}: {text}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    _check_entries(content, path)
    return content


def _check_entries(checkpoint: dict[Any, Any], path: str | Path) -> None:
    """Check the entries that are used without a further check.

    Raises:
        ConfigError: names the first entry that is not of its type.
    """
    if all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        # a bare state dict, which may have a weight of any name
        return
    own = own_options(checkpoint)
    temperature, averages = checkpoint.get("temperature"), checkpoint.get("model_ema")
    classes, given, count = own.get("classes"), own.get("given", []), own.get("nb_classes")
    for name, value, kind, fits in (
        ("temperature", temperature, "a number", temperature is None or _is_number(temperature)),
        ("model_ema", averages, "a state dict", averages is None or isinstance(averages, dict)),
        ('args["classes"]', classes, "a list of names", classes is None or _is_texts(classes)),
        ('args["given"]', given, "a list of options", _is_texts(given)),
        ('args["nb_classes"]', count, "an integer above 0", count is None or (type(count) is int and count > 0)),
    ):
        if not fits:
            raise ConfigError(
                f"{path}: its entry {name} must be {kind}, got {ascii(value)[:60]}; use another copy, or save its "
                "state dict alone and give --kw_config"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)


def find(args: argparse.Namespace, output: Path | None) -> tuple[dict[str, Any] | None, str | Path | None]:
    """The checkpoint to resume or to evaluate, and its path; (None, None) where there is none.

    It is that of --resume, else the newest good one of the output folder.
    """
    path = args.resume or None
    starts = args.eval and (args.finetune or args.init_static)
    if path is None and args.auto_resume and output is not None and not starts:
        path = newest_checkpoint(output)
    if path is None:
        return None, None
    log(f"{'evaluating' if args.eval else 'resuming from'} {path}")
    return read(path), path


def adopt(args: argparse.Namespace, given: dict[str, Any], checkpoint: dict[str, Any], path: str) -> None:
    """Take the options of a run from its checkpoint, since nothing else names a model.

    Args:
        args: all options; those that are neither given nor a matter of the machine become the checkpoint's. For an
            evaluation, `trained_on` is added, the data set whose preprocessing counts, with `trained_classes`, the
            number of classes, and the precision stays.
        given: options that the command line, the config or the recipe gave; extended.
        checkpoint: content of the checkpoint.
        path: its path, for the error message.

    Raises:
        ConfigError: the checkpoint does not hold the options of its run, or they are of a network far larger than its
            weights.
    """
    own = own_options(checkpoint)
    if "model" not in own:
        raise ConfigError(f"{path}: this checkpoint does not tell its model; give --kw_config or --model")
    if args.eval and "data_set" in own and not CROPS & given.keys():
        args.trained_on = check_value(all_options()["data_set"], own["data_set"], f'{path}: its option "data_set"')
    skipped = LOCAL | ({"use_amp"} if args.eval else set())
    for name, option in all_options().items():
        if option.group in ("run", "checkpoints", "processes") or name in skipped or name in given or name not in own:
            continue
        # a setting that was not given is the method's choice; earlier checkpoints do not tell which were given
        if name in own["given"] if "given" in own else own[name] != option.default:
            given[name] = check_value(option, own[name], f'{path}: its option "{name}"')
            setattr(args, name, given[name])
    if "nb_classes" not in given and "nb_classes" in own:
        # for data that do not tell their number of classes; others decide it themselves
        args.nb_classes = check_value(all_options()["nb_classes"], own["nb_classes"], f"{path}: its number of classes")
        if args.eval:
            args.trained_classes = args.nb_classes
    args.given = sorted(given)


def model_settings(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """The config of a run's model, for `build_model`: its name, and those of its settings that were given."""
    return {name: value for name, value in given.items() if name in MODEL_KEYS} | {"model": args.model}


def check_size(settings: dict[str, Any], nb_classes: int, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Refuse a network far larger than the weights of its checkpoint, before it takes all memory.

    Raises:
        ConfigError: names the numbers of parameters; or the settings or the weights are wrong.
    """
    try:
        held = sum(value.numel() for value in state_dict_of(checkpoint).values())
        # shapes alone take no memory
        with torch.device("meta"):
            model = build_model(settings, num_classes=nb_classes)
        wanted = sum(parameter.numel() for parameter in model.parameters())
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (RuntimeError, OverflowError):
        # sizes beyond 64 bits
        held, wanted = 0, math.inf
    if wanted > 2 * held + SPARE:
        raise ConfigError(
            f"{path}: its options are of a network of {wanted:,} parameters, and its weights have {held:,}; use "
            "another copy, or give the --kw_config that it was trained with"
        )


def check_classes(checkpoint: dict[str, Any], path: str | Path, classes: list[str] | None) -> None:
    """Compare the names of the classes of the data with those of a checkpoint; nothing where either are not known.

    Raises:
        ConfigError: names the first difference.
    """
    own = own_options(checkpoint).get("classes")
    if not own or not classes or list(own) == classes:
        return
    pairs = enumerate(itertools.zip_longest(own, classes))
    index, (theirs, ours) = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
    theirs, ours = ("missing" if name is None else repr(name[:60]) for name in (theirs, ours))
    raise ConfigError(
        f"{path}: it was trained on {len(own)} classes and the data have {len(classes)} others: class {index} is "
        f"{theirs} in the checkpoint and {ours} in the data; give data whose folders of classes have the names of the "
        "training data, or take the weights over to other classes with --finetune"
    )


def averaged(checkpoint: dict[str, Any] | None, path: str | Path | None, asked: bool) -> dict[str, Any] | None:
    """The checkpoint with its averaged weights in the place of its weights; None, which is logged, where it has none.

    Raises:
        ConfigError: it has none, and they were asked for.
    """
    if checkpoint is not None and checkpoint.get("model_ema"):
        return {**checkpoint, "model": checkpoint["model_ema"]}
    reason = "no checkpoint is evaluated" if checkpoint is None else f"{path}: {_without_average(checkpoint)}"
    if asked:
        raise ConfigError(f"{reason}; leave out --model_ema_eval")
    log(f"note: no averaged weights are evaluated, since {reason}")
    return None


def _without_average(checkpoint: dict[str, Any]) -> str:
    """Why a checkpoint has no averaged weights beside its own."""
    if "best" in checkpoint and "model_ema" not in checkpoint:
        # of `ema_state`
        return "its weights already are the averaged ones"
    return "holds no averaged weights, which a run keeps with --model_ema true"


def own_options(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint's run; empty for one of another project, whose options are not this project's."""
    own = checkpoint.get("args")
    return own if isinstance(own, dict) else {}


def load(model: torch.nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Load the weights of a checkpoint and its temperature; one without a temperature gets the last of the schedule.

    Args:
        model: the model to load into.
        checkpoint: content of the checkpoint.
        path: its path, for the error message.

    Raises:
        ConfigError: the checkpoint is of another model; lists the first keys that differ.
    """
    temperature = checkpoint.get("temperature")
    try:
        load_weights(model, checkpoint)
        set_temperature(model, temperature_range(model)[1] if temperature is None else temperature)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def finetune(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Load the weights of --finetune. The classifier keeps its initial weights where its size differs.

    Raises:
        ConfigError: the checkpoint is of another model; lists the first keys that differ.
    """
    path, prefix = args.finetune, args.model_prefix
    checkpoint = read(path)
    try:
        state = state_dict_of(checkpoint, args.model_key)
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        differs = load_fitting(model, state, path)
    except ValueError as error:
        raise ConfigError(str(error) if path in str(error) else f"{path}: {error}") from None
    if differs:
        log(f"{path}: its classifier has another size and is left out")


def training_state(
    model: torch.nn.Module,
    ema: "ModelEmaV3 | None",
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    epoch: int,
    best: dict[str, float | None],
    temperature: float,
    args: argparse.Namespace,
    process: Process,
) -> dict[str, Any]:
    """Everything that a resumed run needs, in plain types. Every process must call it."""
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


def weights_of(checkpoint: dict[str, Any], path: str | Path, ema: bool = False) -> dict[str, Any]:
    """The part of a checkpoint that its use needs: `format`, `model`, `temperature` and `args`, where it has them.

    Of `args`, the options of a machine (paths, devices, processes) are left out. A checkpoint of another project keeps
    its weights alone.

    Args:
        checkpoint: content of a checkpoint.
        path: its path, for the error message.
        ema: take the averaged weights that a run with --model_ema true kept beside the trained ones.

    Raises:
        ConfigError: it has no such weights, or they hold anything but tensors.
    """
    if ema and not checkpoint.get("model_ema"):
        raise ConfigError(f"{path}: {_without_average(checkpoint)}; leave out --ema")
    try:
        state = state_dict_of({"model": checkpoint["model_ema"]} if ema else checkpoint)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    weights = {"format": FORMAT, "model": state}
    if isinstance(checkpoint.get("temperature"), (int, float)):
        weights["temperature"] = float(checkpoint["temperature"])
    own = own_options(checkpoint)
    kept = {name for name, option in all_options().items() if option.group not in ("run", "checkpoints", "processes")}
    kept = (kept - LOCAL) | {"nb_classes", "classes"}
    if own:
        weights["args"] = {name: value for name, value in own.items() if name in kept}
    if "given" in own:
        weights["args"]["given"] = [name for name in own["given"] if name in kept]
    return weights


def ema_state(state: dict[str, Any]) -> dict[str, Any]:
    """A separate checkpoint of the EMA weights of a training state, to evaluate and to fine-tune."""
    kept = ("format", "epoch", "temperature", "best", "args", "versions")
    return {"model": state["model_ema"], **{name: state[name] for name in kept}}


def restore(
    checkpoint: dict[str, Any],
    path: str | Path,
    model: torch.nn.Module,
    ema: "ModelEmaV3 | None",
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    args: argparse.Namespace,
    process: Process,
) -> tuple[int, dict[str, float | None]]:
    """Restore a run to the state in which `checkpoint` was saved.

    A checkpoint of weights alone leaves the optimizer and the random generators unchanged.

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
        epoch, best = _progress_of(checkpoint)
        optimizer.load_state_dict(checkpoint["optimizer"])
        if scaler.is_enabled() and checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        saved_by = len(checkpoint["rng"])
        if saved_by == process.world:
            set_rng_state(checkpoint["rng"][process.rank], process.device)
        else:
            log(f"note: saved by {saved_by} processes and continued by {process.world}, with other random numbers")
            set_seed(args.seed + process.rank + process.world * (epoch + 1))
        return epoch + 1, best
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: its optimizer or state does not fit ({reason}); use that run's options") from None


def _progress_of(checkpoint: dict[str, Any]) -> tuple[int, dict[str, float | None]]:
    """The epoch of a checkpoint, and the best accuracies up to it.

    Raises:
        KeyError, ValueError: it does not tell them, or not in numbers.
    """
    epoch, best = checkpoint["epoch"], checkpoint["best"]
    if type(epoch) is not int or epoch < 0:
        raise ValueError(f"its epoch is {ascii(epoch)[:60]}")
    values = [best[name] for name in ("acc1", "acc1_ema")] if isinstance(best, dict) else [best]
    if not isinstance(best, dict) or not all(value is None or _is_number(value) for value in values):
        raise ValueError(f"its best accuracies are {ascii(best)[:60]}")
    return epoch, dict(best)


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
