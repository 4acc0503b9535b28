"""What the compiled backends read of x: which positions, with which padding, and where every window begins."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Geometry
from ..layout import in_layout, is_channels_last


class Windows:
    """The positions of x that a call reads, and tables of them, counted in positions.

    Args:
        size: of x.
        geo: of the call.
    """

    def __init__(self, size: tuple[int, ...], geo: Geometry) -> None:
        # the positions of x that are read, the sizes of x with its padding, strides in it, and the padding before x
        self._seen, sizes, steps, before = (), (), (), ()
        for length, k, s, out, (left, right) in zip(size, geo.kernel, geo.stride, geo.out, geo.pads, strict=True):
            # positions that the stride skips are not copied
            step = s if k == 1 and left <= 0 and right <= 0 else 1
            self._seen += (slice(max(-left, 0), length - max(-right, 0), step),)
            sizes += (out if step == s and k == 1 else length + left + right,)
            steps, before = (*steps, s // step), (*before, max(left, 0))
        read = tuple(len(range(*seen.indices(length))) for seen, length in zip(self._seen, size, strict=True))
        self._all_seen, self.padded = read == size, sizes != read
        self.inputs, self.rows = math.prod(read), math.prod(sizes)
        ones = (1,) * len(size)
        with torch.inference_mode(False):
            # of every output's window, of the taps in a window, and of the positions of x
            self.position = offsets(geo.out, steps, sizes)
            self.tap = offsets(geo.kernel, geo.dilation, sizes)
            self.seen = offsets(read, ones, sizes, before)

    def read(self, x: Tensor) -> Tensor:
        """The part of x that is read, with channels innermost in memory if those of x are, without gaps."""
        last = is_channels_last(x)
        if not self._all_seen:
            x = x[(..., *self._seen)]
        return in_layout(x, last)

    def unread(self, seen: Tensor, x: Tensor) -> Tensor:
        """The gradient of x from that of the part that is read."""
        if self._all_seen:
            return seen
        dx = torch.zeros_like(x)
        dx[(..., *self._seen)] = seen
        return dx


def offsets(
    counts: Sequence[int], steps: Sequence[int], sizes: Sequence[int], first: Sequence[int] | None = None
) -> Tensor:
    """Offsets of a grid of positions in a map.

    Args:
        counts: size of the grid.
        steps: between two neighbours of the grid, for every dimension.
        sizes: of the map.
        first: the first position of the grid; all zeros by default.
    """
    total = torch.zeros(1, dtype=torch.int64)
    lines = [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]
    for count, step, line, start in zip(counts, steps, lines, first or [0] * len(lines), strict=True):
        total = (total[:, None] + (start + torch.arange(count) * step) * line).flatten()
    return total.contiguous()
