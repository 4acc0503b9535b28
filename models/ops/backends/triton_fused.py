"""The backend "triton_fused" on NVIDIA GPUs, for small maps: tiles of kernels are mixed where they are multiplied."""

from collections.abc import Sequence

from torch import Tensor

from ..geometry import Geometry
from . import triton_calls, triton_support

CASTS_CELLS = False
available = triton_support.available


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry) -> Tensor:
    """Mix tiles of kernels and multiply by them at once."""
    return triton_calls.forward(triton_calls.Call.mix_and_convolve, x, alpha, cells, geo)


def backward(
    dy: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`; the kernels are mixed again."""
    return triton_calls.backward(triton_calls.Call.mix_and_convolve, dy, x, alpha, cells, geo, needs)
