"""Shapes of one call of the mixture convolution, and the patches that its kernels see.

Legend: B batch, C input channels of a group, q = ci * prod(k) numbers that a cell reads per position, T taps (kernel
positions that have cells of their own), P output positions, Go and Gi blocks of output and input channels of a group.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .scratch import scratch

# output positions up to which a map is small: products then have positions as rows, whatever the layout of the input,
# and beat a grouped convolution
SMALL_MAP = 64


@dataclass(frozen=True)
class Geometry:
    """Everything that follows from the shapes of a call, with taps that only ever see padding left out."""

    batch: int
    groups: int
    c_in: int
    g_out: int  # over all groups
    g_in: int
    n: int
    cell: tuple  # (co, ci, *k)
    full_kernel: tuple
    kernel: tuple  # without dead taps
    first_tap: tuple
    per_tap: bool  # cells have no spatial extent: every tap has its own
    pads: tuple  # (left, right) of each dimension; negative ones crop
    stride: tuple
    dilation: tuple
    out: tuple
    last: bool = False  # whether channels of x are innermost in memory

    @property
    def taps(self):
        return math.prod(self.kernel) if self.per_tap else 1

    @property
    def q(self):
        return math.prod(self.cell[1:]) if self.per_tap else self.cell[1] * math.prod(self.kernel)

    @property
    def positions(self):
        return math.prod(self.out)

    @property
    def c_out(self):
        return self.g_out * self.cell[0]

    @property
    def foldable(self):
        """Whether no cell reaches over two groups, so that groups are no more than a larger batch."""
        return self.groups == 1 or (self.g_out % self.groups == 0)


def output_size(spatial, kernel_size, stride, padding, dilation):
    """Output size of a convolution, per dimension."""
    return [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(spatial, kernel_size, stride, padding, dilation, strict=True)
    ]


def live_taps(size, kernel, stride, padding, dilation, out):
    """The positions of a kernel, in one dimension, that see more than padding."""
    taps = range(kernel)
    return [t for t in taps if any(0 <= i * stride + t * dilation - padding < size for i in range(out))]


def geometry(x_shape, alpha_shape, cells_shape, kernel_size, stride, padding, dilation, groups, last=False):
    """The `Geometry` of a call."""
    spatial, (n, *cell) = x_shape[2:], cells_shape
    c_in = x_shape[1] // groups
    per_tap = math.prod(cell[2:]) == 1
    g_in = c_in // cell[1]
    taps = math.prod(k // kc for k, kc in zip(kernel_size, cell[2:], strict=True))
    out = output_size(spatial, kernel_size, stride, padding, dilation)
    kernel, first, pads = [], [], []
    for size, k, s, p, d, o in zip(spatial, kernel_size, stride, padding, dilation, out, strict=True):
        low, high = 0, k
        if per_tap:
            live = live_taps(size, k, s, p, d, o) or [0]
            low, high = live[0], live[-1] + 1
        left = p - low * d
        kernel.append(high - low)
        first.append(low)
        pads.append((left, (o - 1) * s + (high - low - 1) * d + 1 - size - left))
    return Geometry(
        batch=x_shape[0],
        groups=groups,
        c_in=c_in,
        g_out=alpha_shape[1] // (taps * g_in),
        g_in=g_in,
        n=n,
        cell=tuple(cell),
        full_kernel=tuple(kernel_size),
        kernel=tuple(kernel),
        first_tap=tuple(first),
        per_tap=per_tap,
        pads=tuple(pads),
        stride=tuple(stride),
        dilation=tuple(dilation),
        out=tuple(out),
        last=last,
    )


def is_channels_last(x):
    """Whether channels are innermost in memory (as in torch.channels_last, in any number of dimensions)."""
    return x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()


def empty_like_layout(x, channels, out):
    """An empty output [B, channels, *out], channels innermost where the input's are."""
    if is_channels_last(x):
        return x.new_empty(x.shape[0], *out, channels).movedim(-1, 1)
    return x.new_empty(x.shape[0], channels, *out)


def live_alpha(alpha, geo):
    """alpha [B, m, n] -> [B, T, Go, Gi, n] (a view), without the dead taps."""
    if not geo.per_tap:
        return alpha.reshape(geo.batch, 1, geo.g_out, geo.g_in, geo.n)
    alpha = alpha.reshape(geo.batch, *geo.full_kernel, geo.g_out, geo.g_in, geo.n)
    for dim, (first, size) in enumerate(zip(geo.first_tap, geo.kernel, strict=True)):
        alpha = alpha.narrow(dim + 1, first, size)
    return alpha if len(geo.kernel) == 1 else alpha.flatten(1, len(geo.kernel))


def full_alpha(grad, geo):
    """The gradient [B, T, Go, Gi, n] of live taps -> [B, m, n], zero for dead ones."""
    if geo.per_tap and geo.kernel != geo.full_kernel:
        full = grad.new_zeros(geo.batch, *geo.full_kernel, geo.g_out, geo.g_in, geo.n)
        live = full
        for dim, (first, size) in enumerate(zip(geo.first_tap, geo.kernel, strict=True)):
            live = live.narrow(dim + 1, first, size)
        live.copy_(grad.reshape(geo.batch, *geo.kernel, geo.g_out, geo.g_in, geo.n))
        grad = full
    return grad.reshape(geo.batch, -1, geo.n)


