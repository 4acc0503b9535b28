"""The record of a run: what only the run itself knows, in `report.json`, and the page `report.html` made from it."""

import argparse
import base64
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from models.messages import printable
from utils import log, replace_file, shown

FORMAT = 1
NAME = "report.json"
# pictures of attentions are for a screen
DPI = 100


def facts(args: argparse.Namespace, process: Any, images: dict[str, int | None], parameters: int) -> dict[str, Any]:
    """What was run, on what, with which versions: title -> text."""
    import timm
    import torchvision

    device = str(process.device)
    if process.device.type == "cuda":
        device = f"{torch.cuda.get_device_name(process.device)} ({device})"
    versions = {
        "Python": platform.python_version(), "PyTorch": torch.__version__, "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }  # fmt: skip
    batch = args.batch_size * args.update_freq * process.world
    return {
        "command": shlex.join(["python", *sys.argv]),
        "model": args.model,
        "parameters": f"{parameters:,}",
        "config": str(args.kw_config or "none"),
        "recipe": str(getattr(args, "recipe", None) or "none"),
        "data": f"{args.data_set} {args.data_path}".strip(),
        "images": ", ".join(f"{count:,} {name}" for name, count in images.items() if count is not None),
        "classes": str(args.nb_classes),
        "images per update": f"{args.batch_size} x {args.update_freq} x {process.world} = {batch}",
        "epochs": str(args.epochs),
        "seed": str(args.seed),
        "device": f"{process.world} x {device}" if process.world > 1 else device,
        "precision": f"mixed, {args.amp_dtype}" if args.use_amp else "float32",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def options_of(args: argparse.Namespace) -> dict[str, str]:
    """All options as texts; the names of the classes, which may be thousands, are left out."""
    return {name: json.dumps(value, default=str) for name, value in sorted(vars(args).items()) if name != "classes"}


def attention_images(found: Any) -> tuple[list[dict[str, str]], str]:
    """The pictures of attentions for the page, and why there are none (empty: there are)."""
    if not found.layers:
        return [], ""
    from .looking import attention_set

    try:
        # each warehouse by itself is for `scripts/visualize.py`
        pictures = [picture for picture in attention_set(found) if not picture.name.startswith("warehouse-")]
    except ImportError:
        return [], "the pictures of attentions were not drawn: matplotlib is not installed"
    made = [{"name": p.name, "caption": p.caption, "png": base64.b64encode(p.png(DPI)).decode()} for p in pictures]
    return made, ""


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `report.json` and `report.html` into the folder of a run.

    Raises:
        OSError: one of them cannot be written; an older one is intact.
    """
    from .page import report_page
    from .runs import open_run

    content = json.dumps({"format": FORMAT, **record}).encode()
    replace_file(folder / NAME, lambda file: file.write(content))
    page = shown(report_page([open_run(folder)])).encode()
    replace_file(folder / "report.html", lambda file: file.write(page))


def report(trainer: Any, state: str, examines: bool) -> None:
    """Write the report of a run on its first process; a run does not fail for it.

    Args:
        trainer: a `training.Trainer`.
        state: "finished", or why the run stopped.
        examines: pass images through the model for it, which takes up to a minute.
    """
    try:
        args, loaders = trainer.args, trainer.loaders
        evaluation = None if loaders.evaluation is None else loaders.evaluation.dataset
        images = {"to train": _size(loaders.train.dataset), "to evaluate": _size(evaluation)}
        record = {
            "state": state,
            "facts": facts(args, trainer.process, images, trainer.parameters),
            "options": options_of(args),
            "results": None,
            "pictures": [],
            "notes": [],
        }
        if examines and evaluation is not None and _size(evaluation) is None:
            record["notes"].append("no results of single images: the data are a stream, which has no positions")
        elif examines and evaluation is not None:
            from .results import examine

            results, found = examine(
                trainer.model, evaluation, loaders.classes, args, trainer.process.device,
                workers=loaders.evaluation.num_workers, stops=lambda: bool(trainer.signals.asked),
            )  # fmt: skip
            record["results"] = results.as_dict()
            record["pictures"], note = attention_images(found)
            record["notes"] += [note] if note else []
        write_record(trainer.folder.path, record)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        log(f"warning: report.html was not written ({printable(reason)[:200]})")


def _size(data: Any) -> int | None:
    """The number of images; None for a stream, or without data."""
    try:
        return len(data)
    except TypeError:
        return None
