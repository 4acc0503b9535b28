"""Scratch memory on the CPU, which successive calls of the operator reuse.

The operating system clears fresh pages, which costs as much as the arithmetic.  Other devices have caching allocators.
"""

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .layout import is_channels_last

# of the largest buffer; larger requests are allocated and freed as usual
LIMIT_BYTES = 64 << 20

# results of at least so many bytes are lent, and so many bytes that nobody holds are kept
LENT_BYTES, IDLE_BYTES = 1 << 20, 512 << 20

_buffers = threading.local()
# (bytes, address) -> memory that was lent and is not held by anybody now
_idle: dict[tuple[int, int], np.ndarray] = {}


def scratch(slot: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of a shape, with the data type and the device of `like`.

    It is valid until the same thread requests the same slot again: never return it from an operator.

    Args:
        slot: a name for the purpose of the memory.
        like: a tensor with the wanted data type and device.
    """
    size = math.prod(shape)
    if like.device.type != "cpu" or size * like.element_size() > LIMIT_BYTES:
        return like.new_empty(shape)
    buffers = _buffers.__dict__
    buffer = buffers.get((slot, like.dtype))
    if buffer is None or buffer.numel() < size:
        # a tensor made in inference mode could not be changed outside of it
        with torch.inference_mode(False):
            buffer = buffers[slot, like.dtype] = torch.empty(size, dtype=like.dtype)
    return buffer[:size].view(shape)


def widened(slot: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a data type: itself, or a copy in scratch memory, with channels innermost in memory if those of x are."""
    if x.dtype == dtype:
        return x
    last = is_channels_last(x)
    rows = x.movedim(1, -1) if last else x
    copy = scratch(slot, rows.shape, x.new_empty(0, dtype=dtype)).copy_(rows)
    return copy.movedim(-1, 1) if last else copy


def output(shape: Sequence[int], like: Tensor, dtype: torch.dtype, last: bool = False) -> Tensor:
    """Memory for an output with the data type of `like`: scratch if it is to be cast, which spares fresh pages.

    Args:
        shape: [B, C, *S].
        dtype: to which the output is cast, before the next call of the operator.
        last: whether channels are innermost in memory.
    """
    sizes = (shape[0], *shape[2:], shape[1]) if last else shape
    y = like.new_empty(sizes) if like.dtype == dtype else scratch("y", sizes, like)
    return y.movedim(-1, 1) if last else y


def lent(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor for a result, with the data type and the device of `like`.

    Its memory is lent again once no tensor refers to it. Layers that share a warehouse return gradients of its size,
    one after the other, which autograd adds up: the C library gives such memory back to the operating system each time.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < LENT_BYTES:
        return like.new_empty(shape)
    memory = None
    for key in tuple(_idle):
        # another thread may take it first
        if key[0] == size and (memory := _idle.pop(key, None)) is not None:
            break
    if memory is None:
        memory = _memory(size)
    array = memory[:]
    # called when the storage of the tensor, which alone holds the array, is freed
    weakref.finalize(array, _take_back, memory).atexit = False
    return torch.from_numpy(array).view(like.dtype).view(shape)


def _memory(size: int) -> np.ndarray:
    """Bytes in pages as large as possible: in small ones, the gradients of large warehouses take longer to write."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(size, np.uint8)
    # private, so that a forked process has its own
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


def _take_back(memory: np.ndarray) -> None:
    if sum(size for size, _ in tuple(_idle)) + memory.nbytes <= IDLE_BYTES:
        _idle[memory.nbytes, memory.ctypes.data] = memory


def forget() -> None:
    """Free the scratch memory of this thread, and the memory that was lent and is held by nobody."""
    _buffers.__dict__.clear()
    _idle.clear()
