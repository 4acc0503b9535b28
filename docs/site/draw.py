#!/usr/bin/env python
"""Draw the pictures of how-it-works.md: `python docs/site/draw.py` writes docs/images/operator.svg and orders.svg."""

import colorsys
import random
import re
import sys
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "images"
# the layers of the drawing: rows and columns of cells in their kernels
LAYERS = {"layer 1": (2, 3), "layer 2": (1, 3)}
CELLS = sum(rows * columns for rows, columns in LAYERS.values())

# light and dark: the picture brings its own background, so that it is readable on any page
_STYLE = """
  .back { fill: #fbfbfd; stroke: #c9ccd6 }
  .panel { fill: #ffffff; stroke: #d5d8e0 }
  .box { fill: #eef0f7; stroke: #8e95ab }
  .line { stroke: #5c6379; fill: none; stroke-width: 1.6 }
  .head { fill: #5c6379 }
  text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #23283a }
  .title { font-size: 17px; font-weight: 600 }
  .text { font-size: 14px }
  .small { font-size: 12.5px }
  .math { font-size: 15px; font-family: "STIX Two Text", "DejaVu Serif", Georgia, serif; font-style: italic }
  .low { font-size: 72% }
  .edge { stroke: #23283a; stroke-opacity: .45 }
  @media (prefers-color-scheme: dark) {
    .back { fill: #1b1e29; stroke: #3c4256 }
    .panel { fill: #232736; stroke: #3c4256 }
    .box { fill: #30364a; stroke: #79819b }
    .line { stroke: #aab1c7 }
    .head { fill: #aab1c7 }
    text { fill: #e6e9f2 }
    .edge { stroke: #e6e9f2; stroke-opacity: .35 }
  }
"""


