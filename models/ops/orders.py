"""The evaluation orders of the mixture convolution, forward and backward, in plain PyTorch.

All compute the same sum over cells, taps and input channels, and none keeps assembled kernels: the backward pass
assembles them again.  x [B, C, *S], alpha [B, m, n], cells [n, co, ci, *k]; letters as in `geometry.py`.
"""

import torch

from .dead_taps import convolution_backward
from .geometry import (
    empty_like_layout,
    full_alpha,
    is_channels_last,
    live_alpha,
    pad,
    patches,
    patches_are_copies,
    unpatches,
)
from .scratch import scratch

# assembled kernels and patches are made in pieces of this many bytes, in memory that is handed on; smaller ones fit the
# cache, but every piece is a call per tap, and calls wait for all threads
KERNEL_BYTES = 32 << 20
PATCH_BYTES = 16 << 20
# columns of a warehouse that a product on the CPU takes at a time: wider ones are up to 1.7 times as slow
COLUMNS = 1 << 14
# output positions up to which products have positions as rows, whatever the layout of the input
SMALL_MAP = 64
LOW_PRECISION = (torch.bfloat16, torch.float16)


def _chunks(batch, item_bytes, limit):
    step = max(1, min(batch, limit // max(item_bytes, 1)))
    return [(i, min(i + step, batch)) for i in range(0, batch, step)]


# --- the products with the warehouse ----------------------------------------------------------------------------------


def _columns(cells):
    """Ranges of the columns of a warehouse [n, N] that one product takes."""
    width = cells.shape[1]
    return _chunks(width, 1, COLUMNS if cells.device.type == "cpu" else width)


def _mix(rows, cells, out):
    """out [r, N] = rows [r, n] @ cells [n, N]."""
    for a, b in _columns(cells):
        torch.mm(rows, cells[:, a:b], out=out[:, a:b])


def _unmix(dkernels, rows, cells, drows, dcells, first):
    """Gradients of `_mix` from dkernels [r, N]: added to drows [n, r], and to dcells [n, N] unless it is the first."""
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


def _wide(x):
    """An empty tensor of the type in which sums over x are kept."""
    return x.new_empty(0, dtype=torch.float32) if x.dtype in LOW_PRECISION else x


def _kernel_gradients(dkernels, live, cells, geo, needs):
    """Gradients of alpha and cells from those of kernels that lie as the cells do, [B, T, Go, Gi, *cell]."""
    flat, rows = cells.reshape(geo.n, -1), live.reshape(-1, geo.n)
    drows = _wide(cells).new_zeros(geo.n, len(rows)) if needs[1] else None
    total = _wide(cells).new_empty(flat.shape) if needs[2] else None
    _unmix(dkernels.view(len(rows), -1), rows, flat, drows, total, True)
    dalpha = full_alpha(drows.t(), geo).to(cells.dtype) if needs[1] else None
    dcells = total.view(cells.shape).to(cells.dtype) if needs[2] else None
    return dalpha, dcells


# --- assemble, then a library convolution -----------------------------------------------------------------------------


def convolution(x, geo):
    """What the convolution reads, its arguments but for the groups, and whether to call it sample by sample."""
    # the library pads both sides alike, which is right where it finds the same output positions
    symmetric = all(
        left >= 0 and out == (size + 2 * left - d * (k - 1) - 1) // s + 1
        for size, k, s, d, out, (left, _) in zip(
            x.shape[2:], geo.kernel, geo.stride, geo.dilation, geo.out, geo.pads, strict=True
        )
    )
    padding = [left if symmetric else 0 for left, _ in geo.pads]
    arguments = (list(geo.stride), padding, list(geo.dilation), False, [0] * len(geo.kernel))
    # the CPU library is up to 1.3 times as fast with one sample's dense kernel as with a group per sample
    alone = x.device.type == "cpu" and geo.groups == 1
    return x if symmetric else pad(x, geo), arguments, alone


def _assemble(alpha, cells, geo):
    """Kernels of all samples, [B, O, C, *K]."""
    shape = (alpha.shape[0], geo.taps, geo.g_out, geo.g_in, *geo.cell)
    kernels, rows = scratch("kernels", shape, cells), alpha.reshape(-1, geo.n)
    _mix(rows, cells.reshape(geo.n, -1), kernels.view(rows.shape[0], -1))
    kernels = kernels.permute(0, 2, 4, 3, 5, 1, *range(6, len(shape)))
    kernels = scratch("permuted kernels", kernels.shape, cells).copy_(kernels)
    return kernels.view(geo.batch, -1, geo.c_in, *geo.kernel)


def grouped_forward(x, alpha, cells, geo):
    """Assemble every sample's kernel; a convolution with a group per sample, or sample by sample."""
    kernels = _assemble(live_alpha(alpha, geo), cells, geo)
    source, arguments, alone = convolution(x, geo)
    if alone:
        y = empty_like_layout(x, geo.c_out, geo.out)
        for b in range(geo.batch):
            y[b] = torch.ops.aten.convolution(source[b : b + 1], kernels[b], None, *arguments, 1)[0]
        return y
    source = source.reshape(1, -1, *source.shape[2:])
    y = torch.ops.aten.convolution(source, kernels.flatten(0, 1), None, *arguments, geo.batch * geo.groups)
    return y.view(geo.batch, geo.c_out, *geo.out)


def grouped_backward(dy, x, alpha, cells, geo, needs):
    """Gradients of `grouped_forward`; the kernels are assembled again."""
    live = live_alpha(alpha, geo)
    kernels = _assemble(live, cells, geo)
    source, arguments, alone = convolution(x, geo)
    mask = [needs[0], needs[1] or needs[2]]
    dx = dalpha = dcells = None
    if alone:
        dx = empty_like_layout(x, x.shape[1], source.shape[2:]) if needs[0] else None
        dkernels = scratch("kernel gradients", kernels.shape, kernels)
        for b in range(geo.batch):
            grads = convolution_backward(dy[b : b + 1], source[b : b + 1], kernels[b], arguments, 1, mask)
            if needs[0]:
                dx[b] = grads[0][0]
            if mask[1]:
                dkernels[b] = grads[1]
    else:
        one = dy.reshape(1, -1, *geo.out), source.reshape(1, -1, *source.shape[2:]), kernels.flatten(0, 1)
        dx, dkernels = convolution_backward(*one, arguments, geo.batch * geo.groups, mask)
    if needs[0]:
        dx = dx.view(source.shape)
        if source is not x:
            dx = torch.nn.functional.pad(dx, [-side for sides in reversed(geo.pads) for side in sides])
    if mask[1]:
        window = geo.cell[2:]
        dkernels = dkernels.view(geo.batch, geo.g_out, geo.cell[0], geo.g_in, geo.cell[1], geo.taps, *window)
        dkernels = dkernels.permute(0, 5, 1, 3, 2, 4, *range(6, 6 + len(window)))
        dkernels = scratch("permuted kernels", dkernels.shape, dkernels).copy_(dkernels)
        dalpha, dcells = _kernel_gradients(dkernels, live, cells, geo, needs)
    return dx, dalpha, dcells


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
    if geo.groups == 1:
        return grad
    return grad.unflatten(0, (-1, geo.groups)).transpose(1, 2).flatten(2, 3)


# --- assemble, then batched matrix products ---------------------------------------------------------------------------


def _pieces(x, alpha, geo):
    """Ranges of samples whose patches, and of output channels of a cell whose kernels, are made at a time."""
    width = geo.taps * geo.g_in * geo.q * x.element_size()
    samples = _chunks(x.shape[0], width * geo.positions if patches_are_copies(geo) else 0, PATCH_BYTES)
    return samples, _chunks(geo.cell[0], (samples[0][1] - samples[0][0]) * alpha.shape[2] * width, KERNEL_BYTES)


def _rows(alpha):
    """alpha [B, T, Go, Gi, n] -> [(T Gi B Go), n]: the order in which the cells' own layout needs no permutation."""
    return alpha.permute(1, 3, 0, 2, 4).reshape(-1, alpha.shape[-1])


def _position_rows(x, geo):
    """Whether products have positions as rows and channels as columns: where memory has, and at small maps."""
    return is_channels_last(x) or geo.positions <= SMALL_MAP


def output_blocks(y, g_out, c_out):
    """y [B, Go * co, *P] as [B, Go, co, P], a view."""
    if is_channels_last(y):
        return y.movedim(1, -1).view(y.shape[0], -1, g_out, c_out).permute(0, 2, 3, 1)
    return y.view(y.shape[0], g_out, c_out, -1)


def batched_forward(x, alpha, cells, geo):
    """Assemble kernels in the layout of the cells; one batched product per tap and block of input channels."""
    x, alpha = fold(x, geo), fold_alpha(live_alpha(alpha, geo), geo)
    g_out, (c_out, q) = alpha.shape[2], (geo.cell[0], geo.q)
    flat = cells.reshape(geo.n, c_out, q)
    taps, positions = geo.taps * geo.g_in, geo.positions
    low, by_rows = x.dtype in LOW_PRECISION, _position_rows(x, geo)

    y = empty_like_layout(x, g_out * c_out, geo.out)
    blocks = output_blocks(y, g_out, c_out)
    samples, tiles = _pieces(x, alpha, geo)
    # the product has the output's own layout
    direct = len(tiles) == 1 and by_rows == is_channels_last(y)
    for b0, b1 in samples:
        b = b1 - b0
        cols = patches(x[b0:b1], geo, "kbpq" if by_rows else "kbqp")
        rows = _rows(alpha[b0:b1])
        for t0, t1 in tiles:
            size = g_out * (t1 - t0)
            kernels = scratch("kernels", (taps, b, size, q), x)
            _mix(rows, flat[:, t0:t1].reshape(geo.n, -1), kernels.view(rows.shape[0], -1))
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


def batched_backward(dy, x, alpha, cells, geo, needs):
    """Gradients of `batched_forward`; the kernels are assembled again, a tile at a time."""
    x_shape, by_rows = x.shape, _position_rows(x, geo)
    x, alpha = fold(x, geo), fold_alpha(live_alpha(alpha, geo), geo)
    batch, g_out, (c_out, q) = x.shape[0], alpha.shape[2], (geo.cell[0], geo.q)
    flat = cells.reshape(geo.n, c_out, q)
    taps, positions = geo.taps * geo.g_in, geo.positions
    layout = "kbpq" if by_rows else "kbqp"
    low = x.dtype in LOW_PRECISION
    wide = _wide(x)

    dy = dy.reshape(batch, g_out, c_out, positions)
    dx = []
    dalpha = alpha.new_empty(alpha.shape) if needs[1] else None
    dcells = wide.new_empty(geo.n, c_out * q) if needs[2] else None
    samples, tiles = _pieces(x, alpha, geo)
    for b0, b1 in samples:
        b = b1 - b0
        rows = _rows(alpha[b0:b1])
        if needs[1] or needs[2]:
            cols = patches(x[b0:b1], geo, layout)
            if not by_rows:
                cols = cols.transpose(2, 3)
        dcols, drows = None, wide.new_zeros(geo.n, rows.shape[0]) if needs[1] else None
        for t0, t1 in tiles:
            size = t1 - t0
            tile = flat[:, t0:t1].reshape(geo.n, -1)
            dpart = dy[b0:b1, :, t0:t1].reshape(b, g_out * size, positions)
            if needs[0]:
                kernels = scratch("kernels", (taps, b, g_out * size, q), x)
                _mix(rows, tile, kernels.view(rows.shape[0], -1))
                first = dcols is None
                if first:
                    shape = (taps, b, positions, q) if by_rows else (taps, b, q, positions)
                    dcols = scratch("patch gradients", shape, wide)
                for k in range(taps):
                    pair = (dpart.transpose(1, 2), kernels[k]) if by_rows else (kernels[k].transpose(1, 2), dpart)
                    if not low:
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
                _unmix(dkernels.view(-1, size * q), rows, tile, drows, target, b0 == 0)
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
