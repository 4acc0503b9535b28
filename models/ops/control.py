"""Watching the operators and choosing the backend from outside, for tests and measurements.

Not for several threads.
"""

import contextlib

_observers = []
_forced = None


@contextlib.contextmanager
def observed(function):
    """Within it every call of an operator is told: function(name, *arguments) with the positional arguments.

    The operators are "mixture_conv" and "sample_conv".
    """
    _observers.append(function)
    try:
        yield
    finally:
        _observers.remove(function)


def tell(name, *arguments):
    """Tell all observers of a call."""
    for function in _observers:
        function(name, *arguments)


@contextlib.contextmanager
def forced_backend(backend):
    """Within it every mixture convolution uses this backend where it can; None lets the cost decide.

    With "naive" `sample_conv`, too, is evaluated as it is defined.
    """
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def backend_forced():
    """The backend that `forced_backend` asks for, or None."""
    return _forced
