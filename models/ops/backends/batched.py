"""The backend "batched": kernels are assembled in the layout of the cells, for batched matrix products.

x [B, C, *S], alpha [B, m, n], cells [n, co, ci, *k]; letters as in `geometry.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import SMALL_MAP, Geometry, full_alpha, live_alpha, patches, patches_are_copies, unpatches
from ..layout import empty_like_layout, is_channels_last
from ..products import LOW_PRECISION, chunks, fold, fold_alpha, mix, output_blocks, unfold_alpha, unmix, wide_like
from ..scratch import scratch

CASTS_CELLS = False
# Assembled kernels and patches are made in pieces of this many bytes, which reuse the same memory.  Smaller pieces fit
# the cache, but every piece needs a call per tap, and every call waits for all threads.
KERNEL_BYTES = 32 << 20
PATCH_BYTES = 16 << 20
# The same for each of them on a GPU, where every piece costs launches, and memory is the only limit.
GPU_BYTES = 256 << 20


def available(geo: Geometry, dtype: torch.dtype, device: str) -> bool:
    """Whether the backend can evaluate a call."""
    return geo.foldable


def _pieces(x: Tensor, alpha: Tensor, geo: Geometry) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Ranges of the samples, and of the output channels of a cell, whose patches and kernels are made at a time."""
    width = geo.taps * geo.g_in * geo.q * x.element_size()
    patch_bytes, kernel_bytes = (GPU_BYTES, GPU_BYTES) if x.device.type == "cuda" else (PATCH_BYTES, KERNEL_BYTES)
    samples = chunks(x.shape[0], width * geo.positions if patches_are_copies(geo) else 0, patch_bytes)
    return samples, chunks(geo.cell[0], (samples[0][1] - samples[0][0]) * alpha.shape[2] * width, kernel_bytes)


def _rows(alpha: Tensor) -> Tensor:
    """alpha [B, T, Go, Gi, n] -> [(T Gi B Go), n]: in this order, products with the cells need no permutation."""
    return alpha.permute(1, 3, 0, 2, 4).reshape(-1, alpha.shape[-1])


def _position_rows(x: Tensor, geo: Geometry) -> bool:
    """Whether products have positions as rows: if channels are innermost in memory, and on small maps."""
    return is_channels_last(x) or geo.positions <= SMALL_MAP


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry) -> Tensor:
    """Assemble kernels in the layout of the cells; one batched product per tap and block of input channels."""
    x, alpha = fold(x, geo), fold_alpha(live_alpha(alpha, geo), geo)
    g_out, (c_out, q) = alpha.shape[2], (geo.cell[0], geo.q)
    flat = cells.reshape(geo.n, c_out, q)
    taps, positions = geo.taps * geo.g_in, geo.positions
    low, by_rows = x.dtype in LOW_PRECISION, _position_rows(x, geo)

    y = empty_like_layout(x, g_out * c_out, geo.out)
    blocks = output_blocks(y, g_out, c_out)
    samples, tiles = _pieces(x, alpha, geo)
    # the product has the layout of the output, and is written there directly
    direct = len(tiles) == 1 and by_rows == is_channels_last(y)
    for b0, b1 in samples:
        b = b1 - b0
        cols = patches(x[b0:b1], geo, "kbpq" if by_rows else "kbqp")
        rows = _rows(alpha[b0:b1])
        for t0, t1 in tiles:
            size = g_out * (t1 - t0)
            kernels = scratch("kernels", (taps, b, size, q), x)
            mix(rows, flat[:, t0:t1].reshape(geo.n, -1), kernels.view(rows.shape[0], -1))
            if low and taps > 1:
                # one product, since a sum over products would be rounded once per tap
                kernels = kernels.permute(1, 2, 0, 3).reshape(1, b, size, taps * q)
                wide = cols.permute(1, 2, 0, 3) if by_rows else cols.transpose(0, 1)
                cols_t = wide.reshape(1, b, *((positions, -1) if by_rows else (-1, positions)))
            else:
                cols_t = cols
            pairs = [
                (column, kernel.transpose(1, 2)) if by_rows else (kernel, column)
                for column, kernel in zip(cols_t, kernels, strict=True)
            ]
            if direct:
                part = y[b0:b1].flatten(2).transpose(1, 2) if by_rows else y[b0:b1].flatten(2)
                torch.bmm(*pairs[0], out=part)
            else:
                part = torch.bmm(*pairs[0])
            for pair in pairs[1:]:
                part.baddbmm_(*pair)
            if not direct:
                part = part.transpose(1, 2) if by_rows else part
                blocks[b0:b1, :, t0:t1] = part.reshape(b, g_out, t1 - t0, positions)
    return y if geo.groups == 1 else y.reshape(geo.batch, geo.c_out, *geo.out)


