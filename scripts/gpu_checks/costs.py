"""Fits the costs of the backends to the times of layers, and keeps them where `models/ops/cost.py` reads them."""

import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from models.ops.cost import estimate
from models.ops.fitted_costs import Table, fitted_costs, read_costs
from utils import replace_file

from .report import Report
from .timing import PATIENCE, Layer, Size

# with fewer layers than costs of a backend a fit says nothing about other layers
LEAST = 10


def fit_costs(report: Report, layers: Sequence[Layer], size: Size) -> Table | None:
    """Costs of every backend that was timed on enough layers; None where there are none, or better ones are known.

    Args:
        report: receives how good they are.
        layers: with their times.
        size: the data type counts.
    """
    try:
        # needs SciPy
        fitting = importlib.import_module("fit_costs")
    except ImportError as error:
        report.note(f"the costs were not fitted: {error}")
        return None
    measured = [(layer.count, layer.geo, layer.medians(PATIENCE)) for layer in layers if layer.times]
    counts = {name: sum(name in times for _, _, times in measured) for _, _, times in measured for name in times}
    few = {name for name, count in counts.items() if count < (1 if report.dry else LEAST)}
    measured = [(n, geo, {b: t for b, t in times.items() if b not in few}) for n, geo, times in measured]
    bytes_ = size.dtype.itemsize
    table = fitting.fit_all(measured, bytes_)
    if not table:
        report.note("the costs were not fitted: no backend was timed on enough layers")
        return None
    fitted = [fitting.excess(measured, table, bytes_, way) for way in (0, 1)]
    present = [_present_excess(measured, bytes_, report.device, way) for way in (0, 1)]
    about = "the backends that the {} costs choose take {:.2f} (forward) and {:.2f} (backward) times the fastest ones'"
    report.note(about.format("fitted", *fitted))
    report.note(about.format("present", *present))
    if sum(fitted) >= sum(present) and not report.dry:
        report.note("the present costs are kept, since the fitted ones choose no better")
        return None
    return table


def _present_excess(measured: Sequence, item_bytes: int, device: str, direction: int) -> float:
    """As `fit_costs.excess`, for the costs that are in use."""
    chosen = best = 0.0
    for count, geo, times in measured:
        if times:
            name = min(times, key=lambda name: estimate(name, geo, item_bytes, device, bool(direction)))
            chosen += count * times[name][direction]
            best += count * min(values[direction] for values in times.values())
    return chosen / best if best else math.nan


def write_costs(path: Path, capability: str, size: Size, table: Table) -> None:
    """Put costs into the file, beside those of other GPUs, and use them from here on."""
    costs = read_costs(path)
    costs.setdefault(capability, {})[str(size.dtype.itemsize)] = table
    text = json.dumps(costs, indent=1, sort_keys=True) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: file.write(text.encode()), verify=read_costs)
    forget_choices()


def forget_choices() -> None:
    """Choose backends anew, by the costs that are in the file now."""
    fitted_costs.cache_clear()
    importlib.import_module("models.ops.mixture_conv")._plan.cache_clear()
