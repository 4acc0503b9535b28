"""Scratch memory on the CPU, which successive calls of the operator reuse.

The operating system clears fresh pages, which costs as much as the arithmetic.  Other devices have caching allocators.
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import is_channels_last

# of the largest buffer; larger requests are allocated and freed as usual
LIMIT_BYTES = 64 << 20

_buffers = threading.local()


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


def forget() -> None:
    """Free the scratch memory of this thread."""
    _buffers.__dict__.clear()
