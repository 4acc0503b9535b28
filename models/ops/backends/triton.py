"""The backend "triton" on NVIDIA GPUs: kernels are assembled in the layout that the convolution then reads."""

from collections.abc import Sequence

from torch import Tensor

from ..geometry import Geometry
from . import triton_calls, triton_support

CASTS_CELLS = False
available = triton_support.available


def _convolve(
    call: triton_calls.Call, source: Tensor, alpha: Tensor, cells: Tensor, target: Tensor, forward: bool
) -> None:
    for a, b in call.pieces(source.element_size()):
        call.convolve(source[a:b], call.assemble(alpha[a:b], cells), target[a:b], forward)


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry) -> Tensor:
    """Assemble kernels, then convolve every sample with its own."""
    return triton_calls.forward(_convolve, x, alpha, cells, geo)


def backward(
    dy: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`; the kernels are assembled again."""
    return triton_calls.backward(_convolve, dy, x, alpha, cells, geo, needs)
