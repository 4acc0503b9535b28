"""Memory that calls of the operator hand on to each other on the CPU.

There the kernel of the operating system clears fresh pages, which costs as much as the arithmetic.  Other devices have
caching allocators.
"""

import math
import threading

import torch

# per slot; larger requests are allocated and freed as usual
LIMIT_BYTES = 64 << 20

_buffers = threading.local()


def scratch(slot, shape, like):
    """Uninitialised memory of a shape, in the type and on the device of `like`.

    It is valid until the same thread asks for the same slot again: never return it from an operator.
    """
    size = math.prod(shape)
    if like.device.type != "cpu" or size * like.element_size() > LIMIT_BYTES:
        return like.new_empty(shape)
    buffers = _buffers.__dict__
    buffer = buffers.get((slot, like.dtype))
    if buffer is None or buffer.numel() < size:
        # a tensor made in inference mode could not be written outside it
        with torch.inference_mode(False):
            buffer = buffers[slot, like.dtype] = torch.empty(size, dtype=like.dtype)
    return buffer[:size].view(shape)


def forget():
    """Give this thread's memory back."""
    _buffers.__dict__.clear()
