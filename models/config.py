"""Reads configs, and checks them against the table of options.

A mistake is refused before any data or device is touched.
"""

import difflib
import json
import logging
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .messages import printable
from .options import Option, all_options

MAX_CONFIG_BYTES = 1 << 20
# Options that name weights to read, and folders. A config may come from anybody, so that its paths are confined.
_WEIGHTS = ("resume", "finetune", "init_static")
_FOLDERS = ("data_path", "eval_data_path", "output_dir", "log_dir")
_PACKAGE = Path(__file__).resolve().parent
# the folder with main.py, configs/ and scripts/: that of a checkout, and a folder of the package where it is installed
ROOT = _PACKAGE / "app" if (_PACKAGE / "app").is_dir() else _PACKAGE.parent
OWN_CONFIGS = ROOT / "configs"
OWN_RECIPES = OWN_CONFIGS / "recipes"


class ConfigError(ValueError):
    """A mistake of the user. The message is one line that names the mistake and, where possible, the remedy.

    It may quote names of files and texts of their content, which are made `printable`.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(" ".join(str(message).splitlines())))


def read_config(config: str | os.PathLike | dict, overrides: dict | None = None) -> dict[str, Any]:
    """Read and check a config, and add the settings of the recipe that it names.

    Args:
        config: path of a JSON file, or a dict of its contents; `find_config` says which paths and names are known.
        overrides: settings that replace the config's; a recipe among them replaces the config's recipe.

    Returns:
        The given settings only, their keys with underscores and each value of its option's type. `_about`
        (documentation) is left out, and `recipe` is replaced by the settings of the recipe.

    Raises:
        ConfigError: names the file, the key and the nearest known key.
    """
    settings = merge(config, _check_keys(overrides or {}, all_options(), "config"))
    settings.pop("recipe", None)
    return settings


def merge(config: str | os.PathLike | dict, overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge settings: `overrides` replace those of the config, and these replace those of its recipe.

    The result keeps the key `recipe`, with the recipe's name.

    Args:
        config: as for `read_config`.
        overrides: settings that are checked already.

    Returns:
        The given settings only, checked as by `read_config`.

    Raises:
        ConfigError: names the file, the key and the nearest known key.
    """
    return {name: value for part in merged_parts(config, overrides).values() for name, value in part.items()}


