"""C++ files beside this one, compiled when they are first needed.

Needs a C++ compiler (g++ or clang++, or the one that CXX names); without one the backends in PyTorch take over.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
HEADERS = ("registers.h", "mixing.h")
# in which each type is computed
TYPES = {torch.float64: torch.float64, **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float32)}
NAMES = {torch.float32: "float", torch.float64: "double"}
# not -march=native: nodes of a cluster may differ and still share the folder of compiled files
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
ARCHITECTURES = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}


@functools.cache
def compiler():
    """The C++ compiler, or None."""
    named = os.environ.get("CXX", "")
    return next(filter(None, map(shutil.which, (named, "g++", "clang++", "c++"))), None)


@functools.cache
def library(source, dtype):
    """The functions of a C++ file beside this one, compiled for a data type.

    None (with a warning, once) where they cannot be built.
    """
    source = FOLDER / source
    flags = [*FLAGS, f"-DREAL={NAMES[dtype]}"]
    flags += ARCHITECTURES.get(torch.backends.cpu.get_cpu_capability(), [])
    text = "\0".join([*(path.read_text() for path in (source, *(FOLDER / header for header in HEADERS))), *flags])
    name = hashlib.sha256(text.encode()).hexdigest()[:16] + ".so"
    try:
        path = _folder() / name
        if not path.exists():
            # processes that compile at the same time each write their own file, and the last one stays
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                part = Path(folder) / name
                command = [compiler(), *flags, str(source), "-o", str(part)]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
                os.replace(part, path)
        functions = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        warnings.warn(
            f"{source.name} could not be compiled, slower backends are used: {' '.join(reason)}", stacklevel=2
        )
        return None
    functions.lanes.restype = functions.parts_of_alpha.restype = ctypes.c_int64
    return functions


def _folder():
    """Where compiled files are kept: the user's cache, or, where that cannot be written, a folder of this process."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "kernelwarehouse"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder if os.access(folder, os.W_OK) else Path(_own_folder().name)


@functools.cache
def _own_folder():
    """Kept, and with that removed, until the process ends."""
    return tempfile.TemporaryDirectory(prefix="kernelwarehouse-")


def compiles(source, dtype, device):
    """Whether the functions of a file can be used for tensors of a type on a type of device."""
    return device == "cpu" and dtype in TYPES and compiler() is not None and library(source, TYPES[dtype]) is not None


def run(functions, name, call, *arrays):
    """Call a compiled function with the shapes of a call and the numbers of tensors, null for None."""
    pointers = [ctypes.c_void_p(None if array is None else array.data_ptr()) for array in arrays]
    return getattr(functions, name)(ctypes.byref(call), *pointers)
