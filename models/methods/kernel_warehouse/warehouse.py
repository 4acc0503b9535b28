"""Kernel partition and the warehouse that layers share (KernelWarehouse, sections 3.2 and 3.3).

Shapes: a kernel is [O, I, *K] (I per group), a cell [co, ci, *k], a warehouse [n, co, ci, *k].
m is the number of cells into which a layer's kernel is cut, m_t its sum over the layers of a warehouse.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention_functions import EPSILON
from ..layer import Shared

ATTENTION_INITS = ("one-to-one", "all-to-one", "none", "k-to-one", "one-to-k", "static")
# the attention of "static" to its own cell, which is also its logit: over `total` it stays the same, without rounding
STATIC = 1 - EPSILON


def _scaled(size: int, ratio: float, what: str, name: str, kernels: Mapping[str, tuple[int, ...]]) -> int:
    """`size * ratio`; raises a ValueError that names the layers unless it is a whole number that divides `size`."""
    scaled = size * ratio
    if abs(scaled - round(scaled)) > 1e-6 * max(1.0, scaled) or round(scaled) < 1 or size % round(scaled):
        layers = ", ".join(f"{layer or 'layer'} {list(shape)}" for layer, shape in kernels.items())
        raise ValueError(
            f"warehouse '{name}': {what} {ratio} does not divide the greatest common divisor {size} of its layers' "
            f"kernels ({layers}); choose a ratio that gives a whole divisor of {size}"
        )
    return round(scaled)


def partition(
    kernels: Mapping[str, tuple[int, ...]],
    *,
    name: str,
    cell_inplane_ratio: float = 1.0,
    cell_outplane_ratio: float = 1.0,
    spatial_partition: bool = True,
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Cut kernels into cells of one common shape.

    Args:
        kernels: layer name -> shape [O, I, *K].
        name: of the warehouse, for messages.
        cell_inplane_ratio: input channels of a cell over the greatest common divisor of those of the kernels.
        cell_outplane_ratio: the same for output channels.
        spatial_partition: give every position cells of its own; otherwise a cell spans all positions, and the kernels
            must have the same size.

    Returns:
        The shape of a cell (co, ci, *k), and layer name -> number of cells m.

    Raises:
        ValueError: for kernels that cannot be cut so.
    """
    shapes = list(kernels.values())
    ranks = {len(shape) for shape in shapes}
    if len(ranks) != 1:
        raise ValueError(f"warehouse '{name}' mixes 1d, 2d, 3d or linear layers: {dict(kernels)}")
    c_out = _scaled(reduce(math.gcd, (s[0] for s in shapes)), cell_outplane_ratio, "cell_outplane_ratio", name, kernels)
    c_in = _scaled(reduce(math.gcd, (s[1] for s in shapes)), cell_inplane_ratio, "cell_inplane_ratio", name, kernels)
    window = (1,) * (ranks.pop() - 2)
    if not spatial_partition:
        window = tuple(shapes[0][2:])
        odd = [layer for layer, shape in kernels.items() if tuple(shape[2:]) != window]
        if odd:
            raise ValueError(
                f"warehouse '{name}': without spatial_partition all kernels must be of one size, but {odd[0]} is "
                f"{list(kernels[odd[0]])} beside {next(iter(kernels))} {list(shapes[0])}; give it another warehouse"
            )
    size = c_out * c_in * math.prod(window)
    return (c_out, c_in, *window), {layer: math.prod(shape) // size for layer, shape in kernels.items()}


def whole_cells(cell_num_ratio: float, mixtures: int) -> int | None:
    """The number of cells n = b m_t of a warehouse; None if it is not a whole number, or 0."""
    n = cell_num_ratio * mixtures
    return round(n) if abs(n - round(n)) <= 1e-6 * mixtures and round(n) >= 1 else None


class Warehouse(Shared):
    """n cells shared by the kernels of several layers.

    `cells` [n, co, ci, *k] is the only parameter.

    Args:
        kernels: layer name -> kernel shape [O, I, *K], in the order in which cells are assigned.
        name: of the warehouse, for messages.
        cell_num_ratio: the budget b = n / m_t.
        cell_inplane_ratio, cell_outplane_ratio, spatial_partition: as for `partition`.

    Raises:
        ValueError: for a ratio that does not divide, and for kernels that cannot be cut into cells of one shape.
    """

    def __init__(
        self,
        kernels: Mapping[str, tuple[int, ...]],
        *,
        name: str = "warehouse",
        cell_num_ratio: float = 1.0,
        cell_inplane_ratio: float = 1.0,
        cell_outplane_ratio: float = 1.0,
        spatial_partition: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        cell_shape, self.mixtures = partition(
            kernels,
            name=name,
            cell_inplane_ratio=cell_inplane_ratio,
            cell_outplane_ratio=cell_outplane_ratio,
            spatial_partition=spatial_partition,
        )
        self.name, self.cell_num_ratio = name, cell_num_ratio
        self.kernels = {layer: tuple(shape) for layer, shape in kernels.items()}
        total = sum(self.mixtures.values())
        n = whole_cells(cell_num_ratio, total)
        if n is None:
            raise ValueError(
                f"warehouse '{name}': cell_num_ratio {cell_num_ratio} of {total} mixtures (cells of {list(cell_shape)} "
                f"in {', '.join(f'{k} {list(v)}' for k, v in kernels.items())}) is not a whole number of cells; "
                "choose a ratio that gives one"
            )
        self.n = n
        self.cells = nn.Parameter(torch.empty(self.n, *cell_shape, device=device, dtype=dtype))
        self.assignments = self._assign()
        self.kept: dict[str, tuple[Tensor, Callable[[Tensor], None]]] = {}
        self.errors: dict[str, float] = {}
        self.reset_parameters()

    def _assign(self) -> dict[str, list[int]]:
        """Layer -> the cell of each of its mixtures; n, the zero cell, if it has none (sections 3.4 and A.2)."""
        b = self.cell_num_ratio
        per_cell = round(1 / b) if b < 1 else 1
        # 1 / b mixtures share a cell, and the owners lie on a diagonal, as in a convolution of 1 / b groups (figure 6a)
        diagonal = b < 1 and abs(per_cell * b - 1) < 1e-6 and all(m % per_cell == 0 for m in self.mixtures.values())
        assignments, i, owned = {}, 0, 0
        for layer, m in self.mixtures.items():
            cells = []
            for j in range(m):
                if b >= 1:
                    cell = math.floor(b * (i + j) + 1e-9)
                else:
                    if diagonal:
                        own = j % per_cell == (j // per_cell) % per_cell
                    else:
                        own = math.floor(b * (i + j + 1) + 1e-9) > math.floor(b * (i + j) + 1e-9)
                    cell = owned if own else self.n
                    owned += own
                cells.append(cell)
            assignments[layer] = cells
            i += m
        return assignments

    def own_cells(self, layer: str) -> tuple[int, int]:
        """The range (first, last + 1) of the cells that a layer owns: its share of the n cells, in the layers' order.

        Raises ValueError for an unknown layer.
        """
        if layer not in self.mixtures:
            raise ValueError(f"warehouse '{self.name}' has no layer '{layer}', only {', '.join(self.mixtures)}")
        b, before = self.cell_num_ratio, self._mixtures_before(layer)
        return math.floor(b * before + 1e-9), math.floor(b * (before + self.mixtures[layer]) + 1e-9)

    def initial_attention(self, layer: str, strategy: str = "one-to-one") -> Tensor:
        """beta [m, n + 1] of equation 4 for a layer, the zero cell last.

        The strategy "one-to-one" is that of section 3.4; "all-to-one", "none", "k-to-one" (b > 1) and "one-to-k"
        (b < 1) are those of Table 13. "static" is one-to-one with `STATIC` instead of 1, which an attention to constant
        logits reaches at every temperature. Raises ValueError for an unknown strategy, and for one that b does not
        allow.
        """
        if strategy not in ATTENTION_INITS:
            raise ValueError(f"unknown attention_init '{strategy}', choose from {', '.join(ATTENTION_INITS)}")
        b, m = self.cell_num_ratio, self.mixtures[layer]
        if (strategy == "k-to-one" and not b > 1) or (strategy == "one-to-k" and not b < 1):
            raise ValueError(
                f"warehouse '{self.name}': attention_init '{strategy}' needs cell_num_ratio "
                f"{'above' if strategy == 'k-to-one' else 'below'} 1, not {b}; use 'one-to-one'"
            )
        # exact also for a layer of float64
        beta = torch.zeros(m, self.n + 1, dtype=torch.float64 if strategy == "static" else None)
        if strategy == "all-to-one":
            beta[:, : self.n] = 1.0
        elif strategy in ("k-to-one", "one-to-k"):
            start = b * self._mixtures_before(layer)
            for j in range(m):
                first = math.floor(start + b * j + 1e-9)
                beta[j, first : max(math.floor(start + b * (j + 1) + 1e-9), first + 1)] = 1.0
        elif strategy in ("one-to-one", "static"):
            beta[torch.arange(m), torch.tensor(self.assignments[layer])] = STATIC if strategy == "static" else 1.0
        return beta

    def _mixtures_before(self, layer: str) -> int:
        """Number of mixtures of the layers that come before one."""
        names = list(self.mixtures)
        return sum(self.mixtures[name] for name in names[: names.index(layer)])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming-normal by fan-out, over the cells that each layer owns."""
        window = math.prod(self.cells.shape[3:])
        for layer in self.mixtures:
            first, last = self.own_cells(layer)
            fan_out = max(last - first, 1) * self.cells.shape[1] * window
            self.cells[first:last].normal_(0.0, math.sqrt(2.0 / fan_out))

    @torch.no_grad()
    def approximate(self, layer: str, cells: Tensor, hold: Callable[[Tensor], None]) -> None:
        """Keep the kernel of a layer as well as fewer cells than mixtures can, once those of all layers are known.

        The cells are a basis of all kernels, which has the smallest sum of squared differences; `errors` then maps
        every layer to the norm of its difference over that of its kernel.

        Args:
            layer: the name of the layer.
            cells: its static kernel in cells [m, co, ci, *k].
            hold: is called with the constant attention alpha [m, n + 1] of the layer, the zero cell last.
        """
        self.kept[layer] = (cells, hold)
        if len(self.kept) < len(self.mixtures):
            return
        kernels = torch.cat([self.kept[name][0] for name in self.mixtures]).flatten(1).double()
        u, s, basis = torch.linalg.svd(kernels, full_matrices=False)
        alpha, basis = (u * s)[:, : self.n], basis[: self.n]
        # as small as cells can be with |alpha| adding up to at most `STATIC`; the zero cell takes what is left
        scale = alpha.abs().sum(1).max().clamp_min(1e-12) / STATIC
        alpha, rest = F.pad(alpha / scale, (0, self.n - len(basis))), kernels - alpha @ basis
        self.cells[: len(basis)] = (basis * scale).view(-1, *self.cells.shape[1:]).to(self.cells.dtype)
        alpha = torch.cat([alpha, STATIC - alpha.abs().sum(1, keepdim=True)], dim=1)
        sizes = list(self.mixtures.values())
        for name, own, difference, kernel in zip(
            self.mixtures, alpha.split(sizes), rest.split(sizes), kernels.split(sizes), strict=True
        ):
            self.kept[name][1](own)
            self.errors[name] = float(difference.norm() / kernel.norm().clamp_min(1e-12))
        self.kept.clear()

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.cells.shape[1:]))
        return f"n={self.n}, cell={shape}, m_t={sum(self.mixtures.values())}, layers={len(self.mixtures)}"


class Warehouses(nn.ModuleDict):
    """The warehouses of a model, by name, at its root."""

    def forward(self, *inputs: Any) -> Any:
        """Return the input unchanged, since an `nn.Sequential` at the root calls all of its children."""
        return inputs[0] if len(inputs) == 1 else inputs


def warehouse_layers(model: nn.Module) -> dict[str, list[str]]:
    """Parameter name of every warehouse -> the names of the layers that take cells from it."""
    names = {id(warehouse): name for name, warehouse in getattr(model, "warehouses", {}).items()}
    users = {f"warehouses.{name}.cells": [] for name in names.values()}
    for layer, module in model.named_modules():
        if id(getattr(module, "_warehouse", None)) in names:
            users[f"warehouses.{names[id(module._warehouse)]}.cells"].append(layer)
    return users


def drop_unused_warehouses(model: nn.Module) -> list[str]:
    """Drop the warehouses that no layer takes cells from any more, and return their names.

    Their cells would get no gradient, and DistributedDataParallel would stop with an error.
    """
    unused = [key.split(".")[1] for key, layers in warehouse_layers(model).items() if not layers]
    for name in unused:
        del model.warehouses[name]
    return unused


def warehouse_stages(model: nn.Module, stage_of: Callable[[str], int]) -> dict[str, int]:
    """Parameter name of every warehouse -> the stage that most of its layers are in; of several, the last.

    stage_of: layer name -> number of its stage.
    """
    stages = {}
    for name, layers in warehouse_layers(model).items():
        counts = Counter(map(stage_of, layers))
        stages[name] = max(counts, key=lambda stage: (counts[stage], stage))
    return stages
