"""Products of attentions and a warehouse in plain PyTorch, and folding the groups of a convolution into the batch.

x [B, C, *S], alpha [B, T, Go, Gi, n], cells [n, co, ci, *k]; letters as in `geometry.py`, g groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import Geometry, full_alpha
from .layout import is_channels_last

# columns of a warehouse in one product on the CPU: wider products are up to 1.7 times as slow
COLUMNS = 1 << 14
LOW_PRECISION = (torch.bfloat16, torch.float16)


def chunks(batch: int, item_bytes: int, limit: int) -> list[tuple[int, int]]:
    """Split a batch into ranges (start, stop), each of at most `limit` bytes but at least one item."""
    step = max(1, min(batch, limit // max(item_bytes, 1)))
    return [(i, min(i + step, batch)) for i in range(0, batch, step)]


# --- the products with the warehouse ----------------------------------------------------------------------------------


def _columns(cells: Tensor) -> list[tuple[int, int]]:
    """Ranges of the columns of a warehouse [n, N], each for one product."""
    width = cells.shape[1]
    return chunks(width, 1, COLUMNS if cells.device.type == "cpu" else width)


def mix(rows: Tensor, cells: Tensor, out: Tensor) -> None:
    """Compute out [r, N] = rows [r, n] @ cells [n, N]."""
    for a, b in _columns(cells):
        torch.mm(rows, cells[:, a:b], out=out[:, a:b])


def unmix(
    dkernels: Tensor, rows: Tensor, cells: Tensor, drows: Tensor | None, dcells: Tensor | None, first: bool
) -> None:
    """Add the gradients of `mix` to drows and dcells, each unless it is None.

    Args:
        dkernels: gradient of the output of `mix`, [r, N].
        rows: [r, n].
        cells: [n, N].
        drows: gradient of the rows, transposed: [n, r].
        dcells: [n, N].
        first: whether to overwrite dcells instead of adding to it.
    """
    for a, b in _columns(cells):
        part = dkernels[:, a:b]
        if drows is not None:
            _accumulate(drows, cells[:, a:b], part.t(), False)
        if dcells is not None:
            _accumulate(dcells[:, a:b], rows.t(), part, first)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b for the first; total may have a wider data type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def wide_like(x: Tensor) -> Tensor:
    """A tensor of the data type in which sums over x are kept: float32 if x has low precision, else that of x."""
    return x.new_empty(0, dtype=torch.float32) if x.dtype in LOW_PRECISION else x


def kernel_gradients(
    dkernels: Tensor, live: Tensor, cells: Tensor, geo: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of alpha and cells from those of the kernels, each None unless needed.

    Args:
        dkernels: gradients of the kernels in the layout of the cells, [B, T, Go, Gi, *cell].
        live: alpha of the live taps, [B, T, Go, Gi, n].
        cells: [n, *cell].
        needs: whether x, alpha and cells need a gradient.
    """
    flat, rows = cells.reshape(geo.n, -1), live.reshape(-1, geo.n)
    drows = wide_like(cells).new_zeros(geo.n, len(rows)) if needs[1] else None
    total = wide_like(cells).new_empty(flat.shape) if needs[2] else None
    unmix(dkernels.view(len(rows), -1), rows, flat, drows, total, True)
    dalpha = full_alpha(drows.t(), geo).to(cells.dtype) if needs[1] else None
    dcells = total.view(cells.shape).to(cells.dtype) if needs[2] else None
    return dalpha, dcells


# --- groups as a larger batch ----------------------------------------------------------------------------------------


def fold(x: Tensor, geo: Geometry) -> Tensor:
    """x [B, g * C, *S] -> [B * g, C, *S]."""
    return x if geo.groups == 1 else x.reshape(-1, geo.c_in, *x.shape[2:])


def fold_alpha(alpha: Tensor, geo: Geometry) -> Tensor:
    """[B, T, g * Go, Gi, n] -> [B * g, T, Go, Gi, n]."""
    if geo.groups == 1:
        return alpha
    return alpha.unflatten(2, (geo.groups, -1)).transpose(1, 2).flatten(0, 1)


def unfold_alpha(grad: Tensor, geo: Geometry) -> Tensor:
    """The inverse of `fold_alpha`."""
    if geo.groups == 1:
        return grad
    return grad.unflatten(0, (-1, geo.groups)).transpose(1, 2).flatten(2, 3)


def output_blocks(y: Tensor, g_out: int, c_out: int) -> Tensor:
    """A view of y [B, Go * co, *S'] as [B, Go, co, P]."""
    if is_channels_last(y):
        return y.movedim(1, -1).view(y.shape[0], -1, g_out, c_out).permute(0, 2, 3, 1)
    return y.view(y.shape[0], g_out, c_out, -1)
