"""Pictures of the attentions of layers: entropy, and ODConv's four attentions (Figure 6), which other methods share."""

import math
from typing import Any

import numpy as np
import torch

from .attentions import Attentions, Moments
from .pictures import COLOURS, Picture, file_name, label, new_figure, style

# a heat map of layers against kernels has at most as many columns
LARGEST_KERNEL_NUM = 32
MEANING = {
    "spatial": "to the positions of the kernel",
    "channel": "to the input channels",
    "filter": "to the output channels",
    "kernel": "to the kernels of the layer",
    "matrix": "of DCD's matrix Phi",
}


def entropy_picture(found: Attentions) -> Picture | None:
    """How evenly the attentions of every layer are distributed; None where no layer has attentions to kernels."""
    layers = {name: entry.entropy for name, entry in found.layers.items() if entry.entropy.count}
    if not layers:
        return None
    with style():
        figure = new_figure(6.5, _height(len(layers)))
        axes = figure.subplots()
        values = [moments.mean.flatten().numpy() for moments in layers.values()]
        several = any(len(mixtures) > 1 for mixtures in values)
        _boxes(axes, values, list(layers))
        for row, moments in enumerate(layers.values()):
            centre, spread = float(moments.mean.mean()), float(moments.deviation.mean())
            axes.plot([centre - spread, centre + spread], [row, row], color=COLOURS[1], linewidth=2, alpha=0.8)
        axes.set(xlabel="entropy of |attention| relative to equal attentions (0 to 1)", xlim=(-0.02, 1.02))
        title = "orange: mean and standard deviation over images"
        axes.set_title("boxes: over the mixtures of a layer\n" * several + title)
        figure.suptitle("entropy of the attentions: 0 is one kernel alone, 1 all alike")
    caption = (
        f"Entropy of the absolute attentions over {found.count} images, relative to that of equal ones: 0 where a "
        "mixture takes one kernel alone, 1 where it takes all alike. "
        + "Boxes: quartiles over the mixtures of a layer; whiskers: lowest and highest. " * several
        + "Orange: one standard deviation over the images around the mean."
    )
    return Picture("entropy", caption, figure)


def attention_pictures(found: Attentions) -> list[Picture]:
    """A picture for every kind of attention that the layers have, KernelWarehouse's mixtures excepted."""
    names = dict.fromkeys(name for entry in found.layers.values() for name in entry.parts if name != "mixture")
    pictures = []
    for name, layers in found.parts(*names).items():
        sizes = {moments.mean.shape[-1] for moments in layers.values()}
        if name == "spatial":
            pictures.append(_maps(layers, found.count))
        elif name == "kernel" and max(sizes) <= LARGEST_KERNEL_NUM:
            pictures.append(_kernels(layers, found.count))
        else:
            pictures.append(_distributions(name, layers, found.count))
    return pictures


def _height(rows: int) -> float:
    return 1.4 + 0.2 * rows


