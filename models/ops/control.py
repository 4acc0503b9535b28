"""Observe operator calls and force a backend from outside, for tests and measurements.

Not thread-safe: the observers and the forced backend are global.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

_observers = []
_forced = None


@contextlib.contextmanager
def observed(function: Callable[..., object]) -> Iterator[None]:
    """Inside the context, call `function(name, *arguments)` at every call of an operator.

    The name is "mixture_conv" or "sample_conv"; the arguments are the positional ones of that operator, in its order.
    """
    _observers.append(function)
    try:
        yield
    finally:
        _observers.remove(function)


def tell(name: str, *arguments: object) -> None:
    """Report the call of an operator to all observers."""
    for function in _observers:
        function(name, *arguments)


@contextlib.contextmanager
def forced_backend(backend: str | None) -> Iterator[None]:
    """Inside the context, evaluate every mixture convolution with this backend where it can; None lets the cost decide.

    With "naive", `sample_conv` is also evaluated by its definition, `grouped_sample_conv`. With "portable", every
    operator is composed of plain operations of PyTorch, which exporters know.
    """
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def backend_forced() -> str | None:
    """The backend that `forced_backend` has set, or None."""
    return _forced


def is_plain(x: Tensor) -> bool:
    """Whether a call with x may skip PyTorch's dispatcher: no trace, mode or transformation of functions sees it."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and not x.is_meta
        and _forced not in ("naive", "portable")
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
    )
