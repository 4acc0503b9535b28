"""Shapes of one call of the mixture convolution, and the patches that its kernels see.

Legend: B batch, C input channels of a group, n cells of shape [co, ci, *k], m mixtures of cells in a kernel,
q = ci * prod(k) numbers that a cell reads per position, T taps (kernel positions with their own cells), P output
positions, Go and Gi blocks of co output and ci input channels of a group.  A dead tap sees only padding.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .scratch import scratch

# A map is small up to this many output positions: products then have positions as rows in every layout of the input,
# and are faster than a grouped convolution.
SMALL_MAP = 64


@dataclass(frozen=True)
class Geometry:
    """Everything that follows from the shapes of a call.

    If every tap has its own cells, dead taps at the borders of the kernel are left out.
    """

    batch: int
    groups: int
    c_in: int  # of a group
    g_out: int  # over all groups
    g_in: int  # of a group
    n: int
    cell: tuple[int, ...]  # (co, ci, *k)
    full_kernel: tuple[int, ...]
    kernel: tuple[int, ...]  # without dead taps
    first_tap: tuple[int, ...]  # where `kernel` begins in `full_kernel`
    per_tap: bool  # whether cells have no spatial extent, so that every tap has its own
    pads: tuple[tuple[int, int], ...]  # (left, right) of each dimension; negative ones crop
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    out: tuple[int, ...]  # spatial size of the output
    last: bool = False  # whether channels of x are innermost in memory

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Caches look a geometry up at every call, so its hash is computed only once."""
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @property
    def taps(self) -> int:
        """T; 1 if a cell covers the whole kernel."""
        return math.prod(self.kernel) if self.per_tap else 1

    @property
    def q(self) -> int:
        """Numbers that a cell reads per position."""
        return math.prod(self.cell[1:]) if self.per_tap else self.cell[1] * math.prod(self.kernel)

    @property
    def positions(self) -> int:
        """P, the output positions."""
        return math.prod(self.out)

    @property
    def c_out(self) -> int:
        """Output channels of all groups."""
        return self.g_out * self.cell[0]

    @property
    def foldable(self) -> bool:
        """Whether every cell lies within one group, so that groups can be treated as a larger batch."""
        return self.groups == 1 or (self.g_out % self.groups == 0)


