"""Which images a process loads, in which order, and with which random numbers."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


class SeededData(Dataset):
    """A data set indexed by (epoch, index).

    The random generators are seeded by (seed, epoch, index) while an image is loaded, and restored afterwards.
    """

    def __init__(self, data: Dataset, seed: int) -> None:
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: tuple[int, int]) -> Any:
        epoch, index = position
        with seeded((self.seed, epoch, index)):
            return self.data[index]


@contextlib.contextmanager
def seeded(position: tuple[int, ...]) -> Iterator[None]:
    """Context in which all random generators of the CPU are seeded by `position`; it restores their states."""
    seed = int(np.random.SeedSequence(position).generate_state(1)[0])
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed would seed the GPUs as well
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class TrainSampler(Sampler):
    """A new permutation of the images every epoch, the same in all processes; each takes every `world`-th image of it.

    Yields (epoch, index). The last images that do not fill all processes are left out.

    Args:
        size: number of images.
        rank: index of this process.
        world: number of processes.
        seed: seed of the permutations.
        order: makes a permutation with the given generator; None: any of all permutations.
    """

    def __init__(
        self,
        size: int,
        rank: int,
        world: int,
        seed: int,
        order: Callable[[np.random.Generator], np.ndarray] | None = None,
    ) -> None:
        self.size, self.rank, self.world, self.seed, self.epoch = size, rank, world, seed, 0
        self.order = order

    def __len__(self) -> int:
        return self.size // self.world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.Generator(np.random.PCG64((self.seed, self.epoch)))
        order = generator.permutation(self.size) if self.order is None else self.order(generator)
        for index in order[: len(self) * self.world][self.rank :: self.world]:
            yield self.epoch, int(index)


class EvalSampler(Sampler):
    """Every `world`-th image from `rank` on, so that all processes together take each image exactly once.

    Some processes take one image more than others.

    Args:
        size: number of images.
        rank: index of this process.
        world: number of processes.
    """

    def __init__(self, size: int, rank: int, world: int) -> None:
        self.indices = range(rank, size, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
