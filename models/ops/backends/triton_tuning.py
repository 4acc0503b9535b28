"""Which sizes of tiles the kernels of `triton_kernels.py` may use, and how one of them is chosen.

The choice is measured when a kernel is first called with a kind of shape, and kept in Triton's cache on disk.
A process spends at most `BUDGET` on that; afterwards, kernels take the first configuration that fits the device.
"""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.cache import get_cache_manager
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
    "MULTIPLY": [(64, 64, 32, 4, 3), (32, 128, 32, 4, 3), (128, 32, 32, 4, 3), (32, 256, 32, 8, 3)],
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


class Budget:
    """Seconds that this process has spent on tuning, which end at a limit."""

    def __init__(self, limit: float) -> None:
        self.limit, self.spent, self.longest = limit, 0.0, 0.0

    def allows(self) -> bool:
        """Whether one more configuration fits, if it takes no longer than the longest so far."""
        return self.spent + self.longest < self.limit

    def add(self, seconds: float) -> None:
        """Count the seconds of one configuration."""
        self.spent, self.longest = self.spent + seconds, max(self.longest, seconds)


# most of a configuration's time is compiling it
BUDGET = Budget(30)


class Tuner(Autotuner):
    """Triton's tuner with a limit of time for all kernels, whose file of timings is never an obstacle.

    A file lies in Triton's cache folder for every kind of shape. Processes that tune at the same time replace each
    other's, as a whole. A file that cannot be read is tuned and written again; one that cannot be written is not.
    """

    def _bench(self, *args: Any, config: triton.Config, **meta: Any) -> list[float]:
        """Milliseconds of a configuration; more than any other where there is no time left to measure it."""
        # the interpreter always takes the first configuration
        if INTERPRETED.value:
            return [0.0] * 3
        if not BUDGET.allows():
            self.complete = False
            # less than the infinite time of one that does not run
            return [sys.float_info.max] * 3
        start = time.perf_counter()
        try:
            return super()._bench(*args, config=config, **meta)
        finally:
            BUDGET.add(time.perf_counter() - start)

    def check_disk_cache(self, tuning_key: tuple, configs: list[triton.Config], bench_fn: Callable[[], None]) -> bool:
        """Take the best configuration from the file, or measure and write the file; returns whether it was read."""
        known = {str(config): config for config in configs}
        manager, timings = None, {}
        name = f"{self.base_fn.__name__}.tuned.json"
        with contextlib.suppress(OSError, RuntimeError):
            manager = get_cache_manager(hashlib.sha256(self._identity(tuning_key, configs).encode()).hexdigest())
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            path = manager.get_file(name)
            timings = json.loads(Path(path).read_text()) if path else {}
            timings = {known[config]: float(seconds) for config, seconds in timings.items() if config in known}
        if timings and len(timings) == len(configs):
            self.cache[tuning_key], self.configs_timings = min(timings, key=timings.get), timings
            return True

        self.complete = True
        bench_fn()
        # what was not measured for lack of time is measured by the next process
        if self.complete and manager is not None:
            text = json.dumps({str(config): values[0] for config, values in self.configs_timings.items()})
            with contextlib.suppress(OSError):
                manager.put(text, name, binary=False)
        return False

    def _identity(self, tuning_key: tuple, configs: list[triton.Config]) -> str:
        """What the timings depend on: Triton, the GPU, the kernel's source, the kind of shape and the choice."""
        target = triton.runtime.driver.active.get_current_target()
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        return "-".join(map(str, (triton.__version__, target, device, self.fn.cache_key, tuning_key, *configs)))


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

    def decorated(function):
        return Tuner(
            function,
            function.arg_names,
            configs,
            [*key, "PRECISION", "bucket"],
            None,
            None,
            prune_configs_by={"early_config_prune": prune},
            do_bench=lambda call, quantiles: do_bench(call, warmup=10, rep=40, quantiles=quantiles),
            cache_results=True,
        )

    return decorated
