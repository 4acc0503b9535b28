"""The backends of the mixture convolution by name: ways to compute it that agree up to rounding.

A backend is a file of this folder with
- `available(geo, dtype, device)`: whether it can evaluate a call with inputs of a data type, on a type of device;
- `forward(x, alpha, cells, geo)`: the output [B, O, *S'];
- `backward(dy, x, alpha, cells, geo, needs)`: the gradients of x, alpha and cells, each None unless needed;
- `CASTS_CELLS`: whether it casts the cells itself; otherwise it gets them in the data type of x.
Its fitted costs are in `cost.py`: where others are fitted, a backend without costs runs only when it is named.  For
GPUs that were not measured, `roofline.py` lists its steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import Geometry
from . import batched, depthwise, fused, grouped, mixed, outputs, pointwise, streamed, triton, triton_fused, winograd


@dataclass(frozen=True)
class Backend:
    """The functions of a backend's file."""

    available: Callable[[Geometry, torch.dtype, str], bool]
    forward: Callable[[Tensor, Tensor, Tensor, Geometry], Tensor]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
    casts_cells: bool


BACKENDS = {
    module.__name__.rpartition(".")[2]: Backend(module.available, module.forward, module.backward, module.CASTS_CELLS)
    for module in (
        grouped,
        batched,
        mixed,
        outputs,
        fused,
        depthwise,
        pointwise,
        streamed,
        winograd,
        triton,
        triton_fused,
    )
}


def available_backends(geo: Geometry, dtype: torch.dtype, device: str) -> list[str]:
    """Names of the backends that can evaluate a call with inputs of a data type, on a type of device."""
    return [name for name, backend in BACKENDS.items() if backend.available(geo, dtype, device)]
