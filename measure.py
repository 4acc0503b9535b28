"""Shared by the benchmarks: the contenders, the check that their results agree, and their interleaved timings."""

import contextlib
import csv
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models import build_model
from models.build import parse_name
from models.ops import mixture_conv, sample_conv, scratch
from models.ops.control import forced_backend, observed
from models.ops.geometry import Geometry, geometry
from models.ops.layout import is_channels_last

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

OPERATORS = {"mixture_conv": mixture_conv, "sample_conv": sample_conv}

# largest difference of outputs and gradients that counts as agreement, relative to their norm; rounding gives 1e-6 in
# float32
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
MODES = ("inference", "training")


@dataclass
class Row:
    """One measurement: the seconds of a pass (median and quartiles), and the speeds that follow from them."""

    model: str
    contender: str
    mode: str
    batch: int
    size: int
    dtype: str
    layout: str
    seconds: float
    quartile_1: float
    quartile_3: float
    images_per_s: float
    of_static: float  # images per second, over those of the static network in the same run
    of_naive: float | None  # over those of the naive backend
    peak_mb: float  # greatest memory that a pass took above what was in use before it
    device: str
    torch: str


@dataclass
class Contender:
    """A model, and the backend that all of its layers use."""

    model: nn.Module
    backend: str | None = None  # None: the cheapest one for every layer, by the table of costs


