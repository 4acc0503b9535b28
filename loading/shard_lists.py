"""Which shards a data set has: by a table, by a pattern, or by the names of the files in a folder."""

import argparse
import glob
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from models.config import ConfigError
from models.messages import first_line

from .fetching import read_small

TABLES = ("_info.json", "info.json")
# the names of a split, in tables and in files
SPLITS = {True: ("train",), False: ("validation", "val")}
MAX_SHARDS = 1_000_000
MAX_TABLE = 1 << 26


@dataclass
class ShardList:
    """The shards of a split.

    Attributes:
        names: paths or URLs, in their order.
        counts: by name, the number of images that the table says; empty: it says none.
        table: path or URL of the table.
        label_key: the entry of the `.json` files that holds the label; empty: the `.cls` files do.
    """

    names: list[str]
    counts: dict[str, int] = field(default_factory=dict)
    table: str = ""
    label_key: str = ""


def find_shards(args: argparse.Namespace, is_train: bool) -> ShardList:
    """The shards of the training or the evaluation split of `--data_set wds/NAME`.

    They are looked for in --data_path; those of the evaluation in --eval_data_path, where it is given. It is a folder
    or the URL of one, or, where it ends in .tar, a pattern of paths or URLs. The first of these counts:

    1. the pattern, such as train-{0000..0012}.tar or {a,b}-{00..07}.tar;
    2. a table in the folder, _info.json or info.json, as timm writes it;
    3. files of the folder, not of a URL: train-*.tar, NAME-train-*.tar with the last part of NAME, or train/*.tar;
       "val" or "validation" for the evaluation.

    Raises:
        ConfigError: there are none, or one is missing in their numbers; the table is damaged.
    """
    option = "--data_path" if is_train or not args.eval_data_path else "--eval_data_path"
    root = getattr(args, option[2:])
    if not root:
        raise ConfigError(f"--data_set {args.data_set} needs --data_path, the folder or the URL that holds the shards")
    try:
        scheme = urlsplit(root).scheme if "://" in root else "https"
    except ValueError as error:
        raise ConfigError(f"{option} {root}: {error}") from None
    if scheme not in ("http", "https"):
        raise ConfigError(f"{option} {root}: {scheme}:// is not supported; fetch the shards and give their folder")
    if is_pattern(root):
        if not is_train and option == "--data_path":
            raise ConfigError(
                f"{option} {root}: these are the shards to train on; give those to evaluate with --eval_data_path, or "
                "--disable_eval true"
            )
        return ShardList(expand(root))
    if "://" not in root and not os.path.isdir(root):
        raise ConfigError(f"{option} {root}: no such folder of shards; a pattern of shards ends in .tar")
    for table in TABLES:
        content = _read_table(join(root, table))
        if content is not None:
            return _of_table(content, join(root, table), root, SPLITS[is_train])
    if "://" in root:
        raise ConfigError(
            f"{root}: there is neither {' nor '.join(TABLES)}, and a URL has no list of files; give the shards as a "
            f"pattern: {option} {join(root, 'train-{0000..0012}.tar')}"
        )
    return _in_folder(Path(root), args.data_set.rpartition("/")[2], SPLITS[is_train])


def is_pattern(root: str) -> bool:
    """Whether a --data_path names tar files, not their folder."""
    return (urlsplit(root).path if "://" in root else root).endswith(".tar")


def join(root: str, name: str) -> str:
    """The path or URL of a file in a folder; what follows the path of a URL, such as a token, is kept."""
    if "://" not in root:
        return os.path.join(root, name)
    parts = urlsplit(root)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name, safe='/{}.,')}").geturl()