class Drawing:
    """An SVG of a size, with what is drawn into it."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{title}</title><style>{_STYLE}</style>",
        ]
        self.box(1, 1, width - 2, height - 2, kind="back", round=10)

    def box(self, x, y, width, height, kind="box", round=6, fill=None):
        style = f' style="fill:{fill}"' if fill else ""
        self.parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round}"{style}/>'
        )

    def text(self, x, y, text, kind="text", anchor="start"):
        """A line of text, in which `m_t` is m with an index."""
        text = re.sub(r"_([a-z0-9]+)", r'<tspan class="low" dy="4">\1</tspan><tspan dy="-4">&#8203;</tspan>', text)
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>')

    def arrow(self, x0, y0, x1, y1):
        across = abs(x1 - x0) >= abs(y1 - y0)
        step = 7 if (x1 > x0 if across else y1 > y0) else -7
        ends = (x1 - step, y1) if across else (x1, y1 - step)
        self.parts.append(f'<path class="line" d="M{x0:g} {y0:g} L{ends[0]:g} {ends[1]:g}"/>')
        wings = f"{x1 - step:g},{y1 - 5:g} {x1 - step:g},{y1 + 5:g}"
        if not across:
            wings = f"{x1 - 5:g},{y1 - step:g} {x1 + 5:g},{y1 - step:g}"
        self.parts.append(f'<polygon class="head" points="{x1:g},{y1:g} {wings}"/>')

    def panel(self, x, y, width, height, title, *lines):
        self.box(x, y, width, height, "panel", 8)
        self.text(x + 16, y + 28, title, "title")
        for i, line in enumerate(lines):
            self.text(x + 16, y + 50 + 19 * i, line)

    def cells(self, x, y, rows, columns, side, colours, names=()):
        for i in range(rows * columns):
            left, top = x + i % columns * side, y + i // columns * side
            self.box(left, top, side, side, "edge", 2, colours[i])
            if names:
                red, green, blue = _channels(colours[i])
                ink = "#ffffff" if 0.3 * red + 0.59 * green + 0.11 * blue < 140 else "#23283a"
                self.parts.append(
                    f'<text class="small" style="fill:{ink}" x="{left + side / 2:g}" y="{top + side / 2 + 4.5:g}" '
                    f'text-anchor="middle">{names[i]}</text>'
                )

    def write(self, path):
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n")


def _channels(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _hex(channels):
    return "#" + "".join(f"{min(255, max(0, round(value))):02x}" for value in channels)


def cell_colours():
    """A colour for each cell of the warehouse, around the circle of hues."""
    return [_hex([255 * c for c in colorsys.hsv_to_rgb(i / CELLS, 0.55, 0.88)]) for i in range(CELLS)]


def attentions():
    """Attentions [m, n] of layer 1: both signs, absolute values that add up to 1, the own cell weighing most."""
    numbers = random.Random(7)
    rows, columns = LAYERS["layer 1"]
    table = []
    for i in range(rows * columns):
        z = [numbers.uniform(-0.6, 0.6) + 1.3 * (i == j) for j in range(CELLS)]
        table.append([value / sum(map(abs, z)) for value in z])
    return table


def signed_colour(value, largest):
    """Blue below zero, white at zero, orange above: two hues that colour-blind readers can tell apart."""
    share = min(1, abs(value) / largest)
    end = (230, 97, 1) if value > 0 else (32, 102, 172)
    return _hex([250 + (channel - 250) * share for channel in end])


def mixed_colours():
    """What a mixture looks like: the colours of the cells, weighed as the cells are."""
    colours = [_channels(colour) for colour in cell_colours()]
    result = []
    for row in attentions():
        weights = [abs(value) for value in row]
        result.append(_hex([sum(w * c[i] for w, c in zip(weights, colours)) for i in range(3)]))
    return result


def draw_operator(path):
    d = Drawing(940, 640, "KernelWarehouse: partition, warehouse, attention, mixture")
    grey = ["#c3c8d6"] * CELLS

    d.panel(14, 14, 448, 300, "1  Partition", "The kernels of a stage's layers are cut into", "cells of one shape.")
    for x, (name, (rows, columns)) in zip((44, 268), LAYERS.items()):
        m = rows * columns
        d.cells(x, 112, rows, columns, 54, grey, [f"w{i + 1}" for i in range(m)])
        d.text(x, 112 + 54 * rows + 24, f"{name}: m = {m} mixtures")
    d.text(30, 294, "Together the layers have m_t = 6 + 3 = 9 mixtures.")

    d.panel(478, 14, 448, 300, "2  Warehouse", "n = b · m_t cells, which these layers share.", "The budget b = 1 here.")
    d.cells(540, 112, 3, 3, 54, cell_colours(), [f"e{j + 1}" for j in range(CELLS)])
    for y, name in ((146, "layer 1"), (240, "layer 2")):
        d.box(796, y - 22, 100, 38)
        d.text(846, y + 2, name, anchor="middle")
        d.arrow(712, 193, 790, y)
    d.text(494, 298, "One parameter of the network: [n, c_out, c_in, ...].", "small")

    d.panel(14, 328, 448, 298, "3  Attention", "Each layer computes its own α for each image x.")
    steps = ("mean over positions", "FC, norm, ReLU", "FC: z", "z / Σ|z|")
    for i, step in enumerate(steps):
        y = 396 + 52 * i
        d.box(30, y, 158, 34)
        d.text(109, y + 22, step, anchor="middle")
        if i:
            d.arrow(109, y - 18, 109, y)
    d.arrow(188, 569, 222, 569)
    table = attentions()
    largest = max(abs(value) for row in table for value in row)
    colours = [signed_colour(value, largest) for row in table for value in row]
    d.cells(226, 430, len(table), CELLS, 24, colours)
    d.text(226, 420, "α: 6 mixtures × 9 cells", "small")
    d.text(226, 596, "orange: above 0; blue: below.", "small")
    d.text(226, 612, "A row's |α| add up to at most 1.", "small")

    lines = "Each part of the kernel is a mixture of all cells;", "the whole kernel is for this image alone."
    d.panel(478, 328, 448, 298, "4  Mix and convolve", *lines)
    d.text(494, 426, "w_i = α_i1 e_1 + ... + α_in e_n", "math")
    d.cells(508, 448, 2, 3, 50, mixed_colours(), [f"w{i + 1}" for i in range(6)])
    d.text(508, 572, "W(x), layer 1")
    d.text(690, 504, "∗", "title")
    d.box(722, 468, 60, 60)
    d.text(752, 503, "x", "math", "middle")
    d.arrow(790, 498, 832, 498)
    d.box(840, 468, 60, 60)
    d.text(870, 503, "y", "math", "middle")
    d.text(494, 606, "Another image has another α, and so another W.", "small")
    d.write(path)


ORDERS = (
    ("Kernels first", ("cells", "mix by α", "W(x) of each image", "convolve x"), "m n |e|  +  P |W|"),
    ("Inputs first", ("patches of x", "mix by α", "a sum for each cell", "times the cells"), "P n q (k + c_out)"),
    ("Outputs first", ("x", "convolve with all cells", "n outputs", "mix by α"), "P n |e|"),
)


def draw_orders(path):
    d = Drawing(940, 336, "Three orders in which the operator can be evaluated")
    for i, (title, steps, cost) in enumerate(ORDERS):
        x = 14 + 308 * i
        d.panel(x, 14, 296, 308, title)
        for j, step in enumerate(steps):
            y = 58 + 50 * j
            d.box(x + 38, y, 220, 34)
            d.text(x + 148, y + 22, step, anchor="middle")
            if j:
                d.arrow(x + 148, y - 16, x + 148, y)
        d.text(x + 148, 272, "multiply-adds of an image", "small", "middle")
        d.text(x + 148, 298, cost, "math", "middle")
    d.write(path)


def main(folder: Path = IMAGES) -> int:
    draw_operator(folder / "operator.svg")
    draw_orders(folder / "orders.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
