"""Texts that others wrote, made fit for one line: what libraries print and raise, names in files."""

import contextlib
import logging
import unicodedata
import warnings
from collections.abc import Iterator

# names in Persian, Indian scripts and emoji need them
_JOINERS = "\u200c\u200d"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what is logged: progress of exporters, retries of clients, errors that an exception tells as well."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: Exception) -> str:
    """What an error of a library says, short enough for a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def printable(text: object) -> str:
    r"""A text that a terminal shows as it is, on one line, and that any encoding of Unicode can hold.

    Escaped are control characters (line breaks, sequences that move the cursor or rename the window: \x1b), marks that
    reverse the direction of writing (\u202e), lone surrogates (\ud800), and bytes of a path that are no UTF-8 (\xff).
    """
    return "".join(_escaped(letter) for letter in str(text))


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":
        # how Python holds a byte of a path that is no UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    hidden = unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") and letter not in _JOINERS
    return letter.encode("unicode_escape").decode() if hidden else letter
