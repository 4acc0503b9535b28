"""What the benchmarks share: the contenders, whether their results agree, and their times in interleaved repeats."""

import contextlib
import csv
import itertools
import statistics
import sys
import time
from dataclasses import astuple, dataclass, fields

import torch

from models import build_model
from models.build import parse_name
from models.ops import mixture_conv, sample_conv, scratch
from models.ops.control import forced_backend, observed
from models.ops.geometry import geometry, is_channels_last

OPERATORS = {"mixture_conv": mixture_conv, "sample_conv": sample_conv}

# of outputs and gradients, relative to their norm; rounding gives 1e-6 in float32
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
MODES = ("inference", "training")


@dataclass
class Row:
    """One measurement: seconds of a pass (median and quartiles) and what follows from them."""

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
    peak_mb: float  # memory that a pass took at most above what was in use before it
    device: str
    torch: str


@dataclass
class Contender:
    """A way to evaluate a model."""

    model: torch.nn.Module
    backend: str | None = None  # of evaluation, for all layers; None lets the cost decide


class Case:
    """A model at a batch size, an image size, a data type and a memory layout."""

    def __init__(self, config, batch, size, dtype=torch.float32, device="cpu", channels_last=False, compiled=False):
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

    def autocast(self):
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def disagreement(self):
        """Largest relative difference to "naive", of the outputs and gradients of any layer at its own inputs.

        Of whole models it would say nothing: with random weights a difference of rounding grows by a third per layer,
        since every layer's kernels depend on what it sees.  None where no layer calls an operator.
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
                # a gradient of one sign would leave little after cancellation
                dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
                results.append([y.detach(), *torch.autograd.grad(y, tensors, dy)])
            worst = max(worst or 0.0, *map(relative, *reversed(results)))
        return worst

    def require_agreement(self, name):
        """The disagreement; ends the program where it is more than rounding."""
        error = self.disagreement()
        if error is None:
            sys.exit(
                f"error: {name}: its layers use none of {', '.join(OPERATORS)}, so that there is no naive backend to "
                "agree with; no speed is printed"
            )
        if not error <= AGREEMENT[self.dtype]:
            sys.exit(f"error: {name}: results differ from the naive backend by {error:.1e}; no speed is printed")
        return error

    def run(self, contender, mode):
        """One pass of a contender, as a function."""
        model = contender.model.train(mode == "training")

        def inference():
            with torch.inference_mode(), self.autocast():
                model(self.x)

        def training():
            model.zero_grad()
            with self.autocast():
                loss = model(self.x).square().mean()
            loss.backward()

        return inference if mode == "inference" else training

    def measure(self, modes=MODES, repeats=7):
        """Rows for every contender and mode; the repeats of the contenders are interleaved."""
        rows = []
        for mode in modes:
            times, peaks = {name: [] for name in self.contenders}, {}
            for repeat in range(repeats + 1):
                for name, contender in self.contenders.items():
                    run = self.run(contender, mode)
                    with forced_backend(contender.backend):
                        if repeat == 0:
                            if self.device == "cuda" or "compiled" in name:
                                run()  # what compiles and tunes takes memory, too
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


def _distinct_calls(model, x, context=contextlib.nullcontext):
    """[operator, how often, arguments] of one forward pass, each shape once, without biases."""
    calls = {}

    def record(name, *arguments):
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


def recorded_calls(model, x, context=contextlib.nullcontext):
    """(how often, arguments) of `mixture_conv` in one forward pass, each shape once."""
    return [call[1:] for call in _distinct_calls(model, x, context) if call[0] == "mixture_conv"]


def geometry_of(x, alpha, cells, kernel, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """The `Geometry` of a recorded call."""
    lists = ([v] * len(kernel) if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    return geometry(x.shape, alpha.shape, cells.shape, list(kernel), *lists, groups, is_channels_last(x))


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def relative(value, reference):
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def peak_memory(function, device):
    """MB of tensors that a function takes at most above what is in use before it."""
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


def write_rows(path, rows):
    """Write rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        for row in rows:
            writer.writerow(f"{v:.4g}" if isinstance(v, float) else v for v in astuple(row))


def figure(panels, height=4):
    """A matplotlib figure, without a display, and its axes in one line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4.5 * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]
