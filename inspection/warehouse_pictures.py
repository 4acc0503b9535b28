"""Pictures of KernelWarehouse's attentions: heat maps of mixtures against cells, use of cells, and entropy."""

from typing import Any

import numpy as np
import torch

from .attentions import Attentions, LayerAttention
from .pictures import COLOURS, Picture, file_name, label, new_figure, new_panels, style

# values of a heat map, from which on a few that are far out are cut off; and the least range of its colours
MANY, LEAST_RANGE = 400, 1e-3
# heat maps of a warehouse: title -> how the values are made from the moments
PANELS = {
    "mean over images": lambda moments: moments.mean,
    "spread over images\n(standard deviation)": lambda moments: moments.deviation,
    "spread over classes\n(standard deviation of class means)": lambda moments: moments.deviation_of_classes,
}


def heat_map_pictures(found: Attentions) -> list[Picture]:
    """For every warehouse, the mean of every attention and its spreads (KernelWarehouse, Figures 3 and 7 to 10)."""
    return [
        _heat_maps(name, number, layers, found.count)
        for number, (name, layers) in enumerate(found.warehouses().items())
    ]


def _heat_maps(name: str, number: int, layers: dict[str, LayerAttention], count: int) -> Picture:
    moments = [entry.parts["mixture"] for entry in layers.values()]
    sizes = [moment.mean.shape[0] for moment in moments]
    m, n = sum(sizes), moments[0].mean.shape[1]
    house = next(iter(layers.values())).module.warehouse
    classes = max(len(moment.of_class) for moment in moments)
    wide = 1.6 + 2.6 * min(2.0, max(0.7, n / m))
    with style():
        figure = new_figure(wide * 3 + 1, 4.4)
        axes = figure.subplots(1, 3, sharey=True)
        for panel, (title, value) in zip(axes, PANELS.items()):
            values = torch.cat([value(moment) for moment in moments]).numpy()
            _heat_map(figure, panel, values, title)
            for edge in np.cumsum(sizes)[:-1]:
                panel.axhline(edge - 0.5, color="white", linewidth=0.8)
            panel.set_xlabel(f"kernel cell (of {n})")
        mark_layers(axes[0], list(layers), sizes)
        axes[0].set_ylabel("mixtures, by layer")
        b, cell = house.cell_num_ratio, " x ".join(map(str, house.cells.shape[1:]))
        mixtures, cells = (f"{count} {word}{'s' * (count > 1)}" for count, word in ((m, "mixture"), (n, "cell")))
        figure.suptitle(f"warehouse {label(name)}: attention of {mixtures} to {cells} (b = {b:g}, cell {cell})")
    caption = (
        f"Attention of every mixture (rows, by layer) to every kernel cell (columns) of warehouse {name}, over {count} "
        f"images: mean, standard deviation over images, and standard deviation of the means of {classes} classes. "
        "Where a colour bar ends in a triangle, the outermost 0.5 % of the values have the colour of its end."
    )
    return Picture(f"warehouse-{number:02d}-{file_name(name)}", caption, figure)


def _heat_map(figure: Any, axes: Any, values: np.ndarray, title: str) -> None:
    """A heat map with its colour bar. Few values far out do not hide the differences of the others."""
    low, high = np.quantile(values, [0.005, 0.995]) if values.size >= MANY else (values.min(), values.max())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    image = axes.imshow(values, aspect="auto", vmin=low, vmax=max(high, low + LEAST_RANGE))
    bar = figure.colorbar(image, ax=axes, extend=extend[bool(values.min() < low), bool(values.max() > high)], pad=0.02)
    bar.set_label("attention (no unit)")
    axes.set_title(title)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def mark_layers(axes: Any, names: list[str], sizes: list[int]) -> None:
    """Write the names of layers beside their rows; of many layers, only as many as there is room for."""
    ends = np.cumsum(sizes)
    middles = ends - np.array(sizes) / 2 - 0.5
    chosen, last = [], -np.inf
    for index, middle in enumerate(middles):
        if middle - last >= 0.028 * ends[-1]:
            chosen.append(index)
            last = middle
    axes.set_yticks([middles[i] for i in chosen], [label(names[i], 28) for i in chosen])
    axes.tick_params(axis="y", length=0)


def overview(found: Attentions) -> Picture | None:
    """The mean attentions of all warehouses in one picture, as in KernelWarehouse's Figure 3; None without any."""
    houses = found.warehouses()
    if not houses:
        return None
    with style():
        figure, grid = new_panels(len(houses), 4, (4, 2.9), (0, 0.5))
        for axes, (name, layers) in zip(grid, houses.items()):
            moments = [entry.parts["mixture"] for entry in layers.values()]
            _heat_map(figure, axes, torch.cat([moment.mean for moment in moments]).numpy(), label(name, 30))
            for edge in np.cumsum([moment.mean.shape[0] for moment in moments])[:-1]:
                axes.axhline(edge - 0.5, color="white", linewidth=0.8)
            mark_layers(axes, list(layers), [moment.mean.shape[0] for moment in moments])
            axes.set(xlabel="kernel cell", ylabel="mixtures, by layer")
        figure.suptitle("mean attention of mixtures (rows) to cells (columns); white lines separate layers")
    caption = (
        f"Mean attention over {found.count} images of every mixture (row) to every kernel cell (column), for every "
        "warehouse; white lines separate the layers that share it."
    )
    return Picture("warehouses", caption, figure)


def usage_picture(found: Attentions) -> Picture:
    """How much attention every cell gets."""
    houses = found.warehouses()
    with style():
        figure, grid = new_panels(len(houses), 3, (3.6, 2.1), (0, 0.6))
        for axes, (name, layers) in zip(grid, houses.items()):
            mean = torch.cat([entry.parts["mixture"].mean for entry in layers.values()])
            used = mean.abs().sum(0).numpy()
            axes.bar(np.arange(len(used)), used, width=1.0, color=COLOURS[0])
            axes.axhline(used.mean(), color=COLOURS[1], linewidth=1, linestyle="--")
            idle = int((used < 0.1 * used.mean()).sum())
            axes.set_title(f"{label(name, 30)}: {idle} of {len(used)} cells hardly used")
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.set(xlabel="kernel cell", ylabel="sum of |mean attention|", xlim=(-0.5, len(used) - 0.5))
        figure.suptitle("use of the cells; dashed: mean of the warehouse; hardly used: below a tenth of it")
    caption = (
        f"Sum over all mixtures of the absolute mean attention (over {found.count} images) to every cell of a "
        "warehouse. The dashed line is the mean over the cells; cells below a tenth of it count as hardly used."
    )
    return Picture("cell-usage", caption, figure)
