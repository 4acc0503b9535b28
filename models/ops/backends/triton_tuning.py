"""Which sizes of tiles the kernels of `triton_kernels.py` may use, and how one of them is chosen.

The choice is measured when a kernel is first called with a kind of shape, and kept in Triton's cache on disk.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from triton.testing import do_bench

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
BLOCK_J = 32  # how many cells the fused kernel mixes at a time

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
PRODUCTS = {
    "ASSEMBLE": [(64, 128, 32, 4, 2), (128, 128, 32, 8, 2), (128, 256, 32, 8, 2), (32, 256, 32, 4, 2)],
    "CONVOLVE": [
        (64, 64, 32, 4, 5),
        (16, 128, 64, 4, 5),
        (64, 64, 64, 4, 5),
        (64, 128, 64, 4, 5),
        (128, 64, 64, 4, 5),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 5),
    ],
    "KERNEL_GRADIENT": [
        (64, 64, 32, 4, 5),
        (64, 64, 64, 4, 3),
        (64, 64, 64, 4, 5),
        (128, 64, 64, 4, 3),
        (128, 128, 64, 8, 3),
    ],
    "MULTIPLY": [(32, 128, 32, 4, 3), (64, 64, 32, 4, 3), (128, 32, 32, 4, 3), (32, 256, 32, 8, 3)],
}
# BLOCK_P, BLOCK_N, BLOCK_K, warps, stages; BLOCK_S is 16, the fewest rows that tensor cores multiply
FUSED = [
    (16, 16, 16, 4, 3),
    (16, 32, 16, 4, 3),
    (16, 32, 32, 8, 2),
    (32, 16, 32, 4, 2),
    (64, 16, 16, 8, 2),
    (64, 16, 32, 8, 2),
]


def tuned_product(name: str, *key: str, indirect: bool = False) -> Callable:
    """A decorator that tunes a kernel which multiplies tiles [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N].

    Args:
        name: the configurations in `PRODUCTS`.
        key: arguments of the kernel; it is tuned again for other values of these.
        indirect: whether the kernel also loads the positions from which it loads, which takes half of the stages.
    """

    def shared(config, item):
        m, n, k = (config.kwargs[f"BLOCK_{name}"] for name in "MNK")
        ahead = config.num_stages // 2 + 1 if indirect else config.num_stages
        return ahead * (m + n) * k * item + 1024

    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in PRODUCTS[name]
    ]
    return _autotune(configs, key, shared)


def tuned_fused(*key: str) -> Callable:
    """A decorator that tunes the fused kernel again for other values of the arguments named in `key`.

    Its shared memory holds the tiles that are loaded ahead, and one mixed tile.
    """

    def shared(config, item):
        s, p, n, k, j = (config.kwargs[f"BLOCK_{name}"] for name in "SPNKJ")
        return ((config.num_stages - 1) * (j * n * k + s * p * k + s * j) + s * n * k) * item + 1024

    configs = [
        triton.Config(
            {"BLOCK_S": 16, "BLOCK_P": p, "BLOCK_N": n, "BLOCK_K": k, "BLOCK_J": BLOCK_J},
            num_warps=warps,
            num_stages=stages,
        )
        for p, n, k, warps, stages in FUSED
    ]
    return _autotune(configs, key, shared)


def _shared_limit() -> int:
    active = triton.runtime.driver.active
    return active.utils.get_device_properties(active.get_current_device())["max_shared_mem"]


def _benchmark(call, quantiles):
    # the interpreter always takes the first configuration
    return (0.0, 0.0, 0.0) if INTERPRETED.value else do_bench(call, warmup=10, rep=40, quantiles=quantiles)


def _autotune(
    configs: list[triton.Config], key: tuple[str, ...], shared: Callable[[triton.Config, int], int]
) -> Callable:
    """A decorator that tunes over the configurations that fit the device.

    Args:
        key: arguments of the kernel; it is tuned again for other values of these, of PRECISION or of the bucket.
        shared: shared(config, bytes of a number) estimates the shared memory of a configuration, at the upper end.
    """

    def prune(configs, named_args, **kwargs):
        if INTERPRETED.value:
            return configs[:1]
        item = max(tensor.element_size() for tensor in list(named_args.values())[:2])
        limit = _shared_limit()
        return [config for config in configs if shared(config, item) <= limit]

    return triton.autotune(
        configs,
        [*key, "PRECISION", "bucket"],
        prune_configs_by={"early_config_prune": prune},
        do_bench=_benchmark,
        cache_results=True,
    )
