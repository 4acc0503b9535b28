"""What a run says last: where its files are, and the commands that go on with them."""

import argparse
import shlex
import sys
from pathlib import Path

from checkpoints import file_name

# what it is -> file in the output folder
_FILES = {"log": "log.txt", "curves": "curves.png", "report": "report.html"}
_NOTES = {"log": " (a line an epoch; the first is 0)"}


def where_things_are(args: argparse.Namespace, folder: Path | None) -> list[str]:
    """The lines.

    Args:
        args: all options of the run.
        folder: of its output; None: there is none.
    """
    rows = []
    if folder is None:
        rows.append(("saved", "nothing, since there is no --output_dir"))
    else:
        rows += [(what, f"{folder / name}{_NOTES.get(what, '')}") for what, name in _FILES.items()
                 if (folder / name).is_file()]  # fmt: skip
        rows += _of_checkpoint(args, folder)
    if args.log_dir:
        rows.append(("TensorBoard", _command("tensorboard", "--logdir", args.log_dir)))
    return [f"{what:<11}  {text}" for what, text in rows]


def _of_checkpoint(args: argparse.Namespace, folder: Path) -> list[tuple[str, str]]:
    """The best checkpoint, or the last one where nothing was evaluated, and what to do with it."""
    names = {"best": "checkpoint-best.pth", "last": file_name(args.epochs - 1)}
    found = next(((which, folder / name) for which, name in names.items() if (folder / name).is_file()), None)
    if found is None:
        return []
    which, path = found
    # the command of the installed package calls the scripts by names of its own
    installed = sys.argv[0].startswith("kernelwarehouse ")
    evaluate = ("kernelwarehouse", "evaluate") if installed else ("python", "main.py", "--eval", "true")
    predict = ("kernelwarehouse", "predict") if installed else ("python", "scripts/predict.py")
    data = [word for name in ("data_path", "eval_data_path") if (value := getattr(args, name))
            for word in (f"--{name}", value)]  # fmt: skip
    return [
        (which, str(path)),
        ("evaluate", _command(*evaluate, "--resume", path, *data)),
        ("predict", _command(*predict, path, "IMAGES")),
    ]


def _command(*words: str | Path) -> str:
    return shlex.join(map(str, words))
