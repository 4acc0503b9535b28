"""Cost model that chooses the fastest backend for a call.

It estimates a backend's time as a sum over its work, with costs that were fitted to measured times, or by the roofline
(`roofline.py`) on a GPU that was not measured.  Times are in microseconds; only their ratios matter.
"""

import math
from collections.abc import Mapping, Sequence

from .backends.pointwise import samples_at_a_time
from .backends.winograd import squares_of
from .fitted_costs import capability, fitted_costs
from .geometry import Geometry, patches_are_copies
from .peaks import gpu_peak
from .roofline import roofline
from .scratch import LIMIT_BYTES

GIGA, MB = 1e9, 1 << 20
LANES = 16  # numbers in a vector register
TILE = 16  # rows, columns and inner size of the tiles that tensor cores multiply
# backends whose backward pass is that of another
BACKWARD_OF = {"streamed": "fused"}

# Microseconds per unit of each amount that `work` returns: (forward pass, backward pass).
# CPU: measured by `python scripts/fit_costs.py` with 2 threads on x86-64 server cores with AVX-512.
CPU = {
    "grouped": [
        (13500, 134, 377, 939, 14100, 21900, 90.7, 0, 159),
        (61700, 439, 726, 2220, 28400, 154000, 120, 0, 246),
    ],
    "batched": [
        (19100, 147, 115, 15000, 98, 51.4, 0, 109),
        (43100, 427, 399, 31400, 124, 179, 6.12, 188),
    ],
    "mixed": [
        (12700, 102, 251, 0, 245),
        (25000, 305, 721, 0, 449),
    ],
    "outputs": [
        (21000, 98.9, 0, 0, 0),
        (69500, 84.2, 0, 0, 0),
    ],
    "fused": [
        (13300, 14200, 54.4, 368, 146, 76.9),
        (29800, 43500, 122, 538, 274, 106),
    ],
    "depthwise": [
        (42300, 25400, 31.7, 0, 35300, 0, 19.6),
        (86600, 100000, 46.7, 0, 85400, 0, 46.2),
    ],
    "pointwise": [
        (13500, 14600, 53, 36.2, 203, 37.2, 49.6),
        (25700, 50800, 229, 80.8, 267, 132, 50.8),
    ],
    "streamed": [
        (11000, 13100, 232000, 141, 15.2, 6.51),
        (29300, 45000, 131, 434, 312, 40.1),
    ],
    "winograd": [
        (11800, 12900, 134000, 63.8, 391, 0),
        (26500, 49100, 189000, 129, 764, 0),
    ],
}
# The same in bfloat16: libraries multiply in bfloat16, compiled backends in float32.
CPU_HALF = {
    "grouped": [
        (4110, 216, 666, 1440, 7370, 25800, 203, 1.87, 189),
        (19600, 888, 1560, 2940, 16000, 190000, 304, 0, 274),
    ],
    "batched": [
        (2810, 250, 305, 6940, 229, 10.6, 3.1, 160),
        (9570, 977, 538, 16200, 294, 218, 51.9, 154),
    ],
    "mixed": [
        (8080, 458, 105, 0, 237),
        (16700, 267, 353, 0, 421),
    ],
    "outputs": [
        (8800, 220, 1.61, 560, 0),
        (29200, 618, 0, 1110, 0),
    ],
    "fused": [
        (14400, 12200, 134, 416, 308, 18.4),
        (31900, 37000, 377, 493, 529, 0),
    ],
    "depthwise": [
        (0, 33000, 174, 451, 34100, 210, 12.3),
        (88200, 111000, 233, 0, 57600, 1110, 0),
    ],
    "pointwise": [
        (12800, 13400, 110, 81.4, 292, 81.6, 29.9),
        (27900, 34200, 386, 260, 674, 395, 0),
    ],
    "streamed": [
        (13300, 9770, 223000, 273, 41.4, 6.09),
        (32700, 37200, 345, 426, 498, 0),
    ],
    "winograd": [
        (19000, 9790, 199000, 125, 491, 74.2),
        (32900, 39800, 247000, 482, 1190, 254),
    ],
}


def _table(device: str, item_bytes: int) -> Mapping[str, Sequence[Sequence[float]]] | None:
    """The fitted costs of a type of device; None for a GPU that was not measured, which `roofline.py` estimates."""
    if device == "cuda":
        return fitted_costs(capability(), item_bytes)
    return CPU_HALF if item_bytes == 2 else CPU


def _filled(size: int, tile: int) -> int:
    """The size, rounded up to whole tiles."""
    return math.ceil(size / tile) * tile


def _folded(geo: Geometry) -> tuple[int, int, int]:
    """Samples, blocks of outputs, and taps times blocks of inputs, where groups are samples if they can be."""
    groups = geo.groups if geo.foldable else 1
    return geo.batch * groups, geo.g_out // groups, geo.taps * geo.g_in