def _boxes(axes: Any, values: list[np.ndarray], names: list[str]) -> None:
    """Horizontal box plots, the first layer at the top; whiskers reach to the lowest and the highest value."""
    axes.boxplot(
        values, positions=range(len(values)), orientation="horizontal", whis=(0, 100), widths=0.6, patch_artist=True,
        manage_ticks=False, boxprops={"facecolor": "#9CC9E8", "edgecolor": COLOURS[0]},
        medianprops={"color": "black"}, whiskerprops={"color": COLOURS[0]}, capprops={"color": COLOURS[0]},
    )  # fmt: skip
    axes.set_yticks(range(len(names)), [label(name, 34) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)


def _kernels(layers: dict[str, Moments], count: int) -> Picture:
    """Figure 6 (b): layers against kernels, with the spreads over images and over classes."""
    k = max(moments.mean.shape[-1] for moments in layers.values())
    panels = {
        "mean over images": lambda moments: moments.mean,
        "standard deviation\nover images": lambda moments: moments.deviation,
        "standard deviation\nof class means": lambda moments: moments.deviation_of_classes,
    }
    with style():
        figure = new_figure(3.2 + 3 * max(1.8, 0.4 * k), _height(len(layers)) + 0.6)
        grid = figure.subplots(1, 3, sharey=True)
        for axes, (title, value) in zip(grid, panels.items()):
            values = np.full((len(layers), k), np.nan)
            for row, moments in enumerate(layers.values()):
                found = value(moments).flatten().numpy()
                values[row, : len(found)] = found
            image = axes.imshow(values, aspect="auto", vmin=0)
            if values.size <= 200:
                limit = np.nanmax(values) * 0.6
                for (row, column), number in np.ndenumerate(values):
                    colour = "black" if number > limit else "white"
                    axes.text(column, row, f"{number:.2f}", ha="center", va="center", color=colour, fontsize=6)
            figure.colorbar(image, ax=axes, pad=0.02).set_label("attention (no unit)")
            axes.set_title(title)
            axes.set_xticks(range(k), [str(i + 1) for i in range(k)])
            axes.set_xlabel("kernel")
        grid[0].set_yticks(range(len(layers)), [label(name, 34) for name in layers])
        figure.suptitle("attention to the kernels of every layer")
    caption = f"Attention {MEANING['kernel']} (columns) by layer (rows), over {count} images: mean and spreads."
    return Picture("attention-kernel", caption, figure)


def _maps(layers: dict[str, Moments], count: int) -> Picture:
    """Figure 6 (a): the mean attention to every position of a kernel."""
    rows = -(-len(layers) // 8)
    columns = -(-len(layers) // rows)
    maps = {name: _as_map(moments.mean.mean(0)) for name, moments in layers.items()}
    low, high = (
        float(f([values.min(), values.max()][i] for values in maps.values())) for i, f in enumerate((min, max))
    )
    with style():
        figure = new_figure(1.25 * columns + 1, 1.35 * rows + 0.9)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        image = None
        for axes, (name, values) in zip(grid.flat, maps.items()):
            image = axes.imshow(values, vmin=low, vmax=max(high, low + 1e-9))
            axes.set_title(label(name, 18), fontsize=6)
            if values.size <= 25:
                for (row, column), number in np.ndenumerate(values):
                    colour = "black" if number > (low + high) / 2 else "white"
                    axes.text(column, row, f"{number:.2f}", ha="center", va="center", color=colour, fontsize=5)
        figure.colorbar(image, ax=grid, pad=0.02).set_label("mean attention (no unit)")
        figure.suptitle("spatial attention: mean over images, for every position of the kernel")
    caption = f"Mean attention {MEANING['spatial']} over {count} images, layer by layer."
    return Picture("attention-spatial", caption, figure)


def _as_map(values: torch.Tensor) -> np.ndarray:
    """The positions [T] of a square kernel as a map; those of another kernel as a row."""
    side = math.isqrt(len(values))
    return values.reshape(side if side**2 == len(values) else 1, -1).numpy()


def _distributions(name: str, layers: dict[str, Moments], count: int) -> Picture:
    """Figure 6 (c, d): the distribution of the mean attentions of a layer, and their spread over images."""
    with style():
        figure = new_figure(9, _height(len(layers)))
        left, right = figure.subplots(1, 2, sharey=True)
        _boxes(left, [moments.mean.flatten().numpy() for moments in layers.values()], list(layers))
        _boxes(right, [moments.deviation.flatten().numpy() for moments in layers.values()], list(layers))
        left.set_xlabel("mean attention over images (no unit)")
        right.set_xlabel("standard deviation over images (no unit)")
        meaning = MEANING.get(name, "of the layer")
        figure.suptitle(f"{label(name)} attention {meaning}: distribution within every layer")
    caption = (
        f"{name.capitalize()} attention {meaning}, over {count} images. Boxes: quartiles over the channels of a layer; "
        "whiskers: lowest and highest. Left: mean attentions; right: their standard deviations over the images."
    )
    return Picture(f"attention-{file_name(name)}", caption, figure)
