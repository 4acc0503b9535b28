"""Read the folder of a run: its logs, and the record that it left."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.config import ConfigError
from models.messages import printable
from utils import shown

from .record import NAME

# bytes of a record; that of 1,000 classes has a few megabytes
LARGEST = 64 << 20
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


@dataclass
class Run:
    """A run.

    Attributes:
        folder: where it is.
        epochs, steps, times: rows of log.txt, steps.jsonl and times.jsonl; torn ones are left out.
        record: what `report.json` holds, checked; empty without one.
    """

    folder: Path
    epochs: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    times: list[dict[str, Any]]
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return printable(shown(self.folder.resolve().name or "/"))

    def series(self, key: str, rows: str = "epochs") -> list[tuple[float, float]]:
        """The points (epoch or update, value) of a metric; rows without it, or with NaN, are left out."""
        x = "epoch" if rows == "epochs" else "step"
        return [
            (float(row[x]), float(row[key]))
            for row in getattr(self, rows)
            if is_number(row.get(x)) and is_number(row.get(key))
        ]

    def best(self, key: str = "test_acc1") -> tuple[float, float] | None:
        """(epoch, value) of the highest value of a metric, the first of equal ones; None without any."""
        return max(self.series(key), key=lambda point: point[1], default=None)

    def last(self, key: str = "test_acc1") -> float | None:
        points = self.series(key)
        return points[-1][1] if points else None

    def seconds(self) -> float | None:
        """Seconds of training between the logged updates; None where they are not known."""
        found = [row["seconds"] for row in self.times if is_number(row.get("seconds"))]
        return sum(found) if found else None

    def speed(self) -> float | None:
        """The median of the images per second; None where it is not known."""
        found = sorted(value for _, value in self.series("images_per_second", "times"))
        return found[len(found) // 2] if found else None

    def memory(self) -> float | None:
        """The greatest memory in MiB; None where it is not known."""
        return max((value for _, value in self.series("memory_mib", "times")), default=None)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def open_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        ConfigError: it holds no run, or cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the --output_dir of a run")
    epochs, steps, times = (_rows(folder / name) for name in ("log.txt", "steps.jsonl", "times.jsonl"))
    path = folder / NAME
    if not epochs and not steps and not path.is_file():
        raise ConfigError(f"{folder}: no run: neither log.txt nor {NAME} is in it; give the --output_dir of a run")
    return Run(folder, epochs, steps, times, _record(path) if path.is_file() else {})


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none where there is no file."""
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _record(path: Path) -> dict[str, Any]:
    """The content of a record.

    Raises:
        ConfigError: it is not one.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST >> 20} MiB")
        content = json.loads(path.read_bytes())
        return {
            "state": _is(content["state"], str),
            "facts": _texts(content["facts"]),
            "options": _texts(content["options"]),
            "results": _results(content["results"]) if content["results"] is not None else None,
            "pictures": [_picture(entry) for entry in _is(content["pictures"], list)],
            "notes": [_is(note, str) for note in _is(content["notes"], list)],
        }
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{path}: not the record of a run ({why.splitlines()[0][:80] if why else type(error).__name__}); delete it"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _is(value: Any, kind: type | Callable[[Any], bool]) -> Any:
    fits = isinstance(value, kind) if isinstance(kind, type) else kind(value)
    if not fits or (kind is int and isinstance(value, bool)):
        raise ValueError("a value of a wrong type")
    return value


def _texts(value: Any) -> dict[str, str]:
    return {_is(key, str): _is(text, str) for key, text in _is(value, dict).items()}


def _png(text: Any) -> str:
    if not _BASE64.fullmatch(_is(text, str)):
        raise ValueError("a picture that is not in base64")
    return text


def _picture(entry: Any) -> dict[str, str]:
    return {"name": _is(entry["name"], str), "caption": _is(entry["caption"], str), "png": _png(entry["png"])}


def _results(content: Any) -> dict[str, Any]:
    classes = [_is(name, str) for name in _is(content["classes"], list)]

    def index(value: Any) -> int:
        if not 0 <= _is(value, int) < len(classes):
            raise ValueError("a class that there is not")
        return value

    def mistake(entry: Any) -> dict[str, Any]:
        numbers = {name: float(_is(entry[name], is_number)) for name in ("probability", "of_true", "loss")}
        names = {"true": index(entry["true"]), "predicted": index(entry["predicted"]), "name": _is(entry["name"], str)}
        return {**names, **numbers, "png": _png(entry["png"])}

    return {
        **{name: _is(content[name], int) for name in ("count", "total", "correct")},
        "classes": classes,
        "confusion": {(index(t), index(p)): _is(n, int) for t, p, n in _is(content["confusion"], list)},
        "worst": [mistake(entry) for entry in _is(content["worst"], list)],
        "confident": [mistake(entry) for entry in _is(content["confident"], list)],
    }