def merged_parts(config: str | os.PathLike | dict, overrides: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `merge` merges: "recipe NAME", "config PATH" and "command line" -> settings; the later replace the earlier.

    Arguments and errors are those of `merge`.
    """
    path = None if isinstance(config, dict) else find_config(config)
    content, name = (config, "config") if path is None else (_load_json(path), str(path))
    own = _check_keys(content, all_options(), name)
    if path is not None and "kw_config" in own:
        raise ConfigError(f'{path}: "kw_config" cannot be set inside a config; put its settings here instead')
    if path is not None:
        _check_places(own, path, Path(path).parent)
    parts = {"config" if path is None else f"config {path}": own, "command line": overrides}
    recipe = {**own, **overrides}.get("recipe")
    if recipe is None:
        return parts
    where = "" if path is None or "recipe" in overrides else f"{path}: "
    return {f"recipe {recipe}": _read_recipe(recipe, path, where), **parts}


def find_config(config: str | os.PathLike) -> str | os.PathLike:
    """The path of a config's file: the given one, or that of one of the project's own configs.

    If there is no file of the given path, it is looked up in the project, wherever this is installed:
    `configs/resnet18/kw1x_resnet18.json`, or `detection/configs/kw/mask_rcnn_kw1x_resnet50.py`. A path without .json
    or .py is looked up in `configs` by its last part or parts: `kw1x_resnet18`, `traditional/kw1x_resnet18`. Of several
    files with a name, the one counts that lies in the folder of its network (`resnet18/`, before `digits/`).

    Returns:
        The path of the file that was found, otherwise the given path.

    Raises:
        ConfigError: several files have this name.
    """
    name = os.fspath(config)
    if os.path.exists(name):
        return config
    if name.endswith((".json", ".py")):
        return ROOT / name if os.path.isfile(ROOT / name) else config
    wanted = Path(f"{name}.json").parts
    paths = [path for path in OWN_CONFIGS.rglob("*.json") if path.parts[-len(wanted) :] == wanted]
    found = sorted(path for path in paths if path.parent != OWN_RECIPES)
    at_home = [path for path in found if path.stem.endswith(path.parent.name)]
    if len(found) > 1 and len(at_home) != 1:
        places = " and ".join(path.relative_to(ROOT).as_posix() for path in found)
        raise ConfigError(f"{name}: {places} have this name; give the path of one")
    return (at_home if len(found) > 1 else found or [config])[0]


def _read_recipe(name: str, path: str | os.PathLike | None, where: str) -> dict[str, Any]:
    """The settings of a recipe, from the folder `recipes` beside the config, else from the project's own.

    Nothing above the config counts: who may write to a folder of many people would set the options of all below it.

    Args:
        name: of the recipe.
        path: of the config; None for a dict.
        where: beginning of an error message.
    """
    beside = [] if path is None else [Path(os.path.abspath(path)).parent / "recipes"]
    folders = [*beside, OWN_RECIPES]
    found = [folder for folder in folders if os.path.isfile(folder / f"{name}.json")]
    if not found:
        known = sorted({file.stem for folder in folders for file in folder.glob("*.json")})
        if not known:
            raise ConfigError(
                f'{where}unknown recipe "{name}"; no recipes are installed, so put {name}.json into a folder "recipes" '
                "beside the config"
            )
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        known = f'did you mean "{near[0]}"?' if near else f"the known ones are {', '.join(known)}"
        raise ConfigError(f'{where}unknown recipe "{name}"; {known}')
    recipe = found[0] / f"{name}.json"
    settings = _check_keys(_load_json(recipe), all_options(), str(recipe))
    for key in ("model", "recipe", "kw_config"):
        if key in settings:
            raise ConfigError(f'{recipe}: a recipe cannot set "{key}"; leave it to the config or the command line')
    _check_places(settings, recipe, found[0].parent)
    # of the processes of a run, the first says it
    if found[0].resolve() != OWN_RECIPES and os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).warning(
            "note: recipe %s is %s, not the project's own", printable(name), printable(recipe)
        )
    return settings


def _check_places(settings: dict[str, Any], path: str | os.PathLike, folder: Path) -> None:
    """Confine the paths in a config or a recipe. On the command line, the user's own word, any of them is fine.

    Args:
        settings: checked options of the file.
        path: of the file.
        folder: of the config; weights with an absolute path must lie inside.

    Raises:
        ConfigError: names the option.
    """
    for option in (*_WEIGHTS, *_FOLDERS):
        place = settings.get(option)
        if not place:
            continue
        wrong = ""
        if "://" in place:
            wrong = "is a URL"
        elif ".." in Path(place).parts:
            wrong = 'climbs up by ".."'
        elif option in _WEIGHTS and os.path.isabs(place):
            inside = Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder))
            wrong = "" if inside else "lies outside of the config's folder"
        if wrong:
            raise ConfigError(
                f'{path}: "{option}" {wrong} ({place[:60]}), which only the command line may ask for: --{option}'
            )
    if settings.get("dist_url", "env://") != "env://":
        # who answers there sends objects to all processes
        raise ConfigError(f'{path}: "dist_url" can be given on the command line only: --dist_url')


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the most similar known name, if there is one.

    Args:
        name: the unknown name.
        known: the known names.
        prefix: put before the suggested name, such as "--".
    """
    match = difflib.get_close_matches(name[:100], list(known), n=1, cutoff=0.5)
    return f'; did you mean "{prefix}{match[0]}"?' if match else "; see --help for the known ones"


def _load_json(path: str | os.PathLike) -> dict:
    if not os.path.exists(path):
        known = [] if str(path).endswith(".json") else [file.stem for file in OWN_CONFIGS.rglob("*.json")]
        near = difflib.get_close_matches(str(path), known, n=1, cutoff=0.5)
        raise ConfigError(f"{path}: no such config file" + (f'; did you mean "{near[0]}"?' if near else ""))
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: not a file; give the path of a JSON file")
    if os.path.getsize(path) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; this is not a config file")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; this is not a config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if text.startswith("\ufeff"):
        raise ConfigError(f"{path}: begins with a byte order mark; save it as UTF-8 without one")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = {}
        for key, value in pairs:
            if key in content:
                raise ConfigError(f'{path}: key "{key[:60]}" is given twice')
            content[key] = value
        return content

    def refuse_constant(word: str) -> None:
        raise ConfigError(f"{path}: {word} is not a number that can be used")

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except ConfigError:
        raise
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the top level must be an object {{...}} of options, not a {type(content).__name__}")
    return content


def _check_keys(content: dict, known: dict[str, Option], where: str) -> dict[str, Any]:
    """Check the keys and values of a dict; returns it with underscores in the keys and without `_about`."""
    settings = {}
    for key, value in content.items():
        if key == "_about":
            continue
        name = key.replace("-", "_") if isinstance(key, str) else key
        if name not in known:
            raise ConfigError(f'{where}: unknown key "{str(key)[:60]}"{nearest(str(name), known)}')
        if name in settings:
            raise ConfigError(f'{where}: key "{name}" is given twice, once with dashes')
        if not _is_unicode(value):
            raise ConfigError(f'{where}: "{key}" holds a text that UTF-8 cannot (a lone surrogate, such as \\ud800)')
        settings[name] = check_value(known[name], value, f'{where}: "{key}"')
    return settings


def _is_unicode(value: Any) -> bool:
    """Whether no text in a value has a half of a pair of surrogates, which no file and no terminal can hold."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            return False
        if isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
    return True


def check_value(option: Option, value: Any, where: str) -> Any:
    """Check a value and return it as its option's type.

    Args:
        option: the option that the value is for.
        value: from a config or the command line.
        where: beginning of an error message, such as 'config.json: "lr"'.

    Raises:
        ConfigError: the value does not fit the option.
    """
    if value is None and option.accepts_null():
        return None
    if option.type is dict:
        return _check_entries(option, value, where)
    if option.nargs is not None and isinstance(value, (list, tuple)):
        if (option.nargs == 2 and len(value) != 2) or (option.nargs == "+" and not value):
            raise ConfigError(f"{where} must be {option.expected()}, got {_shown(value)}")
        return [_check_scalar(option, item, where) for item in value]
    if option.nargs == 2:
        raise ConfigError(f"{where} must be {option.expected()}, got {_shown(value)}")
    return _check_scalar(option, value, where)


def _check_scalar(option: Option, value: Any, where: str) -> Any:
    # bool is a subclass of int, but is not accepted as a number
    if option.type is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = type(value) is option.type
    if fits and option.type in (int, float):
        # a huge integer has no float value; isfinite() would raise
        fits = abs(value) < (2**63 if option.type is int else 1e300) and math.isfinite(value)
        fits = fits and (option.low is None or value >= option.low) and (option.high is None or value <= option.high)
        fits = fits and (option.above is None or value > option.above)
    if fits and option.type is str:
        chosen = value in option.choices
        matched = bool(option.pattern) and re.fullmatch(option.pattern, value) is not None
        fits = "\0" not in value and (chosen or matched or not (option.choices or option.pattern))
    if not fits:
        close = nearest(value, option.choices) if isinstance(value, str) and option.choices else ""
        close = close if "did you mean" in close else ""
        raise ConfigError(f"{where} must be {option.expected()}; got {_shown(value)}{close}")
    return float(value) if option.type is float else value


def _check_entries(option: Option, value: Any, where: str) -> dict[str, dict]:
    """Check the value of `warehouses`: name -> settings of a warehouse."""
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{where} must be an object that maps names of warehouses to settings; got {_shown(value)}")
    checked = {}
    for name, settings in value.items():
        inside = f'{where}, warehouse "{str(name)[:60]}"'
        if not isinstance(settings, dict):
            raise ConfigError(f"{inside} must be an object; got {_shown(settings)}")
        if printable(name) != name:
            raise ConfigError(f"{inside} has a control character in its name")
        checked[name] = _check_keys(settings, option.entries, inside)
        if not isinstance(checked[name].get("layers"), list) or not checked[name]["layers"]:
            raise ConfigError(f'{inside} needs "layers", a list of patterns of module names')
    return checked


def _shown(value: Any) -> str:
    """A value as an error message shows it: on one line, and at most 60 characters."""
    # ascii() keeps line breaks and control characters out of the one-line message
    try:
        text = ascii(value) if not isinstance(value, (bool, type(None))) else json.dumps(value)
    except RecursionError:
        text = "lists in lists"
    return text if len(text) <= 60 else text[:57] + "..."