def work(backend: str, geo: Geometry, item_bytes: int) -> tuple[float, ...]:
    """Amounts of work of a backend in a forward pass, in the order of the costs in `CPU`.

    Args:
        backend: its name.
        item_bytes: bytes of one number.

    Returns:
        Multiply-adds of its products in 1e9, memory traffic in MB, and numbers of calls.
    """
    (batch, g_out, k), c_out, q, positions = _folded(geo), geo.cell[0], geo.q, geo.positions
    kernels = batch * g_out * c_out * k * q
    # numbers that are twice as wide take twice as long
    wide = max(1, item_bytes / 4) / GIGA
    size = kernels * item_bytes / MB
    mix, convolve = kernels * geo.n * wide, kernels * positions * wide
    warehouse = geo.n * c_out * q * item_bytes / MB
    # inputs and outputs that already have the layout of a compiled backend, and those that it has to transpose
    moved = geo.batch * positions * (geo.c_out + geo.groups * geo.g_in * q) * item_bytes / MB
    as_they_are, turned = (moved, 0) if geo.last == (backend == "fused") else (0, moved)
    if backend == "grouped":
        fresh = size * MB > LIMIT_BYTES
        # libraries convolve groups more slowly
        dense, sparse = (convolve, 0) if geo.groups == 1 else (0, convolve)
        return mix, warehouse, size * (not fresh), size * fresh, dense, sparse, moved, geo.batch, 1
    if backend == "batched":
        patches = batch * k * q * positions * item_bytes / MB if patches_are_copies(geo) else 0
        # every product but the first is added to the output in memory
        sums = (k - 1) * batch * g_out * c_out * positions * item_bytes / MB
        return mix, warehouse, size, convolve, patches, sums, k, 1
    if backend == "mixed":
        mixed = batch * g_out * geo.n * positions * q
        return mixed * (k + c_out) * wide, warehouse, mixed * item_bytes / MB, geo.n, 1
    if backend == "outputs":
        cells = geo.n * batch * c_out * positions
        return cells * q * wide, warehouse, cells * item_bytes / MB, moved, 1
    if backend == "fused":
        # channels are padded to whole registers, and short products wait for their operands
        kernels = batch * k * g_out * _filled(c_out, LANES) * _filled(q, LANES) * wide
        short = max(1, 6 / max(1, batch * g_out * k))
        return kernels * max(positions, 4), kernels * geo.n * short, warehouse, as_they_are, turned, 1
    if backend == "winograd":
        # 16 products for every 2 x 2 outputs of 3 x 3 taps; transforming inputs and outputs takes time in proportion
        squares = math.prod(squares_of(geo.out))
        kernels = batch * k * g_out * _filled(c_out, LANES) * _filled(q, LANES) * wide
        return kernels * squares * 16 / 9, kernels * geo.n, kernels, warehouse, moved, 1
    if backend == "depthwise":
        return convolve, mix, as_they_are, turned, geo.batch * geo.c_out / 1e6, warehouse, 1
    if backend == "pointwise":
        # the warehouse is read for every piece of the batch whose kernels fit the last cache
        pieces = math.ceil(geo.batch / samples_at_a_time(geo, max(4, item_bytes)))
        return convolve, mix, size, as_they_are, turned, warehouse * pieces, 1
    if backend == "streamed":
        kernels = batch * k * g_out * _filled(c_out, LANES) * q * wide
        return kernels * positions, kernels * geo.n, kernels, moved, warehouse, 1
    return _work_of_triton(backend, geo, item_bytes)


def _work_of_triton(backend: str, geo: Geometry, item_bytes: int) -> tuple[float, ...]:
    """`work` of the backends in Triton, where every shape is padded to full tiles."""
    if backend not in ("triton", "triton_fused"):
        raise KeyError(backend)
    (batch, g_out, k), c_out, q, positions = _folded(geo), geo.cell[0], geo.q, geo.positions
    size = batch * g_out * c_out * k * q * item_bytes / MB
    kernels = batch * k * g_out * _filled(c_out, TILE) * _filled(q, TILE) * (1 if item_bytes < 4 else 4) / GIGA
    mix = kernels * _filled(geo.n, TILE)
    if backend == "triton":
        return mix, kernels * _filled(positions, TILE), size, 1
    # "triton_fused" mixes the kernels again for every 64 positions, 16 samples at a time
    full = _filled(batch, TILE) / max(1, batch)
    return mix * math.ceil(positions / 64) * full, kernels * _filled(positions, TILE) * full, 1


def work_of(backend: str, geo: Geometry, item_bytes: int, backward: bool) -> tuple[float, ...]:
    """Amounts of work of a pass, in the order of its costs: those of `work`, or of the backend that it is done by."""
    return work(BACKWARD_OF.get(backend, backend) if backward else backend, geo, item_bytes)


def estimate(backend: str, geo: Geometry, item_bytes: int, device: str, backward: bool = False) -> float:
    """Estimated microseconds of a pass: by the fitted costs, or by the roofline on a GPU that was not measured.

    Infinite for a backend that the fitted costs do not have.
    """
    table = _table(device, item_bytes)
    if table is None:
        return roofline(backend, geo, item_bytes, gpu_peak(capability()), backward=backward)
    costs = table.get(backend)
    if costs is None:
        return math.inf
    return sum(a * b for a, b in zip(work_of(backend, geo, item_bytes, backward), costs[backward], strict=True))


def cheapest(geo: Geometry, available: Sequence[str], item_bytes: int, device: str, backward: bool = False) -> str:
    """The available backend of least estimated cost; in float64 the one that rounds as the definition does ("grouped").

    float64 is for comparisons, and deep networks amplify a rounding error of 1e-16 up to 1e10 times.
    """
    if item_bytes == 8 and "grouped" in available:
        return "grouped"
    if "pointwise" in available and not geo.last and item_bytes > 2:
        # "pointwise" computes the same products as these two, in one call and without copies
        available = [backend for backend in available if backend not in ("grouped", "batched")]
    if "depthwise" in available and math.prod(geo.kernel) == 1:
        # oneDNN takes 100 times as long for depth-wise convolutions of one tap, which occur on maps of one pixel
        available = [backend for backend in available if backend != "grouped"]
    return min(available, key=lambda backend: estimate(backend, geo, item_bytes, device, backward))
