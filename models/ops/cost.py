"""Which backend evaluates a call soonest: the estimated time of every backend is a sum over what it does.

The unit is the microsecond.  Only ratios matter.
"""

import math

from .geometry import Geometry, patches_are_copies
from .scratch import LIMIT_BYTES

GIGA, MB = 1e9, 1 << 20
LANES = 16  # of a vector register
TILE = 16  # rows, columns and inner sizes of tiles that tensor cores multiply

# microseconds for what `work` counts, (forward pass, backward pass)
# cpu: `python scripts/fit_costs.py` with 2 threads on x86-64 server cores with AVX-512
CPU = {
    "grouped": [
        (17500, 196, 302, 1150, 12800, 17100, 113, 0, 145),
        (69500, 610, 558, 2520, 27100, 200000, 106, 0, 182),
    ],
    "batched": [
        (16700, 182, 114, 16400, 79, 25.3, 0, 128),
        (48300, 613, 303, 30900, 181, 122, 15.7, 120),
    ],
    "mixed": [
        (13200, 150, 325, 0, 24),
        (27100, 377, 910, 0, 0),
    ],
    "outputs": [
        (11600, 501, 103, 0, 0),
        (54600, 888, 0, 1030, 0),
    ],
    "fused": [
        (11200, 14700, 78.5, 262, 302, 65.6),
        (27300, 44900, 349, 323, 559, 20.1),
    ],
    "depthwise": [
        (0, 22900, 92.1, 242, 19300, 228, 44.8),
        (70200, 97200, 78.4, 0, 52600, 582, 66.7),
    ],
    "pointwise": [
        (10900, 17300, 27.1, 74.7, 273, 80.4, 62.7),
        (20700, 53700, 122, 167, 361, 296, 42.6),
    ],
}
# the same with `--dtype bfloat16 --cases 8`: libraries multiply in it, compiled backends in float32
CPU_HALF = {
    "grouped": [
        (6530, 132, 417, 1150, 7370, 19900, 180, 0, 280),
        (28800, 732, 809, 2520, 15300, 104000, 285, 0, 519),
    ],
    "batched": [
        (3100, 155, 234, 6670, 203, 23.3, 0, 228),
        (7710, 737, 381, 20000, 48.5, 242, 54.6, 341),
    ],
    "mixed": [
        (6220, 328, 344, 0, 230),
        (13300, 180, 564, 0, 332),
    ],
    "outputs": [
        (4720, 162, 202, 697, 131),
        (14800, 1240, 44.2, 3610, 0),
    ],
    "fused": [
        (12200, 14300, 219, 333, 600, 116),
        (29600, 42900, 702, 337, 1020, 125),
    ],
    "depthwise": [
        (51100, 20700, 122, 0, 7540, 0, 99.5),
        (88100, 100000, 176, 0, 13300, 0, 166),
    ],
    "pointwise": [
        (14100, 9720, 126, 142, 275, 290, 61.7),
        (25900, 39800, 231, 328, 402, 581, 90.3),
    ],
}
# not measured: set from the memory bandwidth and peak rate of a data-centre GPU, where cuDNN's grouped convolution of
# one sample's kernel each is the slow part.  Backends that are missing are chosen only by name
CUDA = {
    "grouped": [(10, 0.5, 20.5, 20.5, 10, 10, 1, 0, 20)] * 2,
    "batched": [(10, 0.5, 0.5, 10, 1, 0.5, 5, 15)] * 2,
    "mixed": [(10, 0.5, 1, 5, 20)] * 2,
    "outputs": [(10, 0.5, 2, 1, 15)] * 2,
}


def _costs(device, item_bytes):
    return CUDA if device == "cuda" else CPU_HALF if item_bytes == 2 else CPU


def _filled(size, tile):
    """A size, filled up to whole tiles."""
    return math.ceil(size / tile) * tile


