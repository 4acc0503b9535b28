"""The backends of the mixture convolution by name: ways to compute it that agree up to rounding.

A backend is a file of this folder with
- `available(geo, dtype, device)`: whether it can evaluate a call with inputs of a type, on a type of device;
- `forward(x, alpha, cells, geo)`: the output [B, O, *S'];
- `backward(dy, x, alpha, cells, geo, needs)`: the gradients of x, alpha and cells, each None unless needed;
- `CASTS_CELLS`: whether it takes cells of any type, or has them cast to the type of x.
Its costs stand in `cost.py`: a backend that has none is chosen only by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

from . import batched, depthwise, fused, grouped, mixed, outputs, pointwise, triton, triton_fused


@dataclass(frozen=True)
class Backend:
    """The functions of a backend's file."""

    available: Callable
    forward: Callable
    backward: Callable
    casts_cells: bool


BACKENDS = {
    module.__name__.rpartition(".")[2]: Backend(module.available, module.forward, module.backward, module.CASTS_CELLS)
    for module in (grouped, batched, mixed, outputs, fused, depthwise, pointwise, triton, triton_fused)
}


def available_backends(geo, dtype, device):
    """Names of the backends that can evaluate a call with inputs of a type, on a type of device."""
    return [name for name, backend in BACKENDS.items() if backend.available(geo, dtype, device)]