def expand(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for: {0000..0012} are numbers of 4 digits, {a,b} are alternatives.

    Raises:
        ConfigError: it has unpaired or nested braces, a range that goes down, or more than `MAX_SHARDS` names.
    """
    names = [""]
    # texts and braces in turn
    for number, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        choices = _choices(part, pattern) if number % 2 else [part]
        if len(names) * len(choices) > MAX_SHARDS:
            raise ConfigError(f"{pattern}: stands for more than {MAX_SHARDS} shards")
        names = [name + choice for name in names for choice in choices]
    if any(brace in names[0] for brace in "{}") or len(set(names)) < len(names):
        raise ConfigError(f"{pattern}: has unpaired or nested braces, or a name twice; write x-{{0000..0012}}.tar")
    return names


def _choices(inside: str, pattern: str) -> list[str]:
    ends = re.fullmatch(r"([0-9]{1,9})\.\.([0-9]{1,9})", inside)
    if not ends:
        return inside.split(",")
    first, last = int(ends[1]), int(ends[2])
    if not 0 <= last - first < MAX_SHARDS:
        raise ConfigError(f"{pattern}: {{{inside}}} must go up, to at most {MAX_SHARDS} shards")
    return [str(number).zfill(len(ends[1])) for number in range(first, last + 1)]


def _read_table(path: str) -> Any:
    """The content of a table; None where there is none."""
    try:
        if "://" in path:
            content = read_small(path, MAX_TABLE)
        else:
            content = Path(path).read_bytes() if os.path.isfile(path) else None
        return None if content is None else json.loads(content)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is no JSON: {first_line(error)}") from None


def _of_table(content: Any, table: str, root: str, names: tuple[str, ...]) -> ShardList:
    """The shards that a table lists: {"splits": {NAME: {"filenames": [...], "shard_lengths": [...]}}}."""
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, dict) or not all(isinstance(split, dict) for split in splits.values()):
        raise ConfigError(f'{table}: is no table of shards, which has "splits" with the names of files')
    name = next((name for name in names if name in splits), None)
    if name is None:
        raise ConfigError(f"{table}: has no split {' or '.join(names)}, only {', '.join(splits) or 'none'}")
    files, counts = (splits[name].get(key) or [] for key in ("filenames", "shard_lengths"))
    total, label_key = (splits[name].get(key) for key in ("num_samples", "alt_label"))
    if not _is_list(files, str) or not files or len(set(files)) < len(files) or any(map(_leaves, files)):
        raise ConfigError(f'{table}: "filenames" of {name} must be a list of different files below {root}')
    if not _is_list(counts, int) or len(counts) not in (0, len(files)):
        raise ConfigError(f'{table}: "shard_lengths" of {name} must be a list of {len(files)} numbers')
    if counts and total not in (None, sum(counts)):
        raise ConfigError(f'{table}: "num_samples" of {name} is {total}, but its "shard_lengths" make {sum(counts)}')
    shards = [join(root, file) for file in files]
    return ShardList(shards, dict(zip(shards, counts)), table, str(label_key or ""))


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)


def _leaves(file: str) -> bool:
    """Whether the name of a file leads out of the folder."""
    return file.startswith("/") or "://" in file or ".." in file.split("/")


def _in_folder(root: Path, name: str, splits: tuple[str, ...]) -> ShardList:
    """The shards in a folder, by the names of the files."""
    starts = [start for split in splits for start in (f"{split}-", *([f"{name}-{split}-"] if name else []))]
    found = {f"{start}*.tar": sorted(root.glob(f"{glob.escape(start)}*.tar")) for start in starts}
    found |= {f"{split}/*.tar": sorted((root / split).glob("*.tar")) for split in splits}
    found = {pattern: files for pattern, files in found.items() if files}
    if len(found) != 1:
        options = " nor ".join([f"{start}*.tar" for start in starts] + [f"{split}/*.tar" for split in splits])
        reason = f"holds neither a table ({TABLES[0]}) nor {options}"
        if found:
            reason = f"holds both {' and '.join(found)}; remove one, or give a pattern such as train-{{0000..0012}}.tar"
        raise ConfigError(f"--data_set wds/{name}: {root} {reason}")
    (files,) = found.values()
    _check_numbers(files)
    return ShardList([str(file) for file in files])


def _check_numbers(files: list[Path]) -> None:
    """Refuse shards of which one is missing in their numbers: PREFIX-0007.tar, or PREFIX-00007-of-01024.tar."""
    matches = [re.fullmatch(r"(.*?)([0-9]+)(?:-of-([0-9]+))?\.tar", file.name) for file in files]
    if None in matches or len({(match[1], match[3]) for match in matches}) > 1:
        return
    names = {int(match[2]): file.name for match, file in zip(matches, files)}
    # numbers that lie far apart are something else, such as dates
    if 2 * len(names) > max(names) - min(names):
        for number in range(min(names), max(names)):
            if number not in names:
                raise ConfigError(
                    f"{files[0].parent}: no shard {number} follows {names[number - 1]}, but others do; fetch it, or "
                    "give a pattern of the shards to read, such as train-{0000,0002}.tar"
                )
    if matches[0][3] and len(names) != int(matches[0][3]):
        raise ConfigError(
            f"{files[0]}: is one of {int(matches[0][3])} shards, but {len(names)} are there; fetch the others"
        )
