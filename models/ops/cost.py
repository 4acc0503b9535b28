"""Which order evaluates a call soonest: a sum of arithmetic, traffic and calls per order.

The unit is the microsecond.  Only ratios matter, and the forward and the backward pass scale alike.
"""

import math
from dataclasses import dataclass

from .geometry import Geometry, patches_are_copies
from .scratch import LIMIT_BYTES

MB = 1 << 20
LANES = 16  # of a vector register
TILE = 16  # rows, columns and inner sizes of tiles that tensor cores multiply


@dataclass(frozen=True)
class Device:
    """Costs of a kind of device, in microseconds."""

    gflop: float  # of matrix products and convolutions, per 1e9 multiply-adds
    mix_gflop: float  # of the product that assembles kernels, which has few rows
    kernel_mb: float  # to write and read assembled kernels
    reorder_mb: float  # to permute and reorder kernels for a convolution, in memory that is handed on
    fresh_mb: float  # and in fresh memory
    patch_mb: float  # to gather patches
    mixed_mb: float  # to write, permute and read mixed inputs
    fused_gflop: float  # of the products of compiled tiles
    pack_mb: float  # to pack tiles of the warehouse
    turn_mb: float  # to turn inputs and outputs around
    triton_gflop: float  # of Triton's convolution, in half precision; float32 takes four times as long
    triton_fused_gflop: float  # and of the one that mixes its kernels on the way
    call: float  # of one library call


# cpu: fitted to `python scripts/benchmark.py --layers` with 2 threads, float32, on an x86-64 server core;
# cuda: not measured, set from the memory bandwidth and peak rate of a data-centre GPU, where cuDNN's grouped
# convolution of one sample's kernel each is the slow part; Triton's kernels are chosen only by name until they are
DEVICES = {
    "cpu": Device(8700, 13000, 700, 100, 520, 150, 800, 10500, 120, 120, math.inf, math.inf, 15),
    "cuda": Device(10, 10, 0.5, 20, 20, 1, 1, math.inf, math.inf, 1, math.inf, math.inf, 5),
}


def _tiles(size):
    """A size, filled up to whole tiles."""
    return math.ceil(size / TILE) * TILE


def estimate(order, geo: Geometry, item_bytes, device):
    """Estimated cost of a forward pass in microseconds."""
    d = DEVICES.get(device, DEVICES["cpu"])
    groups = geo.groups if geo.foldable else 1
    batch, g_out, k = geo.batch * groups, geo.g_out // groups, geo.taps * geo.g_in
    c_out, q, positions = geo.cell[0], geo.q, geo.positions
    kernels = batch * g_out * c_out * k * q
    assemble = kernels * geo.n / 1e9 * d.mix_gflop + kernels * item_bytes / MB * d.kernel_mb
    convolve = kernels * positions / 1e9 * d.gflop
    # inputs and outputs, turned around where an order or a library wants another layout
    turned = batch * positions * (g_out * c_out + geo.g_in * q) * item_bytes / MB * d.turn_mb
    if order == "grouped":
        size = kernels * item_bytes
        reorder = size / MB * (d.reorder_mb if size <= LIMIT_BYTES else d.fresh_mb)
        return assemble + convolve + reorder + turned + 4 * (1 + geo.batch) * d.call
    if order in ("depthwise", "pointwise"):
        return kernels * positions / 1e9 * d.gflop + 3 * d.call
    if order == "batched":
        patches = batch * k * q * positions * item_bytes / MB if patches_are_copies(geo) else 0
        # every product but the first adds to the output in memory
        sums = (k - 1) * batch * g_out * c_out * positions * item_bytes / MB
        return assemble + convolve + patches * d.patch_mb + sums * d.patch_mb / 2 + (k + 3) * d.call
    if order == "fused":
        # channels fill whole registers, and short products wait for their operands
        kernels = batch * k * g_out * math.ceil(c_out / LANES) * math.ceil(q / LANES) * LANES**2
        flops = kernels * (max(positions, 4) + geo.n * max(1, 6 / max(1, batch * g_out * k)))
        return flops / 1e9 * d.fused_gflop + geo.n * c_out * q * item_bytes / MB * d.pack_mb + turned + 6 * d.call
    if order in ("triton", "triton_fused"):
        # tiles are full, whatever the shape
        kernels = batch * k * g_out * _tiles(c_out) * _tiles(q)
        mix, rate = kernels * _tiles(geo.n), 1 if item_bytes < 4 else 4
        if order == "triton":
            size = kernels * item_bytes / MB
            flops = mix + kernels * _tiles(positions)
            return flops / 1e9 * rate * d.triton_gflop + size * d.kernel_mb + 3 * d.call
        # mixed anew for every 64 positions, for 16 samples at a time
        flops = (mix * math.ceil(positions / 64) + kernels * _tiles(positions)) * _tiles(batch) / max(1, batch)
        return flops / 1e9 * rate * d.triton_fused_gflop + 2 * d.call
    mixed = batch * g_out * geo.n * positions * q
    products = mixed * (k + c_out) / 1e9 * d.gflop
    return products + mixed * item_bytes / MB * d.mixed_mb + (geo.n + 4) * d.call


def cheapest(geo, available, item_bytes, device):
    """The order of least estimated cost."""
    return min(available, key=lambda order: estimate(order, geo, item_bytes, device))
