"""What all pictures share: their style, how they are written, and the check of the libraries that draw them.

Colours are those of viridis and cividis, whose lightness grows with the value, so that they survive a printer without
colours and are told apart by colour-blind readers; lines and points are those of Okabe and Ito.
"""

import contextlib
import importlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.config import ConfigError
from models.messages import printable
from utils import errors_name, replace_file

STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 11,
    "legend.fontsize": 7,
    "image.cmap": "viridis",
    "image.interpolation": "nearest",
    "svg.fonttype": "none",
    # a name of a class may have dollar signs, and is no formula
    "text.parse_math": False,
}
# Okabe and Ito, "Color Universal Design" (2008), without yellow, which is too light on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>P*X"
DPI = 150
# vector graphics of more bytes open slowly; the PNG remains
LARGEST_SVG = 400_000
PACKAGES = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "torchcam": "torchcam"}


def require(*modules: str) -> None:
    """Check that libraries can be imported.

    Raises:
        ConfigError: names the package that is missing.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            package = PACKAGES[name]
            raise ConfigError(f"the pictures need {package}, which is not installed: pip install {package}") from None


@dataclass
class Picture:
    """A picture to write.

    Attributes:
        name: of its file, without the suffix.
        caption: what it shows, for readers who know neither the code nor the command.
        figure: a figure of matplotlib.
    """

    name: str
    caption: str
    figure: Any = field(repr=False)
    _drawn: dict[int, bytes] = field(default_factory=dict, repr=False)

    def png(self, dpi: int = DPI) -> bytes:
        if dpi not in self._drawn:
            self._drawn[dpi] = _written(self.figure, "png", dpi)
        return self._drawn[dpi]

    def svg(self) -> bytes | None:
        """The picture as vector graphics; None where it is large."""
        content = _written(self.figure, "svg", DPI)
        return content if len(content) <= LARGEST_SVG else None


def _written(figure: Any, form: str, dpi: int) -> bytes:
    file = io.BytesIO()
    with style(), warnings.catch_warnings():
        # a font lacks the letters of many scripts
        warnings.simplefilter("ignore")
        metadata = {"Date": None} if form == "svg" else {}
        figure.savefig(file, format=form, dpi=dpi, metadata=metadata)
    return file.getvalue()


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for the pictures."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Any:
    """A figure of a size in inches, which no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # above about 400 inches a picture at this resolution cannot be written
    figure = Figure(figsize=(min(width, 60), min(height, 60)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_panels(count: int, most: int, size: tuple[float, float], margin: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure and its panels in rows, of which those beyond `count` stay empty.

    Args:
        count: of the panels.
        most: panels of a row.
        size: width and height of a panel in inches.
        margin: width and height that the figure has beside them.
    """
    columns = min(most, count)
    rows = -(-count // columns)
    figure = new_figure(size[0] * columns + margin[0], size[1] * rows + margin[1])
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def file_name(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:60].strip(".") or "_"


def label(text: object, length: int = 40) -> str:
    """A text for a picture: printable, and no longer than it should be."""
    text = printable(text)
    return text if len(text) <= length else text[: length - 3] + "..."


def write(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write pictures as PNG, and as SVG where that is small; returns the files.

    All of them are drawn before the first is written.

    Raises:
        ConfigError: a file cannot be written.
    """
    contents = {}
    for picture in pictures:
        contents[folder / f"{picture.name}.png"] = picture.png()
        svg = picture.svg()
        if svg is not None:
            contents[folder / f"{picture.name}.svg"] = svg
    for path, content in contents.items():
        with errors_name(path):
            replace_file(path, lambda file, content=content: file.write(content))
    return list(contents)
