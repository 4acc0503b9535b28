"""The command line: the options of `models/options.py`, merged with the config that it names."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from models.config import ConfigError, check_value, merged_parts, nearest
from models.messages import printable
from models.options import Option, all_options

_WORDS_OF_BOOL = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
# with weights to start from, the temperature is annealed only if one of these is on the command line itself
TEMPERATURE = {"temp_epoch", "temp_init_value"}
# of the integers of scripts; more than torch can count with would end in an error of its own
HIGHEST = 2**31 - 1
# characters of a value in a column; longer ones push what follows aside
WIDEST = 40


def parse_command_line(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Merge the command line, the config that it names, the recipe, and the defaults, in this order of precedence.

    Args:
        argv: words of the command line; None: those of the process.

    Returns:
        All options as a namespace, and a dict of those that the command line, the config or the recipe gave.

    Raises:
        ConfigError: there is a mistake in any of them.
    """
    return merged_options(parse_words(make_parser(), argv))


def parse_words(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> dict[str, Any]:
    """The values of the words of a command line, checked.

    Args:
        parser: that of `make_parser`, to which a script may have added arguments of its own; they are not checked.
        argv: words of the command line; None: those of the process.

    Raises:
        ConfigError: a word is unknown, or a value does not fit its option.
    """
    argv = sys.argv[1:] if argv is None else argv
    given_text, unknown = parser.parse_known_args([_underscored(word) for word in argv])
    if unknown:
        raise ConfigError(_unknown_argument(unknown[0]))
    known = all_options()
    return {name: _from_text(name, text) if name in known else text for name, text in vars(given_text).items()}


def merged_options(command_line: dict[str, Any]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Merge the values of a command line with the config that it names; returns what `parse_command_line` returns."""
    given, _ = _merged(command_line)
    defaults = {name: option.default for name, option in all_options().items()}
    return argparse.Namespace(**{**defaults, **given}, given=sorted(given)), given


def _merged(command_line: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The given options, and where each is from: "command line", "config PATH", "recipe NAME", or another option."""
    path = command_line.get("kw_config")
    given, origin = {}, {}
    for source, part in merged_parts({} if path is None else path, command_line).items():
        given.update(part)
        origin.update(dict.fromkeys(part, source))
    weights = next((name for name in ("finetune", "init_static") if given.get(name)), None)
    if weights and not TEMPERATURE & command_line.keys():
        # trained weights need no annealing; the config's is for random ones
        given["temp_epoch"], origin["temp_epoch"] = 0, f"--{weights}"
    if "lr_batch" in given and origin.get("lr") != origin["lr_batch"] and "lr_batch" not in command_line:
        # the recipe tells it of its own learning rate
        del given["lr_batch"], origin["lr_batch"]
    return given, origin


def config_table(args: argparse.Namespace, given: dict[str, Any], command_line: dict[str, Any]) -> str:
    """A page with all options, in the groups of `--help`: each with its value, as JSON, and where that is from.

    Args:
        args: all options of a run.
        given: those of them that the command line, the config, the recipe or the checkpoint gave.
        command_line: the values of the command line itself.
    """
    _, origin = _merged(command_line)
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for name, option in all_options().items():
        value = getattr(args, name)
        source = origin.get(name, f"checkpoint {args.resume}")
        if name not in given and value == option.default:
            source = "default"
        groups.setdefault(option.group, []).append((name, json.dumps(value), source))
    rows = [row for group in groups.values() for row in group]
    widths = [max(len(row[i]) for row in rows if len(row[i]) <= WIDEST) for i in (0, 1)]
    lines = []
    for group, rows in groups.items():
        lines += [
            f"{group}:",
            *(f"  {name:{widths[0]}}  {value:{widths[1]}}  {source}" for name, value, source in rows),
        ]
    return "\n".join(map(printable, lines))


class Parser(argparse.ArgumentParser):
    """A parser that raises a mistake as a `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def at_least(low: int) -> Callable[[str], int]:
    """The type of an argument of a script: an integer from `low` to `HIGHEST`."""

    def convert(text: str) -> int:
        number = int(text)
        if number < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {number}")
        if number > HIGHEST:
            raise argparse.ArgumentTypeError(f"must be at most {HIGHEST}, got {number}")
        return number

    convert.__name__ = "integer"
    return convert


def make_parser(description: str = "Train or evaluate a model.") -> argparse.ArgumentParser:
    """A parser of all options of a run."""
    parser = Parser(
        description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        epilog="Dashes may replace underscores. A flag without a value means true.",
    )  # fmt: skip
    groups: dict[str, Any] = {}
    for name, option in all_options().items():
        if option.type is dict:
            continue
        group = groups.setdefault(option.group, parser.add_argument_group(option.group))
        nargs = "?" if option.type is bool and option.nargs is None else "*" if option.type is bool else option.nargs
        const = {"const": "true"} if nargs == "?" else {}
        notes = [option.limits(), "" if option.default in (None, "") else f"default: {option.default}"]
        text = option.help + (f" ({'; '.join(filter(None, notes))})" if any(notes) else "")
        metavar = option.type.__name__.upper()
        group.add_argument(f"--{name}", nargs=nargs, metavar=metavar, help=text.replace("%", "%%"), **const)
    return parser


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _unknown_argument(argument: str) -> str:
    if not argument.startswith("-"):
        return f'unexpected argument "{argument}"; options begin with --'
    name = argument.lstrip("-").split("=")[0].replace("-", "_")
    if name in all_options():
        return f"--{name} can be set in a config file only"
    return f'unknown option "{argument.split("=")[0]}"{nearest(name, all_options(), "--")}'


def _from_text(name: str, text: str | list[str]) -> Any:
    """Convert the words of an option to its value, and check it."""
    option = all_options()[name]
    words = text if isinstance(text, list) else [text]
    if option.type is bool and not words:
        words = ["true"]
    values = [_parse_word(word, option) for word in words]
    one = option.nargs is None or (option.nargs == "+" and len(values) == 1) or values == [None]
    return check_value(option, values[0] if one else values, f"--{name}")


def _parse_word(word: str, option: Option) -> Any:
    if option.accepts_null() and word.lower() in ("none", "null") and word not in (option.choices or ()):
        return None
    if option.type is bool:
        return _WORDS_OF_BOOL.get(word.lower(), word)
    try:
        return option.type(word)
    except ValueError:
        return word
