"""What the backends "triton" and "triton_fused" share: the launches of their kernels.

Legend: as in `triton_kernels.py`; g groups, m mixtures of cells in a kernel, P' positions of the source.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..geometry import Geometry, full_alpha, live_alpha
from . import triton_support

# Kernels, and their gradients, are made for as many samples at a time as fit into this many bytes.
PIECE_BYTES = 1 << 30
# A product with few output tiles splits its inner dimension into parts of at least SHARE, to run PROGRAMS programs.
PROGRAMS, SHARE = 512, 128


# --- tables of positions ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _tables(size, out, kernel, full_kernel, first_tap, stride, dilation, pads, forward, device):
    """Which positions are read and written, as int32 tensors on a device.

    The forward pass has one class of target positions.  For the input's gradient, positions at the same distance from a
    multiple of the stride form a class: they share their taps, and no products are computed for the taps of others.

    Returns:
        index [classes, T', P'']: the position of the source that a tap sees, or -1; taps, full_taps [classes, T']: the
        taps of a class, numbered among the live ones and among all; counts [classes]: how many taps a class has;
        places [classes, P'']: the positions of the target, or -1.
    """

    def line(values, sizes):
        """Numbers along every dimension -> numbers of the flattened array, in the order of itertools.product."""
        total = torch.zeros(1, dtype=torch.int64)
        for value, length in zip(values, sizes, strict=True):
            total = (total[:, None] * length + value).flatten()
        return total

    with torch.inference_mode(False):
        seen, kind = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        for s, o, k, step, d, (left, _) in zip(size, out, kernel, stride, dilation, pads, strict=True):
            tap, spots = torch.arange(k)[:, None] * d - left, torch.arange(o if forward else s)
            if forward:
                at, length = spots * step + tap, s
            else:
                at, length = (spots - tap) // step, o
                at[(spots - tap) % step != 0] = -1
                kind = (kind[:, None] * step + (spots + left) % step).flatten()
            live = (at >= 0) & (at < length)
            # extend [T, P] of the dimensions so far by this one; -1 stays -1
            at = torch.where(live, at, -1)[None, :, None, :]
            seen = seen[:, None, :, None]
            seen = torch.where((seen >= 0) & (at >= 0), seen * length + at, -1).flatten(2).flatten(0, 1)
        full = line([first + torch.arange(k) for first, k in zip(first_tap, kernel, strict=True)], full_kernel)

        kind = torch.zeros(seen.shape[1], dtype=torch.int64) if forward else kind
        classes = []
        for each in kind.unique():
            places = (kind == each).nonzero().flatten()
            part = seen[:, places]
            taps = torch.arange(len(part)) if forward else (part >= 0).any(1).nonzero().flatten()
            classes.append((places, taps, part[taps]))
        most_taps = max(1, max(len(taps) for _, taps, _ in classes))
        most = max(len(places) for places, _, _ in classes)
        index = torch.full((len(classes), most_taps, most), -1)
        places, taps = torch.full((len(classes), most), -1), torch.zeros(len(classes), most_taps, dtype=torch.int64)
        for i, (place, tap, part) in enumerate(classes):
            places[i, : len(place)], taps[i, : len(tap)] = place, tap
            index[i, : len(tap), : len(place)] = part
        counts = torch.tensor([len(tap) for _, tap, _ in classes])
        return [t.to(torch.int32).contiguous().to(device) for t in (index, taps, full[taps], counts, places)]


# --- a call -----------------------------------------------------------------------------------------------------------


def _precision(backend) -> str:
    """Precision of float32 products, from the user's settings of PyTorch for convolutions or for matrix products."""
    return "tf32" if backend.fp32_precision == "tf32" else "ieee"