def output_size(
    spatial: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Output size of a convolution, per dimension."""
    return [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(spatial, kernel_size, stride, padding, dilation, strict=True)
    ]


def live_taps(size: int, kernel: int, stride: int, padding: int, dilation: int, out: int) -> list[int]:
    """The positions of a kernel, in one dimension, that see more than padding."""
    taps = range(kernel)
    return [t for t in taps if any(0 <= i * stride + t * dilation - padding < size for i in range(out))]


def geometry(
    x_shape: Sequence[int],
    alpha_shape: Sequence[int],
    cells_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    last: bool = False,
) -> Geometry:
    """The `Geometry` of a call; `last` tells whether the channels of x are innermost in memory."""
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


def live_alpha(alpha: Tensor, geo: Geometry) -> Tensor:
    """alpha [B, m, n] -> [B, T, Go, Gi, n] without the dead taps, Go over all groups; a view where memory allows it."""
    if not geo.per_tap or geo.kernel == geo.full_kernel:
        return alpha.reshape(geo.batch, geo.taps, geo.g_out, geo.g_in, geo.n)
    alpha = alpha.reshape(geo.batch, *geo.full_kernel, geo.g_out, geo.g_in, geo.n)
    for dim, (first, size) in enumerate(zip(geo.first_tap, geo.kernel, strict=True)):
        alpha = alpha.narrow(dim + 1, first, size)
    return alpha if len(geo.kernel) == 1 else alpha.flatten(1, len(geo.kernel))


def full_alpha(grad: Tensor, geo: Geometry) -> Tensor:
    """The gradient [B, T, Go, Gi, n] of the live taps -> [B, m, n], with zeros for the dead ones."""
    if geo.per_tap and geo.kernel != geo.full_kernel:
        full = grad.new_zeros(geo.batch, *geo.full_kernel, geo.g_out, geo.g_in, geo.n)
        live = full
        for dim, (first, size) in enumerate(zip(geo.first_tap, geo.kernel, strict=True)):
            live = live.narrow(dim + 1, first, size)
        live.copy_(grad.reshape(geo.batch, *geo.kernel, geo.g_out, geo.g_in, geo.n))
        grad = full
    return grad.reshape(geo.batch, -1, geo.n)


def pad(x: Tensor, geo: Geometry) -> Tensor:
    """x with the padding that the live taps see; negative padding crops."""
    if all(p == (0, 0) for p in geo.pads):
        return x
    return F.pad(x, [side for left_right in reversed(geo.pads) for side in left_right])


def unpad(dx: Tensor, geo: Geometry) -> Tensor:
    """The adjoint of `pad`: remove the gradient of the padding, and insert zeros where `pad` crops."""
    crop = [-side for left_right in reversed(geo.pads) for side in left_right]
    return F.pad(dx, crop) if any(crop) else dx


def library_convolution(x: Tensor, geo: Geometry) -> tuple[Tensor, tuple]:
    """(source, arguments) of PyTorch's convolution: its input, and its arguments between the bias and the groups."""
    # the library pads both sides by the same amount, which is right only where that gives the same output positions
    dims = zip(x.shape[2:], geo.kernel, geo.stride, geo.dilation, geo.out, geo.pads, strict=True)
    symmetric = all(
        left >= 0 and out == (size + 2 * left - d * (k - 1) - 1) // s + 1 for size, k, s, d, out, (left, _) in dims
    )
    padding = [left if symmetric else 0 for left, _ in geo.pads]
    arguments = (list(geo.stride), padding, list(geo.dilation), False, [0] * len(geo.kernel))
    return x if symmetric else pad(x, geo), arguments


def windows(x: Tensor, geo: Geometry) -> Tensor:
    """Padded x [B, C, *S] -> a view [B, C, *kernel, *out] of what every tap sees at every position."""
    sizes = [*x.shape[:2], *geo.kernel, *geo.out]
    steps = list(x.stride()[2:])
    strides = [
        *x.stride()[:2],
        *(step * d for step, d in zip(steps, geo.dilation, strict=True)),
        *(step * s for step, s in zip(steps, geo.stride, strict=True)),
    ]
    return x.as_strided(sizes, strides, x.storage_offset())


def patches_are_copies(geo: Geometry) -> bool:
    """Whether `patches` must copy: always, except for point-wise convolutions of stride 1 without padding."""
    return not (set(geo.kernel) == {1} and set(geo.stride) == {1} and set(geo.pads) == {(0, 0)})


def patches(x: Tensor, geo: Geometry, layout: str) -> Tensor:
    """What the kernels see: a copy in scratch memory if `patches_are_copies`, else a view.

    Args:
        x: [B, C, *S], where the groups are part of the batch.
        layout: order of the dimensions, "kbqp", "kbpq" or "bkpq", where k = T * Gi, b = B, p = P.
    """
    dims = len(geo.kernel)
    seen = windows(pad(x, geo), geo).unflatten(1, (geo.g_in, geo.cell[1]))  # [B, Gi, ci, *K, *P]
    seen = seen.permute(_axes(layout, dims, geo.per_tap))
    if patches_are_copies(geo):
        seen = scratch("patches", seen.shape, x).copy_(seen)
    return seen.reshape(_sizes(layout, x.shape[0], geo))


def unpatches(cols: Tensor, geo: Geometry, layout: str, x_shape: Sequence[int]) -> Tensor:
    """The adjoint of `patches`: for every input position, the sum over all of its copies.

    Args:
        cols: gradient of the patches.
        layout: that of `cols`, as in `patches`.
        x_shape: shape of the result, [B, C, *S].
    """
    dims = len(geo.kernel)
    axes = _axes(layout, dims, geo.per_tap)
    batch, sizes = x_shape[0], [x_shape[0], geo.g_in, geo.cell[1], *geo.kernel, *geo.out]
    inverse = sorted(range(len(axes)), key=axes.__getitem__)
    seen = cols.reshape([sizes[axis] for axis in axes]).permute(inverse)
    if not patches_are_copies(geo):
        return seen.reshape(x_shape)
    padded = [size + left + right for size, (left, right) in zip(x_shape[2:], geo.pads, strict=True)]
    # in half precision the sum would be rounded once per tap
    dtype = cols.dtype if cols.dtype == torch.float64 else torch.float32
    if layout.endswith("q"):
        total = cols.new_zeros(batch, *padded, x_shape[1], dtype=dtype).movedim(-1, 1)
    else:
        total = cols.new_zeros(batch, x_shape[1], *padded, dtype=dtype)
    split = total.unflatten(1, (geo.g_in, geo.cell[1]))
    every = (slice(None),) * 3
    # a tap sees every position at most once, so its gradient is added as one slice
    for tap in itertools.product(*map(range, geo.kernel)):
        where = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s)
            for t, d, o, s in zip(tap, geo.dilation, geo.out, geo.stride, strict=True)
        )
        split[every + where] += seen[every + tap]
    return unpad(total, geo).to(cols.dtype)


def _axes(layout: str, dims: int, per_tap: bool) -> list[int]:
    """The permutation of the axes [B, Gi, ci, *K, *P] that a layout needs."""
    taps = list(range(3, 3 + dims))
    letters = {
        "b": [0],
        "k": [*taps, 1] if per_tap else [1],
        "q": [2] if per_tap else [2, *taps],
        "p": list(range(3 + dims, 3 + 2 * dims)),
    }
    return [axis for letter in layout for axis in letters[letter]]


def _sizes(layout: str, batch: int, geo: Geometry) -> list[int]:
    sizes = {"b": batch, "k": geo.taps * geo.g_in, "q": geo.q, "p": geo.positions}
    return [sizes[letter] for letter in layout]
