"""Triton kernels of the backends "triton" and "triton_fused"; `triton_calls.py` launches them.

Legend: S samples (batch * groups), G groups, Go and Gi blocks of output and input channels of a group, [co, ci] a cell,
O = Go * co and C = Gi * ci channels of a group, T taps, P positions.  Activations have their channels innermost.

Offsets inside one sample fit into 32 bits, but the offset of a sample may not.  A table (see `triton_calls.py`) tells
which position a tap reads, so the kernels need not know padding, strides, dilation or the number of dimensions.
"""

import triton
import triton.language as tl

from .triton_tuning import INTERPRETED, tuned_fused, tuned_product

# sizes that change with the batch: Triton must not compile a kernel again for their values
CHANGING = ["rows", "samples", "m_size", "split", "bucket"]


# --- helpers; the interpreter stores bfloat16 as integers, which it can neither multiply nor round --------------------


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _round(x, dtype: tl.constexpr):
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _mix(acc, start, alpha, cells, place, n, size, rows, columns, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    """Add mixtures of BLOCK cells: alpha [R] points to rows of n weights, cells [n, size], place [N] in a cell."""
    j = start + tl.arange(0, BLOCK)
    live = j < n
    weights = tl.load(alpha[:, None] + j[None, :], mask=rows[:, None] & live[None, :], other=0.0)
    tile = tl.load(
        cells + j[:, None].to(tl.int64) * size + place[None, :], mask=live[:, None] & columns[None, :], other=0.0
    )
    return _dot(weights, tile, acc, PRECISION)


# --- kernels ----------------------------------------------------------------------------------------------------------


@tuned_product("ASSEMBLE", "n", "cell_out", "cell_in")
@triton.jit(do_not_specialize=CHANGING)
def assemble(
    alpha,  # [B, full taps, G * Go, Gi, n]
    cells,  # [n, co, ci]
    kernels,  # [S, T, O, C], of which rows = S * T * Go * Gi are cells
    tap_ids,  # [T]: which of the full taps
    rows,
    n,
    taps,
    full_taps,
    groups,
    g_out,
    g_in,
    cell_out,
    cell_in,
    bucket,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All mixtures as one product; every row is stored at its place in the kernels that the convolution reads."""
    # programs that run together read the same cells
    tiles = tl.cdiv(rows, BLOCK_M)
    row = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    size = cell_out * cell_in
    row_live, column_live = row < rows, column < size

    block, tap, sample = row // g_in, row // (g_in * g_out) % taps, row // (g_in * g_out * taps)
    tap = tl.load(tap_ids + tap, mask=row_live, other=0)
    unit = (sample // groups).to(tl.int64) * full_taps + tap
    unit = (unit * groups + sample % groups) * (g_out * g_in) + row % (g_out * g_in)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n, BLOCK_K):
        acc = _mix(acc, start, alpha + unit * n, cells, column, n, size, row_live, column_live, PRECISION, BLOCK_K)

    width = g_in * cell_in
    place = block.to(tl.int64) * cell_out * width + (row % g_in) * cell_in
    inside = column // cell_in * width + column % cell_in
    tl.store(
        kernels + place[:, None] + inside[None, :],
        _round(acc, kernels.dtype.element_ty),
        mask=row_live[:, None] & column_live[None, :],
    )


@tuned_product("CONVOLVE", "k_size", "n_size", indirect=True)
@triton.jit(do_not_specialize=CHANGING)
def convolve(
    source,  # [B, P', G * K]
    kernels,  # [S, T, ...], strides kernel_k and kernel_n
    target,  # [B, P, G * N]
    index,  # [classes, T', P'']: the position that a tap reads, or -1
    tap_ids,  # [classes, T']
    tap_counts,  # [classes]
    places,  # [classes, P'']: the position that is written, or -1
    source_positions,
    target_positions,
    k_size,
    n_size,
    taps,
    kernel_k,
    kernel_n,
    classes,
    class_taps,
    class_positions,
    groups,
    bucket,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Implicit product of patches and a sample's own kernel; with K and N exchanged it is the input's gradient."""
    tiles_n, tiles_m = tl.cdiv(n_size, BLOCK_N), tl.cdiv(class_positions, BLOCK_M)
    pid = tl.program_id(0)
    n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // tiles_n
    p = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // tiles_m
    kind, sample = pid % classes, pid // classes
    image, group = (sample // groups).to(tl.int64), sample % groups
    p_live, n_live = p < class_positions, n < n_size

    source_row = groups * k_size
    source += image * source_positions * source_row + group * k_size
    kernels += sample.to(tl.int64) * (taps * k_size * n_size)
    index += kind * class_taps * class_positions
    tap_ids += kind * class_taps

    k_tiles = tl.cdiv(k_size, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.load(tap_counts + kind) * k_tiles):
        tap = step // k_tiles
        k = (step % k_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
        at = tl.load(index + tap * class_positions + p, mask=p_live, other=-1)
        patch = tl.load(
            source + at[:, None] * source_row + k[None, :], mask=(at >= 0)[:, None] & (k < k_size)[None, :], other=0.0
        )
        tile = kernels + tl.load(tap_ids + tap) * k_size * n_size
        kernel = tl.load(
            tile + k[:, None] * kernel_k + n[None, :] * kernel_n,
            mask=(k < k_size)[:, None] & n_live[None, :],
            other=0.0,
        )
        acc = _dot(patch, kernel, acc, PRECISION)

    place = tl.load(places + kind * class_positions + p, mask=p_live, other=-1)
    target += image * target_positions * (groups * n_size) + group * n_size
    tl.store(
        target + place[:, None] * (groups * n_size) + n[None, :],
        _round(acc, target.dtype.element_ty),
        mask=(place >= 0)[:, None] & n_live[None, :],
    )


@tuned_product("KERNEL_GRADIENT", "out_size", "in_size", indirect=True)
@triton.jit(do_not_specialize=CHANGING)
def kernel_gradient(
    dy,  # [B, P, G * O]
    source,  # [B, P', G * C]
    dkernels,  # [S, T, Go, Gi, co, ci], float32
    index,  # [T, P]
    source_positions,
    positions,
    out_size,
    in_size,
    taps,
    groups,
    cell_out,
    cell_in,
    bucket,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of every sample's kernel, stored cell by cell in float32."""
    tiles_m, tiles_n = tl.cdiv(out_size, BLOCK_M), tl.cdiv(in_size, BLOCK_N)
    pid = tl.program_id(0)
    c = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // tiles_n
    o = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // tiles_m
    tap, sample = pid % taps, pid // taps
    image, group = (sample // groups).to(tl.int64), sample % groups
    o_live, c_live = o < out_size, c < in_size

    dy += image * positions * (groups * out_size) + group * out_size
    source += image * source_positions * (groups * in_size) + group * in_size
    index += tap * positions
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, positions, BLOCK_K):
        p = start + tl.arange(0, BLOCK_K)
        at = tl.load(index + p, mask=p < positions, other=-1)
        grad = tl.load(
            dy + p[None, :] * (groups * out_size) + o[:, None],
            mask=(p < positions)[None, :] & o_live[:, None],
            other=0.0,
        )
        patch = tl.load(
            source + at[:, None] * (groups * in_size) + c[None, :],
            mask=(at >= 0)[:, None] & c_live[None, :],
            other=0.0,
        )
        acc = _dot(grad, patch, acc, PRECISION)

    dkernels += (sample.to(tl.int64) * taps + tap) * (out_size * in_size)
    cell = o[:, None] // cell_out * (in_size // cell_in) + c[None, :] // cell_in
    inside = o[:, None] % cell_out * cell_in + c[None, :] % cell_in
    tl.store(dkernels + cell * (cell_out * cell_in) + inside, acc, mask=o_live[:, None] & c_live[None, :])


@tuned_product("MULTIPLY")
@triton.jit(do_not_specialize=CHANGING)
def multiply(
    a,  # [M, K], any strides
    b,  # [K, N], any strides
    out,  # [splits, M, N], float32
    m_size,
    n_size,
    k_size,
    a_m,
    a_k,
    b_k,
    b_n,
    split,
    bucket,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A product in float32, whose inner dimension is split into parts of 64 * `split`; their sum is computed later."""
    tiles_m, tiles_n = tl.cdiv(m_size, BLOCK_M), tl.cdiv(n_size, BLOCK_N)
    pid = tl.program_id(0)
    m = ((pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    pid = pid // tiles_m
    n = ((pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    part = pid // tiles_n
    m_live, n_live = m < m_size, n < n_size

    first = part * split * 64
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, tl.minimum(first + split * 64, k_size), BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        k_live = k < k_size
        left = tl.load(a + m[:, None] * a_m + k[None, :] * a_k, mask=m_live[:, None] & k_live[None, :], other=0.0)
        right = tl.load(b + k[:, None] * b_k + n[None, :] * b_n, mask=k_live[:, None] & n_live[None, :], other=0.0)
        acc = _dot(left.to(tl.float32), right.to(tl.float32), acc, PRECISION)
    out += part.to(tl.int64) * m_size * n_size
    tl.store(out + m[:, None] * n_size + n[None, :], acc, mask=m_live[:, None] & n_live[None, :])


@tuned_fused("n", "FORWARD", "MIX_PRECISION")
@triton.jit(do_not_specialize=CHANGING)
def mix_and_convolve(
    source,  # [B, P', G * Ki * K]: Ki blocks of K channels per group, those of a cell
    cells,  # [n, co, ci]
    alpha,  # [B, full taps, G * Go, Gi, n]
    target,  # [B, P, G * Ni * N]
    index,  # as in `convolve`
    tap_ids,  # of the full taps
    tap_counts,
    places,
    samples,
    source_positions,
    target_positions,
    k_blocks,
    k_size,
    n_blocks,
    n_size,
    n: tl.constexpr,
    full_taps,
    classes,
    class_taps,
    class_positions,
    groups,
    bucket,
    FORWARD: tl.constexpr,
    MIX_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """`convolve` for BLOCK_S samples, which mixes each tile of their kernels just before it is multiplied.

    (k, n) are (input, output) channels in the forward pass, and (output, input) channels for the input's gradient.
    """
    tiles_n, tiles_p = tl.cdiv(n_size, BLOCK_N), tl.cdiv(class_positions, BLOCK_P)
    tiles_s = tl.cdiv(samples, BLOCK_S)
    pid = tl.program_id(0)
    p = (pid % tiles_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    pid = pid // tiles_p
    # programs that run together read the same cells
    sample = (pid % tiles_s) * BLOCK_S + tl.arange(0, BLOCK_S)
    pid = pid // tiles_s
    kind = pid % classes
    pid = pid // classes
    column = (pid % tiles_n) * BLOCK_N
    n_block = pid // tiles_n
    s_live, p_live = sample < samples, p < class_positions
    image, group = (sample // groups).to(tl.int64), sample % groups

    # a tile of a cell, with input channels innermost
    flat = tl.arange(0, BLOCK_N * BLOCK_K)
    if FORWARD:
        in_n, in_k = flat // BLOCK_K, flat % BLOCK_K
    else:
        in_n, in_k = flat % BLOCK_N, flat // BLOCK_N
    n_live = column + in_n < n_size

    source_row = groups * k_blocks * k_size
    sources = source + image * source_positions * source_row + group * (k_blocks * k_size)
    index += kind * class_taps * class_positions
    tap_ids += kind * class_taps
    dtype: tl.constexpr = cells.dtype.element_ty

    k_tiles = tl.cdiv(k_size, BLOCK_K)
    acc = tl.zeros((BLOCK_S, BLOCK_P, BLOCK_N), tl.float32)
    for step in range(tl.load(tap_counts + kind) * k_blocks * k_tiles):
        tap, k_block = step // (k_blocks * k_tiles), step // k_tiles % k_blocks
        row = (step % k_tiles) * BLOCK_K
        unit = image * full_taps + tl.load(tap_ids + tap)
        if FORWARD:
            unit = ((unit * groups + group) * n_blocks + n_block) * k_blocks + k_block
            place = (column + in_n) * k_size + row + in_k
        else:
            unit = ((unit * groups + group) * k_blocks + k_block) * n_blocks + n_block
            place = (row + in_k) * n_size + column + in_n
        live = n_live & (row + in_k < k_size)

        weights, size = alpha + unit * n, n_size * k_size
        kernel = tl.zeros((BLOCK_S, BLOCK_N * BLOCK_K), tl.float32)
        kernel = _mix(kernel, 0, weights, cells, place, n, size, s_live, live, MIX_PRECISION, BLOCK_J)
        # an inner loop would keep the outer loop from loading ahead, so it exists only where n needs it
        if n > BLOCK_J:
            for start in range(BLOCK_J, n, BLOCK_J):
                kernel = _mix(kernel, start, weights, cells, place, n, size, s_live, live, MIX_PRECISION, BLOCK_J)
        kernel = _round(kernel, dtype)
        if FORWARD:
            kernel = tl.permute(tl.reshape(kernel, (BLOCK_S, BLOCK_N, BLOCK_K)), (0, 2, 1))
        else:
            kernel = tl.reshape(kernel, (BLOCK_S, BLOCK_K, BLOCK_N))

        at = tl.load(index + tap * class_positions + p, mask=p_live, other=-1)
        k = row + tl.arange(0, BLOCK_K)
        patch = tl.load(
            sources[:, None, None] + at[None, :, None] * source_row + (k_block * k_size + k)[None, None, :],
            mask=s_live[:, None, None] & (at >= 0)[None, :, None] & (k < k_size)[None, None, :],
            other=0.0,
        )
        acc = _dot(patch, kernel, acc, PRECISION)

    place = tl.load(places + kind * class_positions + p, mask=p_live, other=-1)
    target_row = groups * n_blocks * n_size
    targets = target + image * target_positions * target_row + (group * n_blocks + n_block) * n_size
    out = column + tl.arange(0, BLOCK_N)
    tl.store(
        targets[:, None, None] + place[None, :, None] * target_row + out[None, None, :],
        _round(acc, target.dtype.element_ty),
        mask=s_live[:, None, None] & (place >= 0)[None, :, None] & (out < n_size)[None, None, :],
    )
