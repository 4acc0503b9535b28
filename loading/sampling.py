"""Which images a process loads, in which order, and with which random numbers."""

import contextlib
import random

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


class SeededData(Dataset):
    """Loads (epoch, index) with the random generators set by (seed, epoch, index), and sets them back after it."""

    def __init__(self, data: Dataset, seed: int):
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: tuple[int, int]):
        epoch, index = position
        with seeded((self.seed, epoch, index)):
            return self.data[index]


@contextlib.contextmanager
def seeded(position: tuple[int, ...]):
    """Within it all random generators of the CPU are those of a position; then they go on where they were."""
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
    """A new permutation every epoch, the same on all processes, of which each takes every world-th.

    Yields (epoch, index). The last images that do not fill all processes are left out.
    """

    def __init__(self, size: int, rank: int, world: int, seed: int):
        self.size, self.rank, self.world, self.seed, self.epoch = size, rank, world, seed, 0

    def __len__(self) -> int:
        return self.size // self.world

    def __iter__(self):
        order = np.random.Generator(np.random.PCG64((self.seed, self.epoch))).permutation(self.size)
        for index in order[: len(self) * self.world][self.rank :: self.world]:
            yield self.epoch, int(index)


class EvalSampler(Sampler):
    """Every world-th image from `rank` on: all processes together take each exactly once, some one more than others."""

    def __init__(self, size: int, rank: int, world: int):
        self.indices = range(rank, size, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)
