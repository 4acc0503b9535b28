"""The record of a run's checkpoints: which run they are of, how far each has come, and its SHA-256.

`manifest.json` lies beside the checkpoints. The checksums inside a file reveal damage to its tensors; the SHA-256
reveals any other change, too.
"""

import json
from pathlib import Path
from typing import Any

from models.config import ConfigError
from models.download import sha256_of
from utils import replace_file

NAME = "manifest.json"
FORMAT = 1
# a file that is replaced while it is read is read again
TRIES = 3


class Manifest:
    """The manifest of a folder; an absent or a damaged one is empty, since every file has checksums of its own.

    Attributes:
        run: identity of the run that writes the folder; None: not known.
        files: name of a file -> {"sha256": hexadecimal, "bytes": its size, "epoch": number, "update": number or None}.
        damaged: whether there is a file that is no manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.run: str | None = None
        self.files: dict[str, dict[str, Any]] = {}
        self.damaged = False
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.run, self.files = _checked(content)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError):
            self.damaged = True

    def write(self) -> None:
        """Write the manifest.

        Raises:
            OSError: it cannot be written; the older one is intact.
        """
        content = {"format": FORMAT, "run": self.run, "files": dict(sorted(self.files.items()))}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        replace_file(self.path, lambda file: file.write(text.encode()))


def _checked(content: Any) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """The run and the files of a manifest.

    Raises:
        ValueError: the content is none.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError("not a manifest")
    run, files = content.get("run"), content.get("files")
    if not (run is None or isinstance(run, str)) or not isinstance(files, dict):
        raise ValueError("not a manifest")
    for entry in files.values():
        fits = isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        fits = fits and all(type(entry.get(name)) is int for name in ("bytes", "epoch"))
        if not fits or not (entry.get("update") is None or type(entry["update"]) is int):
            raise ValueError("not a manifest")
    return run, files


def forget(path: Path) -> None:
    """Remove a file that is about to be replaced from its manifest, which would tell the SHA-256 of the old one.

    Raises:
        OSError: the manifest cannot be written.
    """
    manifest = Manifest(path.parent)
    if manifest.files.pop(path.name, None) is not None:
        manifest.write()


def verify(path: Path) -> None:
    """Compare a file with the manifest beside it; one that is not listed there passes.

    Raises:
        ConfigError: the file is not the one that was saved.
        OSError: the file cannot be read.
    """
    for _ in range(TRIES):
        if path.name not in Manifest(path.parent).files:
            return
        found = sha256_of(path)
        # read after the file, whose new entry is written last
        entry = Manifest(path.parent).files.get(path.name)
        if entry is None or entry["sha256"] == found:
            return
    raise ConfigError(
        f"{path}: damaged or replaced after it was saved: its SHA-256 is not that in {NAME} beside it; use another "
        f"copy (or remove {NAME}, if you replaced the file yourself)"
    )