def pad(x, geo):
    """x with the padding that the live taps see."""
    if all(p == (0, 0) for p in geo.pads):
        return x
    return F.pad(x, [side for left_right in reversed(geo.pads) for side in left_right])


def unpad(dx, geo):
    """The adjoint of `pad`: the gradient without that of the padding, and with zeros where `pad` crops."""
    crop = [-side for left_right in reversed(geo.pads) for side in left_right]
    return F.pad(dx, crop) if any(crop) else dx


def library_convolution(x, geo):
    """(source, arguments): what PyTorch's convolution reads, and its arguments between the bias and the groups."""
    # the library pads both sides alike, which is right where it finds the same output positions
    dims = zip(x.shape[2:], geo.kernel, geo.stride, geo.dilation, geo.out, geo.pads, strict=True)
    symmetric = all(
        left >= 0 and out == (size + 2 * left - d * (k - 1) - 1) // s + 1 for size, k, s, d, out, (left, _) in dims
    )
    padding = [left if symmetric else 0 for left, _ in geo.pads]
    arguments = (list(geo.stride), padding, list(geo.dilation), False, [0] * len(geo.kernel))
    return x if symmetric else pad(x, geo), arguments


def windows(x, geo):
    """Padded x [B, C, *S] -> a view [B, C, *kernel, *out] of what every tap sees at every position."""
    sizes = [*x.shape[:2], *geo.kernel, *geo.out]
    steps = list(x.stride()[2:])
    strides = [
        *x.stride()[:2],
        *(step * d for step, d in zip(steps, geo.dilation, strict=True)),
        *(step * s for step, s in zip(steps, geo.stride, strict=True)),
    ]
    return x.as_strided(sizes, strides, x.storage_offset())


def patches_are_copies(geo):
    """Whether taps overlap, so that patches cannot be a view of the input."""
    return not (set(geo.kernel) == {1} and set(geo.stride) == {1} and set(geo.pads) == {(0, 0)})


def patches(x, geo, layout):
    """What the kernels see, as a tensor of one of the layouts (letters: k = T * Gi, b, q, p) "kbqp", "kbpq", "bkpq".

    A view where the convolution is point-wise, else a copy.
    """
    dims = len(geo.kernel)
    seen = windows(pad(x, geo), geo).unflatten(1, (geo.g_in, geo.cell[1]))  # [B, Gi, ci, *K, *P]
    seen = seen.permute(_axes(layout, dims, geo.per_tap))
    if patches_are_copies(geo):
        seen = scratch("patches", seen.shape, x).copy_(seen)
    return seen.reshape(_sizes(layout, x.shape[0], geo))


def unpatches(cols, geo, layout, x_shape):
    """The adjoint of `patches`: the sum, at every input position of x_shape, of what was taken from it."""
    dims = len(geo.kernel)
    axes = _axes(layout, dims, geo.per_tap)
    batch, sizes = x_shape[0], [x_shape[0], geo.g_in, geo.cell[1], *geo.kernel, *geo.out]
    inverse = sorted(range(len(axes)), key=axes.__getitem__)
    seen = cols.reshape([sizes[axis] for axis in axes]).permute(inverse)
    if not patches_are_copies(geo):
        return seen.reshape(x_shape)
    padded = [size + left + right for size, (left, right) in zip(x_shape[2:], geo.pads, strict=True)]
    # half precision would round the sum once per tap
    dtype = cols.dtype if cols.dtype == torch.float64 else torch.float32
    if layout.endswith("q"):
        total = cols.new_zeros(batch, *padded, x_shape[1], dtype=dtype).movedim(-1, 1)
    else:
        total = cols.new_zeros(batch, x_shape[1], *padded, dtype=dtype)
    split = total.unflatten(1, (geo.g_in, geo.cell[1]))
    every = (slice(None),) * 3
    # a tap sees distinct positions, so that each is added as one slice
    for tap in itertools.product(*map(range, geo.kernel)):
        where = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s)
            for t, d, o, s in zip(tap, geo.dilation, geo.out, geo.stride, strict=True)
        )
        split[every + where] += seen[every + tap]
    return unpad(total, geo).to(cols.dtype)


def _axes(layout, dims, per_tap):
    """Order of the axes of [B, Gi, ci, *K, *P] that a layout asks for."""
    taps = list(range(3, 3 + dims))
    letters = {
        "b": [0],
        "k": [*taps, 1] if per_tap else [1],
        "q": [2] if per_tap else [2, *taps],
        "p": list(range(3 + dims, 3 + 2 * dims)),
    }
    return [axis for letter in layout for axis in letters[letter]]


def _sizes(layout, batch, geo):
    sizes = {"b": batch, "k": geo.taps * geo.g_in, "q": geo.q, "p": geo.positions}
    return [sizes[letter] for letter in layout]
