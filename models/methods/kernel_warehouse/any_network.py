"""Warehouses for networks without a plan in the paper: its reassignment as a rule (KernelWarehouse, section A.3).

Layers whose outputs have the same resolution share warehouses, in groups whose kernels have large common divisors.
The attentions of a layer to m mixtures of n cells have some 16 m n parameters, and mixing takes n multiply-adds for
every number of the kernel. The cells of a warehouse are as small as a limit of either allows; layers for which no cell
is within the limits stay static.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

from .growth import LARGEST_SHARE
from .warehouse import whole_cells

# Parameters of a warehouse's attentions over those of its cells, at most: in the paper's networks attentions have 2 to
# 14 % of all parameters. A network so small that less than half of its kernels fit takes the next share, as long as all
# attentions stay below `GROWTH` of all kernels, and one in which nothing fits the largest cells.
SHARES = (0.2, 0.35, 0.6, 1.0, LARGEST_SHARE)
GROWTH = 0.25
# mixtures of a warehouse, at least: fewer than these are hardly dynamic
LEAST = 4
# cells of a warehouse: at most as many as its outputs have positions, so that mixing takes no more multiply-adds than
# the convolution, within these bounds
FEWEST, MOST = 32, 256


@dataclass(frozen=True)
class Rule:
    """The limits of a warehouse, and what its attentions cost.

    Args:
        budget: b = n / m_t.
        share: one of `SHARES`.
        attention: (channels of a layer's input, its mixtures m, cells n) -> parameters of its attention.
    """

    budget: float
    share: float
    attention: Callable[[int, int, int], int]


@dataclass(frozen=True)
class Group:
    """Layers that may share a warehouse.

    Args:
        kernels: layer -> kernel shape [O, I, *K].
        channels: layer -> channels of its input.
        positions: of the output of each layer.
        rule: limits of the warehouse.
    """

    kernels: Mapping[str, Sequence[int]]
    channels: Mapping[str, int]
    positions: int
    rule: Rule

    def __or__(self, other: "Group") -> "Group":
        kernels, channels = {**self.kernels, **other.kernels}, {**self.channels, **other.channels}
        return Group(kernels, channels, self.positions, self.rule)

    @cached_property
    def size(self) -> int:
        """Parameters of the static kernels."""
        return sum(math.prod(shape) for shape in self.kernels.values())

    @cached_property
    def divisors(self) -> tuple[int, int]:
        """(output channels, input channels) of the largest cell: common divisors of those of all kernels."""
        return tuple(reduce(math.gcd, (shape[axis] for shape in self.kernels.values())) for axis in (0, 1))

    def fits(self, cell: tuple[int, int]) -> bool:
        """Whether cells of one tap with these (output channels, input channels) are within the limits."""
        n = self.rule.budget * (self.size // math.prod(cell))
        if n > min(max(self.positions, FEWEST), MOST) * max(self.rule.budget, 1) or n < 1:
            return False
        return self.cost(cell) <= self.rule.share * n * math.prod(cell)

    def cost(self, cell: tuple[int, int]) -> int:
        """Parameters of the attentions to cells with these (output channels, input channels)."""
        n = round(self.rule.budget * (self.size // math.prod(cell)))
        return sum(
            self.rule.attention(self.channels[layer], math.prod(shape) // math.prod(cell), n)
            for layer, shape in self.kernels.items()
        )

    @cached_property
    def cell(self) -> tuple[int, int] | None:
        """The smallest cell within the limits that gives a whole number of cells; None where there is none."""
        found = None
        for cell in _cells(*self.divisors):
            if self.size // math.prod(cell) < LEAST:
                continue
            if not self.fits(cell):
                if found:
                    break
                continue
            if whole_cells(self.rule.budget, self.size // math.prod(cell)):
                found = cell
                if self.rule.share == SHARES[-1]:
                    break
        return found

    @property
    def mixtures(self) -> int:
        return self.size // math.prod(self.cell) if self.cell else 0

    @property
    def ratios(self) -> dict[str, float]:
        """The settings of the warehouse that give it these cells."""
        outplane, inplane = (size / divisor for size, divisor in zip(self.cell, self.divisors, strict=True))
        return {"cell_outplane_ratio": outplane, "cell_inplane_ratio": inplane}

    def in_order(self, names: Iterable[str]) -> "Group":
        """The same group, its layers in the order of `names`."""
        kernels = {name: self.kernels[name] for name in names if name in self.kernels}
        return Group(kernels, self.channels, self.positions, self.rule)


def _cells(c_out: int, c_in: int) -> Iterator[tuple[int, int]]:
    """Cells of divisors of (c_out, c_in), each of another size, the largest first, and of equal size the squarest."""
    by_size: dict[int, tuple[int, int]] = {}
    for co in _divisors(c_out):
        for ci in _divisors(c_in):
            best = by_size.setdefault(co * ci, (co, ci))
            if max(co, ci) < max(best):
                by_size[co * ci] = (co, ci)
    return (by_size[size] for size in sorted(by_size, reverse=True))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def warehouses_of(
    kernels: Mapping[str, Sequence[int]],
    channels: Mapping[str, int],
    positions: Mapping[str, int],
    budget: float,
    attention: Callable[[int, int, int], int],
) -> dict[str, Group]:
    """Name of a warehouse -> the layers that share it; layers in none of them stay static.

    There are none where the budget gives no warehouse a whole number of cells.

    Args:
        kernels: layer -> kernel shape [O, I, *K], in the order of the layers.
        channels: layer -> channels of its input.
        positions: layer -> positions of its output.
        budget: b = n / m_t.
        attention: see `Rule`.
    """
    total, found = sum(math.prod(shape) for shape in kernels.values()), []
    for share in SHARES:
        rule = Rule(budget, share, attention)
        groups = [
            group
            for stage in dict.fromkeys(positions[layer] for layer in kernels)
            for group in _grouped(
                [
                    Group({layer: shape}, {layer: channels[layer]}, stage, rule)
                    for layer, shape in kernels.items()
                    if positions[layer] == stage
                ]
            )
            if group.cell
        ]
        if found and sum(group.cost(group.cell) for group in groups) > GROWTH * total * max(budget, 1):
            break
        found = groups
        if sum(group.size for group in groups) >= (total / 2 if share < SHARES[-2] else 1):
            break
    groups = found
    stages = {stage: i for i, stage in enumerate(dict.fromkeys(group.positions for group in groups))}
    numbers = {stage: itertools.count() for stage in stages}
    return {f"stage{stages[g.positions]}_group{next(numbers[g.positions])}": g.in_order(kernels) for g in groups}


def _parts(layers: Sequence[Group]) -> list[Group]:
    """Layers of one shape in as few groups as give each of them cells: the attentions of all to all may be too many."""
    for count in range(1, len(layers) + 1):
        parts = [reduce(operator.or_, part) for part in _chunks(layers, count)]
        if all(part.cell for part in parts):
            return parts
    return [reduce(operator.or_, layers)]


def _chunks(layers: Sequence[Group], count: int) -> Iterator[Sequence[Group]]:
    """`count` runs of neighbours, as equal in length as can be."""
    bounds = [i * len(layers) // count for i in range(count + 1)]
    return (layers[first:end] for first, end in itertools.pairwise(bounds))


def _grouped(layers: Sequence[Group]) -> list[Group]:
    """Join layers of one resolution where that gives more mixtures to share, the largest kernels first."""
    alike: dict[tuple[int, ...], list[Group]] = {}
    for layer in layers:
        alike.setdefault(tuple(*layer.kernels.values()), []).append(layer)
    parts = [part for same in alike.values() for part in _parts(same)]
    groups: list[Group] = []
    for group in sorted(parts, key=lambda group: -group.size):
        rank = len(next(iter(group.kernels.values())))
        joined = [
            (both.mixtures, -i, both)
            for i, other in enumerate(groups)
            if len(next(iter(other.kernels.values()))) == rank
            and (both := other | group).mixtures >= max(group.mixtures, other.mixtures, 1)
        ]
        if joined:
            _, i, both = max(joined, key=lambda entry: entry[:2])
            groups[-i] = both
        else:
            groups.append(group)
    return groups