def _patch_gradients(shape: Sequence[int], x: Tensor, sums: Tensor, geo: Geometry) -> Tensor:
    """Memory for the gradients of patches: of their own, in the type of x, where they become part of the result."""
    return scratch("patch gradients", shape, sums) if patches_are_copies(geo) else x.new_empty(shape)


def backward(dy: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, geo: Geometry, needs: Sequence[bool]) -> tuple:
    """Gradients of `forward`; the kernels are assembled again, a tile at a time."""
    x_shape, by_rows = x.shape, _position_rows(x, geo)
    x, alpha = fold(x, geo), fold_alpha(live_alpha(alpha, geo), geo)
    batch, g_out, (c_out, q) = x.shape[0], alpha.shape[2], (geo.cell[0], geo.q)
    flat = cells.reshape(geo.n, c_out, q)
    taps, positions = geo.taps * geo.g_in, geo.positions
    layout = "kbpq" if by_rows else "kbqp"
    sums = wide_like(x)

    dy = dy.reshape(batch, g_out, c_out, positions)
    dx = []
    dalpha = alpha.new_empty(alpha.shape) if needs[1] else None
    dcells = sums.new_empty(geo.n, c_out * q) if needs[2] else None
    samples, tiles = _pieces(x, alpha, geo)
    for b0, b1 in samples:
        b = b1 - b0
        rows = _rows(alpha[b0:b1])
        if needs[1] or needs[2]:
            cols = patches(x[b0:b1], geo, layout)
            if not by_rows:
                cols = cols.transpose(2, 3)
        dcols, drows = None, sums.new_zeros(geo.n, rows.shape[0]) if needs[1] else None
        for t0, t1 in tiles:
            size = t1 - t0
            tile = flat[:, t0:t1].reshape(geo.n, -1)
            dpart = dy[b0:b1, :, t0:t1].reshape(b, g_out * size, positions)
            if needs[0]:
                kernels = scratch("kernels", (taps, b, g_out * size, q), x)
                mix(rows, tile, kernels.view(rows.shape[0], -1))
                first = dcols is None
                if first:
                    shape = (taps, b, positions, q) if by_rows else (taps, b, q, positions)
                    dcols = _patch_gradients(shape, x if len(tiles) == 1 else sums, sums, geo)
                for k in range(taps):
                    pair = (dpart.transpose(1, 2), kernels[k]) if by_rows else (kernels[k].transpose(1, 2), dpart)
                    if dcols.dtype == x.dtype:
                        dcols[k].baddbmm_(*pair, beta=0 if first else 1)
                    elif first:
                        dcols[k] = torch.bmm(*pair)
                    else:
                        dcols[k] += torch.bmm(*pair)
            if needs[1] or needs[2]:
                dkernels = scratch("kernel gradients", (taps, b, g_out * size, q), x)
                for k in range(taps):
                    torch.bmm(dpart, cols[k], out=dkernels[k])
                target = dcells[:, t0 * q : t1 * q] if needs[2] else None
                unmix(dkernels.view(-1, size * q), rows, tile, drows, target, b0 == 0)
        if needs[0]:
            dx.append(unpatches(dcols, geo, layout, (b, *x.shape[1:])))
        if needs[1]:
            dalpha[b0:b1] = drows.t().reshape(geo.taps, geo.g_in, b, g_out, geo.n).permute(2, 0, 3, 1, 4)
    dx = (dx[0] if len(dx) == 1 else torch.cat(dx)).reshape(x_shape).to(x.dtype) if needs[0] else None
    if needs[1]:
        dalpha = full_alpha(unfold_alpha(dalpha, geo), geo)
    if needs[2]:
        dcells = dcells.view(cells.shape).to(cells.dtype)
    return dx, dalpha, dcells