class Case:
    """A model at a batch size, an image size, a data type and a memory layout.

    Args:
        config: a classification config with the key `model`, which names a dynamic model.
        batch: images of a batch.
        size: height and width of the images in pixels.
        dtype: other than float32: autocast to it.
        device: "cpu" or "cuda".
        channels_last: take the channels-last memory format.
        compiled: add the static and the dynamic model under torch.compile to the contenders.
    """

    def __init__(
        self,
        config: dict[str, Any],
        batch: int,
        size: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        self.name, self.batch, self.size, self.dtype, self.device = config["model"], batch, size, dtype, device
        self.layout = "channels_last" if channels_last else "contiguous"
        torch.manual_seed(0)
        _, backbone = parse_name(config["model"])
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.dynamic, static = (build_model(c).to(device, memory_format=layout) for c in (config, {"model": backbone}))
        self.x = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
        self.contenders = {
            "static": Contender(static),
            "naive": Contender(self.dynamic, "naive"),
            "ours": Contender(self.dynamic),
        }
        if compiled:
            self.contenders["static, compiled"] = Contender(torch.compile(static))
            self.contenders["ours, compiled"] = Contender(torch.compile(self.dynamic))

    def autocast(self) -> torch.autocast:
        """Context of the forward pass in the case's data type."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def disagreement(self) -> float | None:
        """Largest relative difference from the naive backend, over the outputs and gradients of all layers.

        Every layer is compared at its own inputs. Outputs of whole models cannot be compared: with random weights a
        rounding difference grows by a third per layer, since every layer's kernels depend on its input.

        Returns:
            None where no layer calls an operator.
        """
        worst = None
        for name, _, arguments in _distinct_calls(self.dynamic, self.x, self.autocast):
            inputs = [i for i, value in enumerate(arguments) if isinstance(value, torch.Tensor)]
            arguments, results = list(arguments), []
            for i in inputs:
                arguments[i] = arguments[i].clone().requires_grad_()
            tensors = [arguments[i] for i in inputs]
            for backend in ("naive", None):
                with forced_backend(backend), self.autocast():
                    y = OPERATORS[name](*arguments)
                # random signs, since gradients from a dy of one sign would largely cancel out
                dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
                results.append([y.detach(), *torch.autograd.grad(y, tensors, dy)])
            worst = max(worst or 0.0, *map(relative, *reversed(results)))
        return worst

    def require_agreement(self, name: str) -> float:
        """The disagreement; ends the program where it is more than rounding, or where nothing can be compared.

        Args:
            name: what to call the model in the error.
        """
        error = self.disagreement()
        if error is None:
            sys.exit(
                f"error: {name}: its layers use none of {', '.join(OPERATORS)}, so that there is no naive backend to "
                "agree with; no speed is printed"
            )
        if not error <= AGREEMENT[self.dtype]:
            sys.exit(f"error: {name}: results differ from the naive backend by {error:.1e}; no speed is printed")
        return error

    def run(self, contender: Contender, mode: str) -> Callable[[], None]:
        """A function that makes one pass of a contender; `mode` is one of `MODES`."""
        model = contender.model.train(mode == "training")

        def inference() -> None:
            with torch.inference_mode(), self.autocast():
                model(self.x)

        def training() -> None:
            model.zero_grad()
            with self.autocast():
                loss = model(self.x).square().mean()
            loss.backward()

        return inference if mode == "inference" else training

    def measure(self, modes: Sequence[str] = MODES, repeats: int = 7, until: float = math.inf) -> list[Row]:
        """Rows for every contender and mode; the repeats of the contenders are interleaved.

        Args:
            modes: some of `MODES`.
            repeats: at most so many.
            until: a time of `time.monotonic` after which only the first repeat of a mode is made.
        """
        rows = []
        for mode in modes:
            times, peaks = {name: [] for name in self.contenders}, {}
            for repeat in range(repeats + 1):
                if repeat > 1 and time.monotonic() > until:
                    break
                for name, contender in self.contenders.items():
                    run = self.run(contender, mode)
                    with forced_backend(contender.backend):
                        if repeat == 0:
                            if self.device == "cuda" or "compiled" in name:
                                run()  # compiling and tuning take memory, which the peak must not include
                            peaks[name] = peak_memory(run, self.device)
                        else:
                            times[name].append(seconds(run, self.device))
                    contender.model.zero_grad()
            medians = {name: statistics.median(values) for name, values in times.items()}
            for name, values in times.items():
                low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
                rows.append(
                    Row(
                        model=self.name,
                        contender=name,
                        mode=mode,
                        batch=self.batch,
                        size=self.size,
                        dtype=str(self.dtype).removeprefix("torch."),
                        layout=self.layout,
                        seconds=medians[name],
                        quartile_1=low,
                        quartile_3=high,
                        images_per_s=self.batch / medians[name],
                        of_static=medians["static"] / medians[name],
                        of_naive=None
                        if name.startswith("static") or "naive" not in medians
                        else medians["naive"] / medians[name],
                        peak_mb=peaks[name],
                        device=device_name(self.device),
                        torch=torch.__version__,
                    )
                )
        return rows


def _distinct_calls(
    model: nn.Module, x: Tensor, context: Callable[[], AbstractContextManager] = contextlib.nullcontext
) -> list[list[Any]]:
    """Calls of operators in one forward pass: [operator, number of calls, arguments], each set of shapes once.

    The arguments have no bias.
    """
    calls = {}

    def record(name: str, *arguments: Any) -> None:
        shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments]
        key = str((name, *shapes))
        if key not in calls:
            bias = 4 if name == "mixture_conv" else 2
            kept = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
            calls[key] = [name, 0, (*kept[:bias], None, *kept[bias + 1 :])]
        calls[key][1] += 1

    with observed(record), torch.no_grad(), context():
        model.eval()(x)
    return list(calls.values())


def recorded_calls(
    model: nn.Module, x: Tensor, context: Callable[[], AbstractContextManager] = contextlib.nullcontext
) -> list[list[Any]]:
    """Calls of `mixture_conv` in one forward pass: [number of calls, arguments], each set of shapes once.

    Args:
        model: a dynamic model; it is put into evaluation mode.
        x: images [B, 3, H, W].
        context: makes the context of the forward pass.
    """
    return [call[1:] for call in _distinct_calls(model, x, context) if call[0] == "mixture_conv"]


def geometry_of(
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    kernel: Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Geometry:
    """The `Geometry` of a recorded call; the arguments are those of `mixture_conv`."""
    lists = ([v] * len(kernel) if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    return geometry(x.shape, alpha.shape, cells.shape, list(kernel), *lists, groups, is_channels_last(x))


def device_name(device: str) -> str:
    """The name of the GPU, or the instruction set of the CPU and its number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def relative(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference, relative to that of the reference."""
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


def wait(device: str) -> None:
    """Wait until a GPU has finished its work; the CPU needs no waiting."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: str) -> float:
    """Seconds that a call takes, until the device has finished its work."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def peak_memory(function: Callable[[], Any], device: str) -> float:
    """Greatest memory that tensors take during a call, in MB (2^20 bytes) above what was in use before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    scratch.forget()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes, initial=0)) / 2**20


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        for row in rows:
            writer.writerow(f"{v:.4g}" if isinstance(v, float) else v for v in astuple(row))


def figure(panels: int, height: float = 4) -> "tuple[Figure, np.ndarray]":
    """A matplotlib figure, which needs no display, and an array of its axes [panels], side by side.

    Args:
        panels: number of axes.
        height: height of the figure in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4.5 * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]
