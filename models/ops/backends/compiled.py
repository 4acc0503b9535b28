"""Compiles the C++ files of this folder when they are first needed.

This needs a C++ compiler: the one that the environment variable CXX names, else g++, clang++ or c++.  Without one, the
backends in PyTorch are used.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
HEADERS = ("registers.h", "maps.h", "tiles.h", "gradients.h", "streaming.h", "mixing.h")
# the data type of the computation for each data type of the inputs
TYPES = {torch.float64: torch.float64, **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float32)}
# that of inputs and outputs in memory, for functions that convert numbers in registers
STORED = {**TYPES, torch.bfloat16: torch.bfloat16}
REALS = {
    torch.float32: ["-DREAL=float"], torch.float64: ["-DREAL=double"], torch.bfloat16: ["-DREAL=float", "-DBFLOAT16"]
}  # fmt: skip
# without -march=native, because nodes of a cluster may differ and still share the folder of compiled files
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
ARCHITECTURES = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}


@functools.cache
def compiler() -> str | None:
    """Path of the C++ compiler, or None if there is none."""
    named = os.environ.get("CXX", "")
    return next(filter(None, map(shutil.which, (named, "g++", "clang++", "c++"))), None)


@functools.cache
def library(source: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions of a C++ file of this folder, compiled for a data type of `STORED`.

    If they cannot be built, warns once and returns None.
    """
    source = FOLDER / source
    flags = [*FLAGS, *REALS[dtype]]
    flags += ARCHITECTURES.get(torch.backends.cpu.get_cpu_capability(), [])
    text = "\0".join([*(path.read_text() for path in (source, *(FOLDER / header for header in HEADERS))), *flags])
    try:
        folder, key = _folder(), _digest(text.encode())
        functions = ctypes.CDLL(str(_found(folder, key) or _compiled(source, flags, folder, key)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        warnings.warn(
            f"{source.name} could not be compiled, slower backends are used: {' '.join(reason)}", stacklevel=2
        )
        return None
    for name in ("lanes", "parts_of_alpha"):
        if hasattr(functions, name):
            getattr(functions, name).restype = ctypes.c_int64
    return functions


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _found(folder: Path, key: str) -> Path | None:
    """The library that was compiled before.

    Its name tells its contents, because loading a damaged library, as a machine that loses its power may leave it,
    could end the process.  A damaged one is removed.
    """
    for path in folder.glob(f"{key}-*.so"):
        if path.stem == f"{key}-{_digest(path.read_bytes())}":
            return path
        path.unlink(missing_ok=True)
    return None


def _compiled(source: Path, flags: list[str], folder: Path, key: str) -> Path:
    """Compile a file into a library in a folder."""
    # processes that compile at the same time write a file each, and the last file replaces the others
    with tempfile.TemporaryDirectory(dir=folder) as own:
        part = Path(own) / "library.so"
        subprocess.run(
            [compiler(), *flags, str(source), "-o", str(part)], check=True, capture_output=True, text=True, timeout=300
        )
        path = folder / f"{key}-{_digest(part.read_bytes())}.so"
        os.replace(part, path)
    return path


def _folder() -> Path:
    """The folder of compiled files: in the user's cache, or a temporary one of this process if that is not writable."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "kernelwarehouse"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # permissions do not tell it for root, nor where the file system is read-only
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(own_folder().name)


@functools.cache
def own_folder() -> tempfile.TemporaryDirectory:
    """A temporary folder; caching it here keeps it until the process ends, when it is removed."""
    return tempfile.TemporaryDirectory(prefix="kernelwarehouse-")


def compiles(source: str, dtype: torch.dtype, device: str, types: Mapping[torch.dtype, torch.dtype] = TYPES) -> bool:
    """Whether the functions of a C++ file can be used for tensors of a data type on a type of device.

    Args:
        types: `TYPES`, or `STORED` for functions that convert numbers in registers.
    """
    return device == "cpu" and dtype in types and compiler() is not None and library(source, types[dtype]) is not None


def run(functions: ctypes.CDLL, name: str, call: ctypes.Structure, *arrays: Tensor | None) -> int:
    """Call a compiled function.

    Args:
        functions: those of a C++ file, from `library`.
        name: the function.
        call: the shapes of the call.
        arrays: tensors, passed as pointers to their numbers; None is passed as null.

    Returns:
        What the function returns; meaningless if it returns nothing.
    """
    pointers = [ctypes.c_void_p(None if array is None else array.data_ptr()) for array in arrays]
    return getattr(functions, name)(ctypes.byref(call), *pointers)
