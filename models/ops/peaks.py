"""What processors can do at most: the numbers behind the roofline estimate (`roofline.py`).

Rates are dense (without the sparsity of tensor cores), of the fastest common product of a compute capability.  A
multiply-add counts once, so rates are half of the operations per second that the sources print.

Sources, all by NVIDIA:
(7, 0) V100 data sheet (SXM2); (7, 5) T4 data sheet; (8, 0) A100 data sheet (80 GB SXM) and GA100 white paper;
(8, 6) A40 data sheet; (8, 9) L40S data sheet; (9, 0) H100 data sheet (SXM); (10, 0) HGX B200 data sheet, per GPU;
(12, 0) white paper "RTX Blackwell GPU Architecture" (GeForce RTX 5090).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """The peak rates of a processor.

    Attributes:
        half: multiply-adds of bfloat16 or float16 matrices in 1e12 per second.
        single: the same in float32, on the ordinary cores.
        tf32: the same of float32 matrices that are rounded to tf32.
        bandwidth: of the memory in 1e9 bytes per second.
        units: multiprocessors, or cores of a CPU.
        launch: microseconds that a call takes before it computes.
        tiles: sides of the output tiles, and the inner size, that a product is padded to.
        cache: how many times as fast as memory the cache is that all multiprocessors read tiles from (A100: 5120 bytes
            per cycle, or 7.2 TB/s).  A core of a CPU has a cache of its own.
    """

    half: float
    single: float
    tf32: float
    bandwidth: float
    units: int
    launch: float = 5.0
    tiles: tuple[tuple[int, ...], tuple[int, ...], int] = ((64, 128), (64, 128), 32)
    cache: float = 3.0


GPUS = {
    (7, 0): Peak(half=62.5, single=7.85, tf32=7.85, bandwidth=900, units=80),
    (7, 5): Peak(half=32.5, single=4.05, tf32=4.05, bandwidth=320, units=40),
    (8, 0): Peak(half=156, single=9.75, tf32=78, bandwidth=2039, units=108),
    (8, 6): Peak(half=74.8, single=18.7, tf32=37.4, bandwidth=696, units=84),
    (8, 9): Peak(half=181, single=45.8, tf32=91.5, bandwidth=864, units=142),
    (9, 0): Peak(half=494.5, single=33.5, tf32=247, bandwidth=3350, units=132),
    (10, 0): Peak(half=1125, single=40, tf32=550, bandwidth=8000, units=148),
    (12, 0): Peak(half=104.8, single=52.4, tf32=52.4, bandwidth=1792, units=170),
}
# Two server cores with AVX-512: 16 multiply-adds of float32 per cycle at 3.5 GHz each, twice as many of bfloat16, and
# 5 GB/s of memory each, as copies reach on a machine that others use, too.
CPU = Peak(
    half=0.224, single=0.112, tf32=0.112, bandwidth=10, units=2, launch=20, tiles=((1,), (16,), 1), cache=math.inf
)


def gpu_peak(capability: tuple[int, int]) -> Peak:
    """The peak rates of a compute capability, or of the nearest lower one (else of the lowest) that is listed."""
    lower = [key for key in GPUS if key <= capability]
    return GPUS[max(lower) if lower else min(GPUS)]
