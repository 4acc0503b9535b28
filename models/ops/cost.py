"""Cost model that chooses the fastest backend for a call.

It estimates a backend's time as a sum over its work, with costs that were fitted to measured times, or by the roofline
(`roofline.py`) on a GPU that was not measured.  Times are in microseconds; only their ratios matter.
"""

import math
from collections.abc import Mapping, Sequence

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
        (13700, 133, 324, 1110, 13300, 18000, 102, 4.32, 163),
        (63200, 442, 676, 2560, 27900, 158000, 104, 0, 306),
    ],
    "batched": [
        (14300, 140, 163, 16000, 89.9, 32.6, 0.777, 154),
        (39000, 422, 435, 31600, 167, 119, 17, 220),
    ],
    "mixed": [
        (12400, 96.6, 347, 0, 254),
        (26000, 251, 881, 0, 279),
    ],
    "outputs": [
        (12600, 220, 152, 0, 0),
        (53000, 461, 88, 0, 0),
    ],
    "fused": [
        (11700, 13900, 60.7, 365, 192, 57.7),
        (27600, 42300, 161, 474, 291, 76.6),
    ],
    "depthwise": [
        (40800, 25700, 20.7, 0, 25100, 17, 23.4),
        (84400, 96600, 24, 0, 60600, 0, 59.3),
    ],
    "pointwise": [
        (10600, 17100, 44.4, 71.1, 355, 37.8, 57.5),
        (22500, 43500, 261, 117, 366, 192, 85.5),
    ],
    "streamed": [
        (10500, 14100, 123000, 163, 17.7, 23.1),
        (26300, 43600, 165, 544, 329, 78.2),
    ],
    "winograd": [
        (9870, 15200, 191000, 59.7, 426, 0),
        (12300, 57500, 0, 180, 1210, 0),
    ],
}
# The same in bfloat16: libraries multiply in bfloat16, compiled backends in float32.
CPU_HALF = {
    "grouped": [
        (5660, 267, 447, 1050, 6420, 11300, 215, 9.27, 214),
        (29900, 1010, 1020, 2920, 14700, 137000, 295, 14.8, 402),
    ],
    "batched": [
        (4600, 265, 242, 5760, 243, 33.6, 1.73, 199),
        (12700, 988, 426, 14000, 340, 274, 53.6, 258),
    ],
    "mixed": [
        (5930, 549, 224, 0, 305),
        (12200, 433, 659, 0, 491),
    ],
    "outputs": [
        (7020, 181, 200, 269, 0),
        (24300, 587, 519, 0, 0),
    ],
    "fused": [
        (11900, 13000, 147, 339, 451, 35.2),
        (27500, 39200, 368, 475, 706, 48.1),
    ],
    "depthwise": [
        (37600, 14700, 89.6, 0, 50100, 344, 16.4),
        (88300, 81600, 251, 0, 77400, 650, 46),
    ],
    "pointwise": [
        (12600, 12900, 170, 104, 177, 82.3, 49.3),
        (28400, 41900, 565, 308, 453, 343, 27.9),
    ],
    "streamed": [
        (11300, 13100, 56200, 298, 55.5, 29.3),
        (28400, 38200, 386, 370, 648, 37.2),
    ],
    "winograd": [
        (21000, 11400, 34900, 155, 58.4, 0),
        (31400, 35100, 150000, 709, 932, 0),
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


def work(backend: str, geo: Geometry, item_bytes: int) -> tuple[float, ...]:
    """Amounts of work of a backend in a forward pass, in the order of the costs in `CPU`.

    Args:
        backend: its name.
        item_bytes: bytes of one number.

    Returns:
        Multiply-adds of its products in 1e9, memory traffic in MB, and numbers of calls.
    """
    groups = geo.groups if geo.foldable else 1
    batch, g_out, k = geo.batch * groups, geo.g_out // groups, geo.taps * geo.g_in
    c_out, q, positions = geo.cell[0], geo.q, geo.positions
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
        squares = math.prod(math.ceil(size / 2) for size in geo.out)
        kernels = batch * k * g_out * _filled(c_out, LANES) * _filled(q, LANES) * wide
        return kernels * squares * 16 / 9, kernels * geo.n, kernels, warehouse, moved, 1
    if backend == "depthwise":
        return convolve, mix, as_they_are, turned, geo.batch * geo.c_out / 1e6, warehouse, 1
    if backend == "pointwise":
        return convolve, mix, size, as_they_are, turned, warehouse, 1
    if backend == "streamed":
        kernels = batch * k * g_out * _filled(c_out, LANES) * q * wide
        return kernels * positions, kernels * geo.n, kernels, moved, warehouse, 1
    return _work_of_triton(backend, geo, item_bytes)


def _work_of_triton(backend: str, geo: Geometry, item_bytes: int) -> tuple[float, ...]:
    """`work` of the backends in Triton, where every shape is padded to full tiles."""
    if backend not in ("triton", "triton_fused"):
        raise KeyError(backend)
    groups = geo.groups if geo.foldable else 1
    batch, g_out, k = geo.batch * groups, geo.g_out // groups, geo.taps * geo.g_in
    c_out, q, positions = geo.cell[0], geo.q, geo.positions
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
