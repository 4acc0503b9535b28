"""Which images a process loads, in which order, and with which random numbers."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, default_collate

from .images import UnreadableImage

# images that are tried in the place of one that cannot be read
TRIES = 10


class SeededData(Dataset):
    """A data set indexed by (epoch, index).

    The random generators are seeded by (seed, epoch, index) while an image is loaded, and restored afterwards.

    Args:
        data: of (image, class).
        seed: of the random choices.
        replaces: whether another image, which (seed, epoch, index) choose, stands for one that cannot be read. Such an
            item is (image, class, why the image could not be read).
    """

    def __init__(self, data: Dataset, seed: int, replaces: bool = False) -> None:
        self.data, self.seed, self.replaces = data, seed, replaces

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: tuple[int, int]) -> Any:
        epoch, index = position
        if not self.replaces:
            return self._load(epoch, index)
        try:
            return self._load(epoch, index)
        except UnreadableImage as error:
            reason = str(error)
        others = np.random.Generator(np.random.PCG64((self.seed, epoch, index))).integers(len(self), size=TRIES)
        for other in others.tolist():
            with contextlib.suppress(UnreadableImage):
                return *self._load(epoch, other), reason
        raise UnreadableImage(reason)

    def _load(self, epoch: int, index: int) -> Any:
        with seeded((self.seed, epoch, index)):
            return self.data[index]


def collate(items: list[tuple]) -> list[Any]:
    """Make a batch of items of a `SeededData`; it has texts, "" for most images, only if an image was replaced."""
    batch = default_collate([item[:2] for item in items])
    reasons = [item[2] if len(item) > 2 else "" for item in items]
    return [*batch, reasons] if any(reasons) else batch


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

    Yields (epoch, index), from the image `consumed` of the permutation on. So the rest of an epoch is the same for any
    number of processes. The last images that do not fill all processes are left out.

    Args:
        size: number of images.
        rank: index of this process.
        world: number of processes.
        seed: seed of the permutations.
        order: makes a permutation with the given generator; None: any of all permutations.

    Attributes:
        epoch: the permutation to take.
        consumed: images of it that all processes together have used up.
    """

    def __init__(
        self,
        size: int,
        rank: int,
        world: int,
        seed: int,
        order: Callable[[np.random.Generator], np.ndarray] | None = None,
    ) -> None:
        self.size, self.rank, self.world, self.seed = size, rank, world, seed
        self.order = order
        self.epoch = self.consumed = 0

    def __len__(self) -> int:
        """Images of a process in a whole epoch."""
        return self.size // self.world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.Generator(np.random.PCG64((self.seed, self.epoch)))
        order = generator.permutation(self.size) if self.order is None else self.order(generator)
        left = order[self.consumed :]
        for index in left[: len(left) // self.world * self.world][self.rank :: self.world]:
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
