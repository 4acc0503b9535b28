"""What other libraries print and raise, made fit for one line."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


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
