"""The page about a GPU: what was checked, how fast the networks are, and which backend every layer takes."""

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from measure import Row
from models.ops.backends import BACKENDS

from .report import Report
from .timing import STATIC, Layer, Size, chosen_backends, ratios

GOALS = {
    "inference / static": ">= 0.8", "training / static": ">= 0.7", "inference, memory / static": "<= 1.2",
    "training, memory / static": "<= 1.2", "inference / naive": ">= 3 for ResNets",
    "training / naive": ">= 3 for ResNets",
}  # fmt: skip
NOT_MEASURED = "An empty cell was not measured, for lack of time or memory."


def machine(report: Report) -> str:
    """The device, and the versions of what runs on it."""
    versions = {"torch": str(torch.__version__), "Python": platform.python_version()}
    for name in ("triton", "timm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    if report.device != "cuda":
        return f"CPU, {text}"
    own = torch.cuda.get_device_properties(0)
    return (
        f"{own.name}, compute capability {own.major}.{own.minor}, {own.total_memory / 2**30:.0f} GiB, "
        f"CUDA {torch.version.cuda}, {text}"
    )


def write_page(
    path: Path, report: Report, found: dict[str, list[Row]], names: Sequence[str], layers: Sequence[Layer], size: Size
) -> None:
    """Write the page.

    Args:
        path: of the Markdown file.
        report: the outcome of the checks.
        found: network -> its rows.
        names: all networks, those without rows, too.
        layers: with their times.
        size: what was timed.
    """
    dtype = str(size.dtype).removeprefix("torch.")
    lines = ["# On a GPU", "", f"`python scripts/gpu_check.py`, {machine(report)}.", ""]
    if report.dry:
        lines += ["**A dry run on the CPU: its times say nothing.**", ""]
    lines += [f"{report.summary()}.", *(f"- FAILED {line}" for line in report.failures), ""]
    shown = f"{dtype}, channels-last, batch {size.batch}, {size.image}x{size.image}"
    lines += ["## Networks", "Images per second and memory over those of the static network, and images per second",
              f"over those of the naive backend: {shown}. {NOT_MEASURED}", ""]  # fmt: skip
    lines += _table(["network", *GOALS], [["goal", *GOALS.values()], *(_ratios(name, found) for name in names)])
    lines += ["", "Median milliseconds of a pass, with the lower and the upper quartile:", ""]
    times = [
        [name, row.mode, row.contender, *(f"{1e3 * v:.2f}" for v in (row.seconds, row.quartile_1, row.quartile_3)),
         f"{row.images_per_s:.0f}", f"{row.peak_mb:.0f}"]
        for name, rows in found.items() for row in rows
    ]  # fmt: skip
    lines += _table(["network", "mode", "contender", "median", "quartile 1", "quartile 3", "images/s", "MB"], times)
    lines += ["", "## Layers", "Median microseconds of the forward / the backward pass; * is chosen by the costs. "
              f"`{STATIC}` is the same layer with one kernel for all samples. {NOT_MEASURED}", ""]  # fmt: skip
    used = [name for name in (STATIC, *BACKENDS) if any(name in layer.times for layer in layers)]
    rows = [[_users(layer), str(layer.shapes), *_cells(layer, used, size, report.device)] for layer in layers]
    lines += _table(["layers", "shapes", *used], rows)
    lines += ["", "## Checks", *(f"- {line}" for line in report.lines), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def _ratios(name: str, found: dict[str, list[Row]]) -> list[str]:
    values = ratios(found.get(name, []))
    return [name, *("" if values[title] is None else f"{values[title]:.2f}" for title in GOALS)]


def _users(layer: Layer) -> str:
    return "; ".join(f"{count} in {network}" for network, count in layer.users)


def _cells(layer: Layer, used: Sequence[str], size: Size, device: str) -> list[str]:
    forward, backward = chosen_backends(layer, size.dtype, device)
    cells = []
    for name in used:
        both = layer.times.get(name)
        marks = ["*" if name == own else "" for own in (forward, backward)]
        cells.append("" if both is None else " / ".join(f"{q[1]:.0f}{mark}" for q, mark in zip(both, marks)))
    return cells


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
