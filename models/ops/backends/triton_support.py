"""Where the backends in Triton are available, and what happens when Triton fails.

Triton is optional, and imported when a call first needs it.
"""

import contextlib
import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..geometry import Geometry
from .compiled import own_folder

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # the lowest compute capability of a GPU


class TritonFailed(RuntimeError):
    """A kernel could not be compiled or launched; from then on the backends are not available."""


# whether a kernel failed in this process
_failed = False


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device (TRITON_INTERPRET=1 when Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _works() -> bool:
    """Whether kernels can be compiled for all visible GPUs; where they cannot, warns once and says why."""
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    # no GPU is visible on a machine where a program is only compiled for one
    if torch.version.hip is not None or not capabilities:
        return False
    if min(capabilities) < CAPABILITY:
        _warn("compute capability {}.{} of this GPU is below {}.{}".format(*min(capabilities), *CAPABILITY))
        return False
    if not installed():
        _warn("it is not installed; pip install triton")
        return False
    try:
        # loads the driver's functions, for which Triton needs a C compiler
        kernels().triton.runtime.driver.active.get_current_target()
    except Exception as error:
        _warn(_reason(error))
        return False
    return True


def _warn(reason: str) -> None:
    warnings.warn(f"Triton is not used on this GPU, slower backends are: {reason}", stacklevel=3)


def _reason(error: BaseException) -> str:
    """An error in one line, the end of it where it is long, since compilers say last what is wrong."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: Triton's errors become `TritonFailed`, with one warning, and the backends are not available any more.

    Errors of the GPU itself, and of its memory, are not Triton's: no other backend could go on after them.
    """

    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        global _failed
        try:
            return function(*args)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            if not _failed:
                _warn(_reason(error))
            _failed = True
            raise TritonFailed(_reason(error)) from error

    return guarded


def available(geo: Geometry, dtype: torch.dtype, device: str) -> bool:
    """Whether the backends can evaluate a call."""
    shapes = zip(geo.out, geo.stride, geo.kernel, geo.dilation, geo.pads, strict=True)
    source = math.prod((o - 1) * s + (k - 1) * d + 1 - left - right for o, s, k, d, (left, right) in shapes)
    numbers = (source * geo.groups * geo.c_in, geo.positions * geo.c_out, geo.taps * geo.c_out * geo.c_in)
    return (
        dtype in DTYPES
        and geo.per_tap
        and geo.foldable
        and max(numbers) < 1 << 31  # offsets inside a sample have 32 bits
        and not _failed
        and ((_interpreted() and installed()) or (device == "cuda" and _works()))
    )


@functools.cache
def kernels() -> ModuleType:
    """The module of the kernels; compiled ones are kept in Triton's cache folder, or in a temporary one."""
    import triton

    folder = Path(triton.knobs.cache.dir)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        triton.knobs.cache.dir = own_folder().name
    from . import triton_kernels

    return triton_kernels
