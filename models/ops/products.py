"""Products of attentions and a warehouse in plain PyTorch, and groups of a convolution as a larger batch.

x [B, C, *S], alpha [B, T, Go, Gi, n], cells [n, co, ci, *k]; letters as in `geometry.py`.
"""

import torch

from .geometry import full_alpha, is_channels_last

# columns of a warehouse that a product on the CPU takes at a time: wider ones are up to 1.7 times as slow
COLUMNS = 1 << 14
LOW_PRECISION = (torch.bfloat16, torch.float16)


def chunks(batch, item_bytes, limit):
    """Ranges of a batch whose items take no more than `limit` bytes together."""
    step = max(1, min(batch, limit // max(item_bytes, 1)))
    return [(i, min(i + step, batch)) for i in range(0, batch, step)]


# --- the products with the warehouse ----------------------------------------------------------------------------------


def _columns(cells):
    """Ranges of the columns of a warehouse [n, N] that one product takes."""
    width = cells.shape[1]
    return chunks(width, 1, COLUMNS if cells.device.type == "cpu" else width)


def mix(rows, cells, out):
    """out [r, N] = rows [r, n] @ cells [n, N]."""
    for a, b in _columns(cells):
        torch.mm(rows, cells[:, a:b], out=out[:, a:b])


def unmix(dkernels, rows, cells, drows, dcells, first):
    """Gradients of `mix` from dkernels [r, N]: added to drows [n, r], and to dcells [n, N] unless it is the first."""
    for a, b in _columns(cells):
        part = dkernels[:, a:b]
        if drows is not None:
            _accumulate(drows, cells[:, a:b], part.t(), False)
        if dcells is not None:
            _accumulate(dcells[:, a:b], rows.t(), part, first)


def _accumulate(total, a, b, first):
    """total += a @ b, or = for the first; total may be of a wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def wide_like(x):
    """An empty tensor of the type in which sums over x are kept."""
    return x.new_empty(0, dtype=torch.float32) if x.dtype in LOW_PRECISION else x


def kernel_gradients(dkernels, live, cells, geo, needs):
    """Gradients of alpha and cells from those of kernels that lie as the cells do, [B, T, Go, Gi, *cell]."""
    flat, rows = cells.reshape(geo.n, -1), live.reshape(-1, geo.n)
    drows = wide_like(cells).new_zeros(geo.n, len(rows)) if needs[1] else None
    total = wide_like(cells).new_empty(flat.shape) if needs[2] else None
    unmix(dkernels.view(len(rows), -1), rows, flat, drows, total, True)
    dalpha = full_alpha(drows.t(), geo).to(cells.dtype) if needs[1] else None
    dcells = total.view(cells.shape).to(cells.dtype) if needs[2] else None
    return dalpha, dcells


# --- groups as a larger batch ----------------------------------------------------------------------------------------


def fold(x, geo):
    """x [B, g * C, *S] -> [B * g, C, *S]."""
    return x if geo.groups == 1 else x.reshape(-1, geo.c_in, *x.shape[2:])


def fold_alpha(alpha, geo):
    """[B, T, g * Go, Gi, n] -> [B * g, T, Go, Gi, n]."""
    if geo.groups == 1:
        return alpha
    return alpha.unflatten(2, (geo.groups, -1)).transpose(1, 2).flatten(0, 1)


def unfold_alpha(grad, geo):
    """The inverse of `fold_alpha`."""
    if geo.groups == 1:
        return grad
    return grad.unflatten(0, (-1, geo.groups)).transpose(1, 2).flatten(2, 3)


def output_blocks(y, g_out, c_out):
    """y [B, Go * co, *P] as [B, Go, co, P], a view."""
    if is_channels_last(y):
        return y.movedim(1, -1).view(y.shape[0], -1, g_out, c_out).permute(0, 2, 3, 1)
    return y.view(y.shape[0], g_out, c_out, -1)