def _bucket(samples: int, positions: int, *channels: int) -> int:
    """A key that similar shapes share, so that a slightly different batch does not tune the tiles again."""
    bucket = min(samples.bit_length() - 1, 6) // 3 * 32 + positions.bit_length()
    for count in channels:
        bucket = bucket * 256 + min(-(-count // 32), 255)
    return bucket


def _grid(count: int, **sizes: int) -> Callable[[dict], tuple[int]]:
    """A launch grid of `count` programs for every tile of the named sizes."""
    return lambda meta: (math.prod((count, *(-(-size // meta[f"BLOCK_{name}"]) for name, size in sizes.items()))),)


def _rows(x: Tensor) -> Tensor:
    """x [B, C, *S] -> [B, P', C] with channels innermost in memory; no copy if they are already."""
    return x.movedim(1, -1).contiguous().flatten(1, -2)


class Call:
    """The shapes of one call, and the launches of its kernels.

    Args:
        x: the input, [B, C, *S].
        geo: the geometry of the call.
    """

    def __init__(self, x: Tensor, geo: Geometry) -> None:
        self.geo, self.like = geo, x
        self.g_out = geo.g_out // geo.groups
        self.c_out, self.co, self.ci = self.g_out * geo.cell[0], geo.cell[0], geo.cell[1]
        self.full_taps = math.prod(geo.full_kernel)
        self.conv = _precision(torch.backends.cudnn.conv)
        self.matmul = _precision(torch.backends.cuda.matmul)
        self.kernels = triton_support.kernels()

    def tables(self, forward: bool) -> list[Tensor]:
        """The tables of positions for the forward pass, or for the input's gradient; see `_tables`."""
        geo, size = self.geo, tuple(self.like.shape[2:])
        kernel = (geo.kernel, geo.full_kernel, geo.first_tap, geo.stride, geo.dilation, geo.pads)
        return _tables(size, geo.out, *kernel, forward, self.like.device)

    def pieces(self, item_bytes: int) -> list[tuple[int, int]]:
        """Ranges of images whose kernels, of numbers of `item_bytes` bytes, are made at a time."""
        geo = self.geo
        size = geo.groups * geo.taps * self.c_out * geo.c_in * item_bytes
        pieces = -(-geo.batch // max(1, PIECE_BYTES // size))
        step = -(-geo.batch // pieces)
        return [(i, min(i + step, geo.batch)) for i in range(0, geo.batch, step)]

    def assemble(self, alpha: Tensor, cells: Tensor) -> Tensor:
        """alpha [B, m, n] and cells [n, co, ci, *k] -> kernels of all samples, [S, T, O, C]."""
        geo, samples = self.geo, len(alpha) * self.geo.groups
        kernels = self.like.new_empty(samples, geo.taps, self.c_out, geo.c_in)
        rows, size = samples * geo.taps * self.g_out * geo.g_in, self.co * self.ci
        self.kernels.assemble[_grid(1, M=rows, N=size)](
            alpha, cells, kernels, self.tables(True)[2], rows, geo.n, geo.taps, self.full_taps,
            geo.groups, self.g_out, geo.g_in, self.co, self.ci, _bucket(rows, 1), PRECISION=self.matmul,
        )  # fmt: skip
        return kernels

    def convolve(self, source: Tensor, kernels: Tensor, target: Tensor, forward: bool) -> None:
        """Convolve every sample with its own kernel, or compute the input's gradient.

        Args:
            source: [B, P', g * K], where (K, N) is (C, O) in the forward pass and (O, C) for the input's gradient.
            kernels: [S, T, O, C].
            target: [B, P, g * N], which is written.
            forward: whether this is the forward pass.
        """
        geo, samples = self.geo, len(source) * self.geo.groups
        index, taps, _, counts, places = self.tables(forward)
        k, n = (geo.c_in, self.c_out) if forward else (self.c_out, geo.c_in)
        classes, class_taps, positions = index.shape
        self.kernels.convolve[_grid(samples * classes, M=positions, N=n)](
            source, kernels, target, index, taps, counts, places, source.shape[1], target.shape[1], k, n, geo.taps,
            *((1, k) if forward else (n, 1)), classes, class_taps, positions, geo.groups,
            _bucket(samples, positions, k * class_taps, n), PRECISION=self.conv,
        )  # fmt: skip

    def mix_and_convolve(self, source: Tensor, alpha: Tensor, cells: Tensor, target: Tensor, forward: bool) -> None:
        """`assemble` and `convolve` in one kernel; the arguments are theirs."""
        geo, samples = self.geo, len(source) * self.geo.groups
        index, _, taps, counts, places = self.tables(forward)
        inner, outer = (geo.g_in, self.ci), (self.g_out, self.co)
        (k_blocks, k), (n_blocks, n) = (inner, outer) if forward else (outer, inner)
        classes, class_taps, positions = index.shape
        self.kernels.mix_and_convolve[_grid(classes * n_blocks, S=samples, P=positions, N=n)](
            source, cells, alpha, target, index, taps, counts, places, samples, source.shape[1], target.shape[1],
            k_blocks, k, n_blocks, n, geo.n, self.full_taps, classes, class_taps, positions, geo.groups,
            _bucket(samples, positions, k * class_taps * k_blocks, n), FORWARD=forward,
            MIX_PRECISION=self.matmul, PRECISION=self.conv,
        )  # fmt: skip

    def multiply(self, a: Tensor, b: Tensor, a_m: int, a_k: int, b_k: int, b_n: int, m: int, n: int, k: int) -> Tensor:
        """a [M, K] @ b [K, N] -> [M, N] in float32, for any strides.

        Args:
            a_m, a_k, b_k, b_n: strides of a and b in the dimensions m, k and n.
            m, n, k: sizes M, N and K.
        """
        tiles = -(-m // 64) * -(-n // 128)
        # in units of 64, which the tiles divide
        split = -(-max(k * tiles // PROGRAMS, SHARE) // 64)
        splits = -(-k // (64 * split))
        out = self.like.new_empty(splits, m, n, dtype=torch.float32)
        # tf32 keeps at least as many digits as half precision does
        low = self.like.dtype != torch.float32
        self.kernels.multiply[_grid(splits, M=m, N=n)](
            a, b, out, m, n, k, a_m, a_k, b_k, b_n, split, _bucket(m, split, n),
            PRECISION="tf32" if low else self.matmul,
        )  # fmt: skip
        return out[0] if splits == 1 else out.sum(0)

    def kernel_gradients(
        self, dy: Tensor, source: Tensor, alpha: Tensor, cells: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of alpha and cells in float32, each None unless needed.

        Args:
            dy: [B, P, g * O].
            source: the input, [B, P', g * C].
            alpha: [B, m, n].
            cells: [n, co, ci, *k].
            needs: whether x, alpha and cells need a gradient.
        """
        geo, size = self.geo, self.co * self.ci
        index = self.tables(True)[0]
        rows = live_alpha(alpha, geo).unflatten(2, (geo.groups, -1)).transpose(1, 2).contiguous()
        dalpha, dcells = [], None
        for start, stop in self.pieces(4):
            samples, part = (stop - start) * geo.groups, rows[start:stop]
            count = part.numel() // geo.n
            dkernels = self.like.new_empty(count, size, dtype=torch.float32)
            self.kernels.kernel_gradient[_grid(samples * geo.taps, M=self.c_out, N=geo.c_in)](
                dy[start:stop], source[start:stop], dkernels, index, source.shape[1], geo.positions, self.c_out,
                geo.c_in, geo.taps, geo.groups, self.co, self.ci, _bucket(samples * geo.taps, geo.positions),
                PRECISION=self.conv,
            )  # fmt: skip
            if needs[1]:
                dalpha.append(self.multiply(dkernels, cells, size, 1, 1, size, count, geo.n, size))
            if needs[2]:
                total = self.multiply(part, dkernels, 1, geo.n, size, 1, geo.n, size, count)
                dcells = total if dcells is None else dcells.add_(total)
        if needs[1]:
            dalpha = (dalpha[0] if len(dalpha) == 1 else torch.cat(dalpha)).view(rows.shape)
            dalpha = full_alpha(dalpha.transpose(1, 2).flatten(2, 3), geo)
        return dalpha if needs[1] else None, dcells.view(cells.shape) if needs[2] else None


@triton_support.guarded
def forward(
    convolve: Callable[[Call, Tensor, Tensor, Tensor, Tensor, bool], None],
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    geo: Geometry,
) -> Tensor:
    """The output [B, O, *S'] of the mixture convolution.

    Args:
        convolve: convolve(call, source, alpha, cells, target, forward) of a backend, which fills the target [B, P, N]
            from the source [B, P', K].
        x: [B, C, *S].
        alpha: [B, m, n].
        cells: [n, co, ci, *k].
    """
    with torch.cuda.device_of(x):
        y = x.new_empty(geo.batch, *geo.out, geo.c_out)
        target = y.view(geo.batch, -1, geo.c_out)
        convolve(Call(x, geo), _rows(x), alpha.contiguous(), cells.contiguous(), target, True)
        return y.movedim(-1, 1)


@triton_support.guarded
def backward(
    convolve: Callable[[Call, Tensor, Tensor, Tensor, Tensor, bool], None],
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    geo: Geometry,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, alpha and cells, each None unless needed; the kernels are mixed again.

    Args:
        convolve: as in `forward`.
        dy: gradient of the output, [B, O, *S'].
        x: [B, C, *S].
        alpha: [B, m, n].
        cells: [n, co, ci, *k].
        needs: whether x, alpha and cells need a gradient.
    """
    with torch.cuda.device_of(x):
        call, alpha, cells, dy = Call(x, geo), alpha.contiguous(), cells.contiguous(), _rows(dy)
        dx = dalpha = dcells = None
        if needs[0]:
            dx = x.new_empty(geo.batch, *x.shape[2:], x.shape[1])
            convolve(call, dy, alpha, cells, dx.view(geo.batch, -1, x.shape[1]), False)
            dx = dx.movedim(-1, 1)
        if needs[1] or needs[2]:
            dalpha, dcells = call.kernel_gradients(dy, _rows(x), alpha, cells, needs)
        return dx, dalpha, dcells