def work(backend, geo: Geometry, item_bytes):
    """What a backend has to do in a forward pass: 1e9 multiply-adds of its products, MB that it moves, calls."""
    groups = geo.groups if geo.foldable else 1
    batch, g_out, k = geo.batch * groups, geo.g_out // groups, geo.taps * geo.g_in
    c_out, q, positions = geo.cell[0], geo.q, geo.positions
    kernels = batch * g_out * c_out * k * q
    # twice as wide numbers take twice as long
    wide = max(1, item_bytes / 4) / GIGA
    size = kernels * item_bytes / MB
    mix, convolve = kernels * geo.n * wide, kernels * positions * wide
    warehouse = geo.n * c_out * q * item_bytes / MB
    # inputs and outputs, where they are as a compiled backend wants them and where they are turned around
    moved = geo.batch * positions * (geo.c_out + geo.groups * geo.g_in * q) * item_bytes / MB
    as_they_are, turned = (moved, 0) if geo.last == (backend == "fused") else (0, moved)
    if backend == "grouped":
        fresh = size * MB > LIMIT_BYTES
        # libraries convolve groups more slowly
        dense, sparse = (convolve, 0) if geo.groups == 1 else (0, convolve)
        return mix, warehouse, size * (not fresh), size * fresh, dense, sparse, moved, geo.batch, 1
    if backend == "batched":
        patches = batch * k * q * positions * item_bytes / MB if patches_are_copies(geo) else 0
        # every product but the first adds to the output in memory
        sums = (k - 1) * batch * g_out * c_out * positions * item_bytes / MB
        return mix, warehouse, size, convolve, patches, sums, k, 1
    if backend == "mixed":
        mixed = batch * g_out * geo.n * positions * q
        return mixed * (k + c_out) * wide, warehouse, mixed * item_bytes / MB, geo.n, 1
    if backend == "outputs":
        cells = geo.n * batch * c_out * positions
        return cells * q * wide, warehouse, cells * item_bytes / MB, moved, 1
    if backend == "fused":
        # channels fill whole registers, and short products wait for their operands
        kernels = batch * k * g_out * _filled(c_out, LANES) * _filled(q, LANES) * wide
        short = max(1, 6 / max(1, batch * g_out * k))
        return kernels * max(positions, 4), kernels * geo.n * short, warehouse, as_they_are, turned, 1
    if backend == "depthwise":
        return convolve, mix, as_they_are, turned, geo.batch * geo.c_out / 1e6, warehouse, 1
    if backend == "pointwise":
        return convolve, mix, size, as_they_are, turned, warehouse, 1
    # Triton: tiles are full, whatever the shape
    kernels = batch * k * g_out * _filled(c_out, TILE) * _filled(q, TILE) * (1 if item_bytes < 4 else 4) / GIGA
    mix = kernels * _filled(geo.n, TILE)
    if backend == "triton":
        return mix, kernels * _filled(positions, TILE), size, 1
    # mixed anew for every 64 positions, for 16 samples at a time
    full = _filled(batch, TILE) / max(1, batch)
    return mix * math.ceil(positions / 64) * full, kernels * _filled(positions, TILE) * full, 1


def estimate(backend, geo, item_bytes, device, backward=False):
    """Estimated microseconds of a pass."""
    costs = _costs(device, item_bytes).get(backend)
    if costs is None:
        return math.inf
    return sum(a * b for a, b in zip(work(backend, geo, item_bytes), costs[backward], strict=True))


def cheapest(geo, available, item_bytes, device, backward=False):
    """The backend of least estimated cost; in float64 the one that rounds as the definition does.

    That type is for comparisons, and deep networks amplify a rounding of 1e-16 up to 1e10 times.
    """
    if item_bytes == 8 and "grouped" in available:
        return "grouped"
    if "pointwise" in available and not geo.last and item_bytes > 2:
        # the same products as theirs, in one call and without copies
        available = [backend for backend in available if backend not in ("grouped", "batched")]
    if "depthwise" in available and math.prod(geo.kernel) == 1:
        # oneDNN's depth-wise convolutions of one tap, as on maps of one pixel, take 100 times as long
        available = [backend for backend in available if backend != "grouped"]
    return min(available, key=lambda backend: estimate(backend, geo, item_bytes, device, backward))
