"""The one changing line of a terminal, which whatever else is printed replaces."""

import os
import sys
from typing import TextIO

ERASE = "\r\033[K"
# of a terminal that does not tell its width
COLUMNS = 80

_drawn = False


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream shows its text on a terminal that can erase a line."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except (OSError, ValueError):
        # it was closed
        return False


def room() -> int:
    """How many characters a line of the terminal of the standard output has, now: a user may resize it.

    The last column is left free, since some terminals begin a new line once it is written.
    """
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError, AttributeError):
        # the terminal is gone
        columns = 0
    return (columns or COLUMNS) - 1


def draw(text: str) -> None:
    """Show a line in place of the one before."""
    global _drawn
    _drawn = False
    print(ERASE + text, end="", flush=True)
    _drawn = True


def erase() -> None:
    """Take the line away."""
    if was_drawn():
        print(ERASE, end="", flush=True)


def keep() -> None:
    """Leave the line as it is, and go on below it."""
    if was_drawn():
        print(flush=True)


def was_drawn() -> bool:
    """Whether the line is on the terminal; from then on it counts as erased."""
    global _drawn
    before, _drawn = _drawn, False
    return before
