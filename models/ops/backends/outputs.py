"""The backend "outputs": all samples are convolved by every cell, and the outputs mixed, in plain PyTorch.

x [B, C, *S], alpha [B, m, n], cells [n, co, ci, *k]; letters as in `geometry.py`.
"""

import torch

from ..dead_taps import convolution_backward
from ..geometry import full_alpha, library_convolution, live_alpha, unpad
from ..products import fold, fold_alpha, unfold_alpha

CASTS_CELLS = False


def available(geo, dtype, device):
    """Whether the cells of a mixture see the same inputs: cells as wide as the kernel, over all input channels."""
    return geo.foldable and geo.taps == 1 and geo.g_in == 1


def _cell_kernels(cells, geo):
    """The kernel of a static convolution by all cells."""
    return cells.reshape(geo.n * geo.cell[0], geo.cell[1], *geo.kernel)


def forward(x, alpha, cells, geo):
    """Convolve by every cell once for all samples, then mix the outputs; for one cell, a static convolution scaled."""
    weights = fold_alpha(live_alpha(alpha, geo), geo).flatten(1, 3)  # [B, Go, n]
    source, arguments = library_convolution(fold(x, geo), geo)
    z = torch.ops.aten.convolution(source, _cell_kernels(cells, geo), None, *arguments, 1)
    z = z.reshape(len(weights), geo.n, -1)
    y = weights * z if geo.n == 1 else torch.bmm(weights, z)
    return y.reshape(geo.batch, geo.c_out, *geo.out)


def backward(dy, x, alpha, cells, geo, needs):
    """Gradients of `forward`; the outputs of the cells are computed again where alpha needs them."""
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
