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
        (22300, 145, 378, 1210, 12900, 14900, 144, 0, 142),
        (92800, 518, 629, 2500, 28200, 203000, 179, 0, 257),
    ],
    "batched": [
        (23200, 150, 102, 17300, 106, 46.9, 0, 159),
        (58300, 494, 277, 32400, 239, 171, 0, 308),
    ],
    "mixed": [
        (10400, 124, 413, 3.36, 269),
        (22700, 379, 1000, 0, 463),
    ],
    "outputs": [
        (18000, 146, 0, 820, 0),
        (69500, 215, 0, 0, 0),
    ],
    "fused": [
        (13600, 15200, 65.4, 267, 202, 39.6),
        (30500, 45600, 146, 294, 384, 18.9),
    ],
    "depthwise": [
        (40800, 24700, 50.9, 0, 30400, 143, 17.1),
        (72900, 114000, 73.6, 0, 88600, 180, 42.1),
    ],
    "pointwise": [
        (12400, 14100, 152, 77.4, 215, 29.4, 40),
        (25100, 48200, 443, 151, 261, 176, 27.9),
    ],
    "streamed": [
        (12000, 15600, 89100, 158, 22.6, 0.122),
        (32100, 44400, 190, 327, 328, 14.3),
    ],
}
# The same in bfloat16: libraries multiply in bfloat16, compiled backends in float32.
CPU_HALF = {
    "grouped": [
        (7300, 212, 508, 1010, 6720, 24900, 197, 0, 306),
        (42500, 759, 983, 1710, 14400, 149000, 297, 0, 536),
    ],
    "batched": [
        (5510, 234, 209, 7080, 177, 23.3, 0, 216),
        (19400, 896, 238, 17200, 198, 228, 67.5, 303),
    ],
    "mixed": [
        (4790, 570, 370, 0, 307),
        (10800, 593, 908, 0, 315),
    ],
    "outputs": [
        (4780, 296, 392, 0, 0),
        (15000, 2210, 882, 0, 0),
    ],
    "fused": [
        (10600, 13200, 152, 773, 749, 70.1),
        (24700, 41200, 740, 1180, 1290, 32.2),
    ],
    "depthwise": [
        (46400, 19200, 31.9, 0, 26500, 191, 71.6),
        (110000, 102000, 133, 0, 49900, 991, 116),
    ],
    "pointwise": [
        (11700, 16600, 15.5, 107, 313, 92.1, 60),
        (15200, 58700, 162, 500, 1200, 472, 81.1),
    ],
    "streamed": [
        (10900, 13000, 82000, 310, 46.2, 46.4),
        (26900, 41500, 638, 926, 1140, 80.3),
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
    if backend == "depthwise":
        return convolve, mix, as_they_are, turned, geo.batch * geo.c_out / 1e6, warehouse, 1
    if backend == "pointwise":
        return convolve, mix, size, as_they_are, turned, warehouse, 1
    if backend == "streamed":
        kernels = batch * k * g_out * _filled(c_out, LANES) * q * wide
        return kernels * positions, kernels * geo.n, kernels, moved, warehouse, 1
    if backend not in ("triton", "triton_fused"):
        raise KeyError(backend)
    # Triton: every shape is padded to full tiles
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
