"""The backend "mixed": the inputs are mixed first and multiplied by the cells once for all samples, in plain PyTorch.

x [B, C, *S], alpha [B, m, n], cells [n, co, ci, *k]; letters as in `geometry.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Geometry, full_alpha, live_alpha, patches, unpatches
from ..layout import empty_like_layout
from ..products import LOW_PRECISION, fold, fold_alpha, output_blocks, unfold_alpha
from ..scratch import scratch

CASTS_CELLS = False
# for cells of at least this many numbers, a copy of the warehouse costs more than one product per cell
LARGE_CELL = 64 * 64


def available(geo: Geometry, dtype: torch.dtype, device: str) -> bool:
    """Whether the backend can evaluate a call."""
    return geo.foldable


def _mixed_inputs(x: Tensor, alpha: Tensor, geo: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Patches [b, k, (p q)], their weights [b, (Go n), k], and for every cell the mixed patches z [n, (b Go p), q]."""
    batch, g_out = x.shape[0], alpha.shape[2]
    cols = patches(x, geo, "bkpq").flatten(2)
    weights = alpha.permute(0, 2, 4, 1, 3).reshape(batch, g_out * geo.n, -1)  # [b, (Go n), (T Gi)]
    z = scratch("mixed", (batch, g_out * geo.n, cols.shape[2]), x)
    torch.bmm(weights, cols, out=z)
    z = z.view(batch, g_out, geo.n, geo.positions, geo.q).permute(2, 0, 1, 3, 4)
    return cols, weights, scratch("mixed by cell", z.shape, x).copy_(z).view(geo.n, -1, geo.q)


def _one_product(cells: Tensor, geo: Geometry) -> bool:
    """Whether to multiply by all cells in one product, or by one cell after the other."""
    return geo.cell[0] * geo.q < LARGE_CELL or cells.dtype in LOW_PRECISION


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry) -> Tensor:
    """Mix the patches of every sample first, then multiply by the cells once for the whole batch."""
    x, alpha = fold(x, geo), fold_alpha(live_alpha(alpha, geo), geo)
    c_out = geo.cell[0]
    flat = cells.reshape(geo.n, c_out, geo.q)
    _, _, z = _mixed_inputs(x, alpha, geo)
    if _one_product(cells, geo):
        y = z.transpose(0, 1).reshape(z.shape[1], -1) @ flat.transpose(1, 2).reshape(-1, c_out)
    else:
        y = z[0] @ flat[0].t()
        for j in range(1, geo.n):
            y.addmm_(z[j], flat[j].t())
    y = y.view(x.shape[0], alpha.shape[2], geo.positions, c_out)
    out = empty_like_layout(x, alpha.shape[2] * c_out, geo.out)
    output_blocks(out, alpha.shape[2], c_out).copy_(y.transpose(2, 3))
    return out if geo.groups == 1 else out.reshape(geo.batch, geo.c_out, *geo.out)


def backward(
    dy: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`; the mixed inputs are computed again."""
    x_shape = x.shape
    x, alpha = fold(x, geo), fold_alpha(live_alpha(alpha, geo), geo)
    batch, g_out, c_out = x.shape[0], alpha.shape[2], geo.cell[0]
    flat = cells.reshape(geo.n, c_out, geo.q)
    cols, weights, z = _mixed_inputs(x, alpha, geo)
    dy = dy.reshape(batch, g_out, c_out, geo.positions).transpose(2, 3).reshape(-1, c_out)
    one = _one_product(cells, geo)
    dx = dalpha = dcells = None
    if needs[2]:
        if one:
            dcells = (dy.t() @ z.transpose(0, 1).reshape(z.shape[1], -1)).view(c_out, geo.n, geo.q).transpose(0, 1)
        else:
            dcells = flat.new_empty(flat.shape)
            for j in range(geo.n):
                torch.mm(dy.t(), z[j], out=dcells[j])
        dcells = dcells.reshape(cells.shape)
    if needs[0] or needs[1]:
        if one:
            dz = (dy @ flat.transpose(0, 1).reshape(c_out, -1)).view(-1, geo.n, geo.q)
            dz = dz.view(batch, g_out, geo.positions, geo.n, geo.q).permute(0, 1, 3, 2, 4)
        else:
            for j in range(geo.n):
                torch.mm(dy, flat[j], out=z[j])
            dz = z.view(geo.n, batch, g_out, geo.positions, geo.q).permute(1, 2, 0, 3, 4)
        dz = dz.reshape(batch, g_out * geo.n, -1)
        if needs[0]:
            dcols = torch.bmm(weights.transpose(1, 2), dz)
            dx = unpatches(dcols, geo, "bkpq", x.shape).reshape(x_shape)
        if needs[1]:
            dalpha = torch.bmm(dz, cols.transpose(1, 2)).view(batch, g_out, geo.n, geo.taps, geo.g_in)
            dalpha = full_alpha(unfold_alpha(dalpha.permute(0, 3, 1, 4, 2), geo), geo)
    return dx, dalpha, dcells
