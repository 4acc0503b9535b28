"""Lists of the SHA-256 of files, as sha256sum writes and reads them."""

import re
from pathlib import Path

from models.config import ConfigError

# in the name of a file, they would end the line or be taken for one of these
_ESCAPED = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_ORIGINAL = {escaped: original for original, escaped in _ESCAPED.items()}


def line_of(digest: str, name: str) -> str:
    """A line of a list. It begins with a backslash where characters of the name are escaped."""
    escaped = re.sub(r"[\\\n\r]", lambda match: _ESCAPED[match[0]], name)
    return ("\\" if escaped != name else "") + f"{digest}  {escaped}\n"


def read_list(path: str | Path) -> dict[str, str]:
    """Names of files -> their SHA-256.

    Raises:
        ConfigError: the list cannot be read, or holds another line.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such list of checksums")
    try:
        lines = Path(path).read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    digests = {}
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"(\\?)([0-9a-f]{64}) [ *](.+)", line, re.DOTALL)
        if line and not match:
            raise ConfigError(f"{path}: line {number} is not one of sha256sum")
        if line:
            name = match[3]
            if match[1]:
                name = re.sub(r"\\[\\nr]", lambda escaped: _ORIGINAL[escaped[0]], name)
            digests[name] = match[2]
    return digests
