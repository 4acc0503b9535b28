"""Charts as SVG that stands in a page: curves, which page.js makes readable by the pointer, and a confusion matrix."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from models.messages import printable

# size of a chart in its own units, and its margins: left, right, top, bottom
WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40
COLOURS = 7
# points of a curve; more cannot be told apart
POINTS = 400
# classes of a matrix, and of one that shows numbers
LARGEST_MATRIX, NUMBERED_MATRIX = 30, 16


def text(value: object) -> str:
    """A text for HTML and SVG: characters with a meaning there, and those that are not printable, are escaped."""
    return html.escape(printable(value), quote=True)


@dataclass
class Curve:
    """A curve of a chart.

    Attributes:
        name: in the legend.
        points: (x, y).
        colour: its number; curves of one run have one.
        dashed: as those of training are.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False


def thinned(points: Sequence[tuple[float, float]], count: int = POINTS) -> list[tuple[float, float]]:
    """At most about `count` points of a curve: of every section the lowest and the highest, so that no peak is lost."""
    if len(points) <= count:
        return list(points)
    size = math.ceil(2 * len(points) / count)
    kept = [points[0]]
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]


def ticks(low: float, high: float, count: int = 7) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number for a chart or a table."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def curves_chart(title: str, unit: str, curves: Sequence[Curve], xlabel: str) -> str:
    """A chart of curves with its legend as HTML; empty where no curve has a point."""
    curves = [Curve(c.name, thinned(c.points), c.colour, c.dashed) for c in curves if c.points]
    if not curves:
        return ""
    xs, ys = ([point[i] for curve in curves for point in curve.points] for i in (0, 1))
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    if x1 == x0:
        x0, x1 = x0 - 0.5, x1 + 0.5
    if y1 - y0 < 1e-12 * max(1.0, abs(y1)):
        spare = abs(y0) * 0.1 or 1.0
        y0, y1 = y0 - spare, y1 + spare
    y0, y1 = y0 - 0.04 * (y1 - y0), y1 + 0.04 * (y1 - y0)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for value in ticks(y0, y1):
        y = at(x0, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(x0, x1, 6):
        x = at(value, y0)[0]
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(value)}</text>'
        )
    axis = f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"
    parts.append(f'<path class="axis" d="{axis}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{text(xlabel)}</text>')
    legend = []
    for curve in curves:
        places = [at(*point) for point in curve.points]
        kind = f"c{curve.colour % COLOURS}" + (" dashed" if curve.dashed else "")
        data = text(
            json.dumps([[float(f"{x:.6g}"), float(f"{y:.6g}")] for x, y in curve.points], separators=(",", ":"))
        )
        name = text(curve.name)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="{kind}" points="{line}" data-name="{name}" data-points="{data}"/>')
        if len(places) < 30:
            parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
        legend.append(f"<li>{swatch(kind)}{name}</li>")
    scale = f'data-x0="{x0!r}" data-x1="{x1!r}" data-left="{LEFT}" data-right="{WIDTH - RIGHT}"'
    scale += f' data-xlabel="{text(xlabel)}"'
    heading = text(title) + (f" <small>({text(unit)})</small>" if unit else "")
    return (
        f'<figure class="chart"><figcaption>{heading}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}" {scale}>{"".join(parts)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def swatch(kind: str) -> str:
    """A piece of a curve for a legend."""
    return f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><path class="{kind}" d="M0 4H24"/></svg>'


def matrix(confusion: dict[tuple[int, int], int], classes: Sequence[str]) -> str:
    """A confusion matrix: rows are true classes, columns predicted ones, colours the share of the row."""
    count, cell, left, top = len(classes), 34, 110, 26
    totals = [sum(n for (true, _), n in confusion.items() if true == row) for row in range(count)]
    # longer names would not fit beside the rows
    names = [text(name if len(name) <= 16 else name[:14] + "..") for name in map(printable, classes)]
    short = [text(name if len(name) <= 4 else name[:3] + ".") for name in map(printable, classes)]
    parts = []
    for index in range(count):
        y, x = top + index * cell + cell / 2 + 4, left + index * cell + cell / 2
        parts.append(f'<text class="tick" x="{left - 6}" y="{y}" text-anchor="end">{names[index]}</text>')
        parts.append(f'<text class="tick" x="{x}" y="{top - 8}" text-anchor="middle">{short[index]}</text>')
    for true in range(count):
        for predicted in range(count):
            found = confusion.get((true, predicted), 0)
            share = found / totals[true] if totals[true] else 0.0
            x, y = left + predicted * cell, top + true * cell
            about = f"{text(classes[true])} predicted as {text(classes[predicted])}: {found} of {totals[true]} images"
            # a share of 1 in 100 must still be seen
            opacity = 0 if not found else 0.12 + 0.88 * share
            parts.append(
                f'<rect class="cell" x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                f'fill-opacity="{opacity:.3f}"><title>{about}</title></rect>'
            )
            if found and count <= NUMBERED_MATRIX:
                kind = "on" if opacity > 0.55 else "tick"
                middle = x + cell / 2
                parts.append(f'<text class="{kind}" x="{middle}" y="{y + 21}" text-anchor="middle">{found}</text>')
    width, height = left + count * cell, top + count * cell
    return (
        f'<svg class="matrix" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="confusion matrix">{"".join(parts)}</svg>'
    )
