"""The backend "outputs": all samples are convolved with every cell, and the outputs are mixed, in plain PyTorch.

x [B, C, *S], alpha [B, m, n], cells [n, co, ci, *k]; letters as in `geometry.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dead_taps import convolution_backward
from ..geometry import Geometry, full_alpha, library_convolution, live_alpha, unpad
from ..products import fold, fold_alpha, unfold_alpha

CASTS_CELLS = False


def available(geo: Geometry, dtype: torch.dtype, device: str) -> bool:
    """Whether all cells read the same inputs: each covers the whole kernel and all input channels of a group."""
    return geo.foldable and geo.taps == 1 and geo.g_in == 1


def _cell_kernels(cells: Tensor, geo: Geometry) -> Tensor:
    """The kernel of a static convolution with all cells."""
    return cells.reshape(geo.n * geo.cell[0], geo.cell[1], *geo.kernel)


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry) -> Tensor:
    """Convolve all samples with every cell, then mix the outputs; for one cell, this scales a static convolution."""
    weights = fold_alpha(live_alpha(alpha, geo), geo).flatten(1, 3)  # [B, Go, n]
    source, arguments = library_convolution(fold(x, geo), geo)
    z = torch.ops.aten.convolution(source, _cell_kernels(cells, geo), None, *arguments, 1)
    z = z.reshape(len(weights), geo.n, -1)
    y = weights * z if geo.n == 1 else torch.bmm(weights, z)
    return y.reshape(geo.batch, geo.c_out, *geo.out)


def backward(
    dy: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`; the outputs of the cells are computed again if alpha needs a gradient."""
    live, folded, kernel = fold_alpha(live_alpha(alpha, geo), geo), fold(x, geo), _cell_kernels(cells, geo)
    weights, dy = live.flatten(1, 3), dy.reshape(len(live), live.shape[2], -1)
    source, arguments = library_convolution(folded, geo)
    dx = dalpha = dcells = None
    if needs[1]:
        z = torch.ops.aten.convolution(source, kernel, None, *arguments, 1).reshape(len(live), geo.n, -1)
        dalpha = full_alpha(unfold_alpha(torch.bmm(dy, z.transpose(1, 2)).view(live.shape), geo), geo)
    if needs[0] or needs[2]:
        dz = torch.bmm(weights.transpose(1, 2), dy).view(len(live), -1, *geo.out)
        dx, dcells = convolution_backward(dz, source, kernel, arguments, 1, [needs[0], needs[2]])
    if needs[0]:
        if source is not folded:
            dx = unpad(dx, geo)
        dx = dx.reshape(x.shape)
    if needs[2]:
        dcells = dcells.view(cells.shape)
    return dx, dalpha, dcells
