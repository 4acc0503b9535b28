"""The command `kernelwarehouse`: each of its commands is one of the project's scripts.

python -m kernelwarehouse train --kw_config configs/resnet18/kw1x_resnet18.json --data_path IMAGENET --output_dir OUT
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

from . import __version__
from .config import ROOT, nearest


@dataclass(frozen=True)
class Command:
    """A command: a script with a function `main(argv)`, which returns the exit code.

    Args:
        script: its path in the project.
        help: one line for `--help`.
        options: words that are put before those of the user.
        extra: the package's extra with what the script needs besides.
    """

    script: str
    help: str
    options: tuple[str, ...] = ()
    extra: str = ""

    @property
    def path(self) -> Path:
        return ROOT / self.script


_ALL = {
    "train": Command("main.py", "train an image classifier"),
    "evaluate": Command("main.py", "evaluate a checkpoint: train with --eval true", ("--eval", "true")),
    "convert": Command(
        "main.py",
        "report what a dynamic model changes in its static network, and what a run would do",
        ("--dry_run", "true"),
    ),
    "export": Command("scripts/export.py", "write a trained model in another format", extra="export"),
    "predict": Command("scripts/predict.py", "classify images with a trained model"),
    "visualize": Command("scripts/visualize.py", "draw what a trained model attends to"),
    "report": Command("scripts/report.py", "write the report of a run, or of several beside each other"),
    "validate": Command("scripts/validate.py", "evaluate trained models in more detail"),
    "average": Command("scripts/average_checkpoints.py", "average the weights of checkpoints"),
    "clean": Command("scripts/clean_checkpoint.py", "reduce a checkpoint to its weights"),
    "check-data": Command("scripts/check_data.py", "read all images of a data set, and name the bad ones"),
    "train-detector": Command("detection/train.py", "train a detector", extra="detection"),
    "test-detector": Command("detection/test.py", "evaluate a detector", extra="detection"),
    "detect": Command("detection/infer.py", "detect objects in images", extra="detection"),
}
COMMANDS = {name: command for name, command in _ALL.items() if command.path.is_file()}


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its name and its options; None: the command line.

    Returns:
        The exit code: 2 for a mistake of the user.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"kernelwarehouse {__version__}")
        return 0
    if name not in COMMANDS:
        reason = f"unknown command {name!a}{nearest(name, COMMANDS)}" if name else "no command; see --help"
        print(f"error: {reason}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    # The script finds what it imports, as when Python runs it. The current folder comes after, whatever it holds.
    sys.path[:0] = dict.fromkeys([str(command.path.parent), str(ROOT)])
    # how the script's own --help calls it
    sys.argv = [f"kernelwarehouse {name}", *argv[1:]]
    try:
        script = importlib.import_module(command.path.stem)
    except ModuleNotFoundError as error:
        if not command.extra:
            raise
        remedy = f'pip install "kernelwarehouse[{command.extra}]"'
        print(f"error: {name} needs {error.name}, which is not installed: {remedy}", file=sys.stderr)
        return 2
    return script.main([*command.options, *argv[1:]])


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: kernelwarehouse COMMAND [OPTION ...]",
            "",
            "Train and use networks with dynamic convolution.",
            "",
            *lines,
            "",
            "kernelwarehouse COMMAND --help lists the options of a command, and kernelwarehouse --version the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
