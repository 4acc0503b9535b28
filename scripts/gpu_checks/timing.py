"""Times of every backend by layer, and of whole networks beside the static and the naive ones."""

import contextlib
import csv
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from measure import AGREEMENT, MODES, Case, Row, seconds, write_rows
from models.ops.backends import BACKENDS, available_backends
from models.ops.convolution import conv
from models.ops.cost import cheapest, estimate
from models.ops.geometry import Geometry

from .cases import Shapes
from .operators import COMPILED
from .report import Mismatch, Report

STATIC = "static"  # the same layer with one kernel for all samples
REPEATS = 5
# backends that take so many times as long as the fastest one are timed once, and not fitted
PATIENCE = 4
# those that are expected to be so many times slower are left out: some would take seconds, or all memory
HOPELESS = 50

Quartiles = tuple[float, float, float]  # lower quartile, median, upper quartile, in microseconds


@dataclass
class Layer:
    """Times of one layer: backend -> (forward, backward)."""

    shapes: Shapes
    geo: Geometry
    users: list[tuple[str, int]] = field(default_factory=list)  # networks, and how many of their layers these are
    times: dict[str, tuple[Quartiles, Quartiles]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many layers of the timed networks these are."""
        return sum(count for _, count in self.users)

    def medians(self, patience: float = math.inf) -> dict[str, tuple[float, float]]:
        """Backend -> median times of the forward and the backward pass, without the static layer.

        Args:
            patience: leave out those that take so many times as long as the fastest one.
        """
        found = {name: (forward[1], back[1]) for name, (forward, back) in self.times.items() if name != STATIC}
        best = min(map(sum, found.values()), default=0.0)
        return {name: times for name, times in found.items() if sum(times) <= patience * best}


@dataclass(frozen=True)
class Size:
    """What is timed: images of a batch, their height and width, and the data type."""

    batch: int = 128
    image: int = 224
    dtype: torch.dtype = torch.bfloat16


def layers_of(recorded: dict[str, list[tuple[int, Shapes]]], size: Size) -> list[Layer]:
    """The layers of networks, each once, in their order.

    Args:
        recorded: network -> what `cases.layer_shapes` found.
        size: their batch counts.
    """
    found = {}
    for network, calls in recorded.items():
        for count, shapes in calls:
            shapes = shapes.of_batch(size.batch)
            layer = found.setdefault(shapes, Layer(shapes, shapes.geometry(True)))
            layer.users.append((network, count))
    return list(found.values())


# --- layers -------------------------------------------------------------------------------------------------------


def repeated(function: Callable[[], Any], device: str, repeats: int) -> Quartiles:
    """Quartiles of the times of a call in microseconds.

    On a GPU all calls are made at once, as in a network, and events between them take the times.
    """
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        torch.cuda.synchronize()
        values = [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    else:
        values = [1e6 * seconds(function, device) for _ in range(repeats)]
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if repeats > 1 else (values[0],) * 3


def time_layers(report: Report, layers: Sequence[Layer], size: Size, skip: set[str]) -> None:
    """Fill in the times of all layers: first of the backends that need no compiler, then of those that do.

    Args:
        report: receives what fails.
        layers: changed in place.
        size: the data type counts.
        skip: names of backends to leave out, since their results are wrong or not asked for.
    """
    names = [[STATIC, *(name for name in BACKENDS if name not in COMPILED)], [*COMPILED]]
    # a third of the time is left to those that are compiled
    halfway = time.monotonic() + 2 / 3 * report.time_left()
    for some, until in zip(names, (halfway, report.deadline), strict=True):
        # Triton's interpreter takes seconds for a layer
        for layer in layers if some[0] == STATIC or not report.dry else layers[:1]:
            for name in some:
                if time.monotonic() > until:
                    break
                if name not in skip and _worth(layer, name, size.dtype, report.device):
                    _time(report, layer, name, size.dtype)
    timed = sum(len(layer.medians()) > 0 for layer in layers)
    both = sum(any(name in layer.times for name in COMPILED) for layer in layers)
    report.note(f"{timed} of {len(layers)} layers were timed, {both} of them with Triton; the others are left empty")


def _worth(layer: Layer, name: str, dtype: torch.dtype, device: str) -> bool:
    """Whether a backend can evaluate a layer, and is not expected to take far too long."""
    if name == STATIC or name in COMPILED:
        return name == STATIC or BACKENDS[name].available(layer.geo, dtype, device)
    names = [n for n in available_backends(layer.geo, dtype, device) if n not in COMPILED]
    costs = {n: estimate(n, layer.geo, dtype.itemsize, device) for n in names}
    return name in costs and costs[name] <= HOPELESS * min(costs.values())


def _time(report: Report, layer: Layer, name: str, dtype: torch.dtype) -> None:
    """Time a backend on a layer; one that needs more memory than there is gets no time."""
    times = report.attempt(f"time of {name}, {layer.shapes}", _times, layer, name, dtype, report.device, report.dry)
    if times is not None:
        layer.times[name] = times


def _times(layer: Layer, name: str, dtype: torch.dtype, device: str, once: bool) -> tuple[Quartiles, Quartiles] | None:
    try:
        runs = _passes(layer, name, dtype, device)
        first = sum(seconds(run, device) for run in runs) * 1e6
        best = min((sum(times) for times in layer.medians().values()), default=first)
        repeats = 1 if once or first > PATIENCE * best else REPEATS
        return tuple(repeated(run, device, repeats) for run in runs)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _passes(layer: Layer, name: str, dtype: torch.dtype, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Functions that make the forward and the backward pass, after each was made once, which compiles and tunes."""
    tensors = layer.shapes.tensors(dtype, device, True)
    if name == STATIC:
        x, weight = _static_layer(layer.shapes, tensors)
        forward = partial(conv, x, weight, *layer.shapes.arguments[1:])
        y = forward()
        arguments = [*layer.shapes.arguments[2:5], False, [0] * (x.ndim - 2), layer.shapes.groups, [True, True, False]]
        backward = partial(torch.ops.aten.convolution_backward, torch.randn_like(y), x, weight, None, *arguments)
    else:
        forward = partial(BACKENDS[name].forward, *tensors, layer.geo)
        y = forward()
        backward = partial(BACKENDS[name].backward, torch.randn_like(y), *tensors, layer.geo, [True] * 3)
    backward()
    return forward, backward


def _static_layer(shapes: Shapes, tensors):
    geo = shapes.geometry(True)
    x = tensors[0]
    weight = torch.randn(geo.c_out, geo.c_in, *shapes.kernel, dtype=x.dtype, device=x.device)
    return x, weight.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else weight


def write_layers(path: Path, layers: Sequence[Layer], size: Size, device: str) -> None:
    """Write the times of all layers as CSV; `chosen` marks the backend of the present table of costs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        quartiles = [f"{way}_{q}_us" for way in ("forward", "backward") for q in ("quartile_1", "median", "quartile_3")]
        writer.writerow(["networks", "layers", "shapes", "backend", "chosen_forward", "chosen_backward", *quartiles])
        for layer in layers:
            chosen = chosen_backends(layer, size.dtype, device)
            users = "; ".join(f"{count} in {network}" for network, count in layer.users)
            for name, both in layer.times.items():
                marks = ["yes" if name == own else "" for own in chosen]
                times = [f"{value:.4g}" for quartiles in both for value in quartiles]
                writer.writerow([users, layer.count, str(layer.shapes), name, *marks, *times])


def chosen_backends(layer: Layer, dtype: torch.dtype, device: str) -> list[str]:
    """The backends that the table of costs chooses for the forward and the backward pass."""
    available = available_backends(layer.geo, dtype, device)
    return [cheapest(layer.geo, available, dtype.itemsize, device, backward) for backward in (False, True)]


# --- whole networks -----------------------------------------------------------------------------------------------


def time_networks(report: Report, networks: dict[str, dict[str, Any]], size: Size) -> dict[str, list[Row]]:
    """Time whole networks, the static, the naive and the chosen order of each; empty where there was no time.

    Args:
        report: receives what fails.
        networks: names -> configs.
        size: batch, image and data type.
    """
    found: dict[str, list[Row]] = {}
    longest = 0.0
    for name, config in networks.items():
        # no network is begun that would not end in time
        if report.time_left() <= 1.3 * longest:
            continue
        begun = time.monotonic()
        rows = report.attempt(f"whole network, {name}", _time_network, report, name, config, size)
        longest = max(longest, time.monotonic() - begun)
        found |= {name: rows} if rows else {}
    if len(found) < len(networks):
        report.note(f"no time, or a failure: {', '.join(name for name in networks if name not in found)}")
    return found


def _time_network(report: Report, name: str, config: dict[str, Any], size: Size) -> list[Row]:
    with _freed(report.device):
        # few images tell whether the layers agree with the definition
        case = Case(config, 2, size.image, size.dtype, report.device, channels_last=True)
        error = case.disagreement()
        if error is not None and not error <= AGREEMENT[size.dtype]:
            raise Mismatch(f"results differ from the naive backend by {error:.1e}; no speed is given")
        del case
    # a share of the time that is left, so that others have theirs
    until = time.monotonic() + report.time_left() / 4
    repeats = 1 if report.dry else REPEATS
    with _freed(report.device):
        case = Case(config, size.batch, size.image, size.dtype, report.device, channels_last=True)
        try:
            rows = case.measure(MODES, repeats, until)
        except torch.OutOfMemoryError:
            report.note(f"{name}: the naive backend needs more memory than there is")
            torch.cuda.empty_cache()
            del case.contenders["naive"]
            rows = case.measure(MODES, repeats, until)
        del case
    for mode in MODES:
        row = _row(rows, mode, "ours")
        naive = f", {row.of_naive:.2f} of naive" if row.of_naive else ""
        report.note(f"{name}, {mode}: {row.of_static:.2f} of static{naive}")
    return rows


@contextlib.contextmanager
def _freed(device: str) -> Iterator[None]:
    """Give back the memory that the context took."""
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


def _row(rows: Sequence[Row], mode: str, contender: str) -> Row | None:
    return next((row for row in rows if row.mode == mode and row.contender == contender), None)


def write_networks(path: Path, found: dict[str, list[Row]]) -> None:
    """Write the rows of all networks as CSV."""
    write_rows(path, [row for rows in found.values() for row in rows])


def ratios(rows: Sequence[Row]) -> dict[str, float | None]:
    """What the written table shows of a network; None where it was not measured."""
    shown: dict[str, float | None] = {}
    for mode in MODES:
        ours, static = _row(rows, mode, "ours"), _row(rows, mode, "static")
        shown[f"{mode} / static"] = ours and ours.of_static
        shown[f"{mode} / naive"] = ours and ours.of_naive
        shown[f"{mode}, memory / static"] = ours and ours.peak_mb / max(static.peak_mb, 1e-9)
    return shown
