"""Training steps and evaluations of a small model of every method, on the device against the CPU."""

import argparse
import contextlib
import copy
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import engine
import utils
from models import build_model
from models.ops.backends import triton_support
from models.ops.control import forced_backend
from models.options import OPTIONS
from optim_factory import Schedule, create_optimizer
from utils import Process

from .cases import METHODS
from .operators import COMPILED, exact_float32, untuned
from .report import Mismatch, Report

CLASSES, BATCH, SIZE = 10, 16, 64
DECAY = 0.5  # of the averaged weights
CPU = torch.device("cpu")
AMP = {"": "auto", "bf16": "bfloat16", "fp16": "float16"}  # names as in the options
# Largest difference of the update and of the loss, relative to them, beside several times what the same data type
# gives on the CPU: in a network rounding grows from layer to layer, and no two devices round alike.
TIMES, SLACK, SLACK_AMP = 4.0, 1e-3, 1e-2
MOST = 0.1  # in float32


@dataclass(frozen=True)
class Setting:
    """How a step is made. `amp` is "", "bf16" or "fp16"; `average`: where averaged weights are kept, "" for nowhere."""

    name: str
    amp: str = ""
    last: bool = False
    average: str = ""
    compiled: str = ""  # a backend of torch.compile
    backend: str = ""  # of the operator
    parallel: bool = False  # in DistributedDataParallel
    opt: str = "sgd"


FLOAT32 = Setting("float32")
BF16 = Setting("bf16, channels-last, EMA on the device", "bf16", True, "device")
FP16 = Setting("fp16 with a scaler, EMA on the CPU", "fp16", average="cpu")
TRITON = [Setting(f"bf16, channels-last, backend {name}", "bf16", True, backend=name) for name in COMPILED]
PARALLEL = Setting("DistributedDataParallel", parallel=True)
TRACED, INDUCTOR = (
    Setting(f"torch.compile ({name}), bf16, channels-last", "bf16", True, compiled=name)
    for name in ("aot_eager", "inductor")
)


def options(**changes: Any) -> argparse.Namespace:
    """The defaults of all options but for those given, of a run of one epoch that prints nothing."""
    quiet = {"log_interval": 1000, "epochs": 1, "warmup_epochs": 0, "min_lr": 0.0, "temp_epoch": 1, "dist_eval": False}
    return argparse.Namespace(**{**{name: option.default for name, option in OPTIONS.items()}, **quiet, **changes})


def images(count: int) -> tuple[Tensor, Tensor]:
    """Random images [count, 3, H, W] of classes [count]."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    return torch.randn(count, 3, SIZE, SIZE, generator=generator) + labels[:, None, None, None] / CLASSES, labels


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """What a step gave: the change of all weights in float64, the loss, and that of an evaluation before it."""

    update: Tensor
    loss: float
    evaluated: float


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().cpu().double().flatten() for parameter in model.parameters()])


@contextlib.contextmanager
def _one_process(device: torch.device) -> Iterator[None]:
    """Inside the context this process is a group of its own, as in a run of several."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # alone, it needs no network
        os.environ.setdefault(variable, "lo")
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        f"cpu:gloo,cuda:{utils.GPU_BACKEND}" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1,
        device_id=device if on_gpu else None,
    )  # fmt: skip
    try:
        yield
    finally:
        utils.leave_processes()


def train(
    model: nn.Module, loader: Iterable, steps: int, setting: Setting, device: torch.device
) -> tuple[dict[str, Any], ModelEmaV3 | None]:
    """Train a model, which is on the device, with the project's own loop; returns its metrics and the average."""
    args = options(
        batch_size=BATCH, opt=setting.opt, lr=0.01, momentum=0.0, use_amp=bool(setting.amp), amp_dtype=AMP[setting.amp],
        channels_last=setting.last, weight_decay=0.0,
    )  # fmt: skip
    if setting.last:
        model.to(memory_format=torch.channels_last)
    where = CPU if setting.average == "cpu" else device
    ema = ModelEmaV3(model, decay=DECAY, device=where) if setting.average else None
    with contextlib.ExitStack() as context:
        net = model
        if setting.parallel:
            context.enter_context(_one_process(device))
            net = utils.in_parallel(model, device)
        context.enter_context(forced_backend(setting.backend or None))
        # a small scale, so that the first update is not skipped
        scaler = torch.amp.GradScaler(device.type, init_scale=128.0, enabled=setting.amp == "fp16")
        metrics = engine.train_one_epoch(
            net, loader, create_optimizer(args, model), Schedule(args, steps), nn.CrossEntropyLoss(), args=args,
            epoch=0, process=Process(0, 1, 0, 1, device), scaler=scaler, ema=ema,
        )  # fmt: skip
    return metrics, ema


@torch.no_grad()
def _take_statistics(model: nn.Module) -> None:
    """Give every BatchNorm the statistics of the images, as a training would: fresh ones do not fit the weights."""
    norms = [module for module in model.modules() if hasattr(module, "running_mean")]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.momentum = 1.0
    model.train()(images(BATCH)[0])
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum


def step_of(start: nn.Module, setting: Setting, device: torch.device, dtype: torch.dtype = torch.float32) -> Step:
    """An evaluation of the weights of `start`, which stay as they are, and one update from them.

    Raises:
        Mismatch: the averaged weights are not the average.
    """
    model = copy.deepcopy(start).to(device, dtype)
    before = _weights(model)
    pictures, labels = images(BATCH)
    data = TensorDataset(pictures.to(dtype), labels)
    loader = DataLoader(data, batch_size=BATCH, pin_memory=device.type == "cuda")
    if setting.compiled:
        model.compile(backend=setting.compiled)
    with contextlib.redirect_stdout(io.StringIO()):
        args = options(use_amp=bool(setting.amp), amp_dtype=AMP[setting.amp], channels_last=setting.last)
        with forced_backend(setting.backend or None):
            evaluated = engine.evaluate(model, loader, args=args, device=device)["loss"]
        metrics, ema = train(model, loader, 1, setting, device)
    update = _weights(model) - before
    if ema is not None:
        expected = before + (1 - DECAY) * update
        if not torch.allclose(_weights(ema.module), expected, rtol=1e-4, atol=1e-6):
            raise Mismatch("the averaged weights are not the average of the weights")
    return Step(update, metrics["loss"], evaluated)


class Method:
    """A method's small model, and what a step of it gives on the CPU."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = build_model(METHODS[name], num_classes=CLASSES)
        _take_statistics(self.model)
        self.exact = step_of(self.model, Setting("float64"), CPU, torch.float64)
        self._rounded: dict[str, Step] = {}

    def rounded(self, amp: str) -> Step:
        """A step on the CPU in float32, or in mixed precision."""
        if amp not in self._rounded:
            self._rounded[amp] = step_of(self.model, Setting(amp, amp), CPU)
        return self._rounded[amp]

    def compare(self, setting: Setting, device: torch.device) -> tuple[float, float]:
        """Differences of a step on the device from the exact one: of the update and of the losses.

        Raises:
            Mismatch: they are more than rounding.
        """
        # a backend of torch.compile sees one model
        torch.compiler.reset()
        step, standard = step_of(self.model, setting, device), self.rounded("bf16" if setting.amp else "")
        found, allowed = self._errors(step), self._errors(standard)
        for what, error, rounding in zip(("update", "loss", "loss of the evaluation"), found, allowed, strict=True):
            limit = TIMES * rounding + SLACK_AMP if setting.amp else min(TIMES * rounding + SLACK, MOST)
            if not error <= limit:
                raise Mismatch(f"the {what} differs by {error:.1e} from that in float64, more than {limit:.1e}")
        return found[0], max(found[1:])

    def _errors(self, step: Step) -> list[float]:
        exact = self.exact
        update = float((step.update - exact.update).norm() / exact.update.norm().clamp_min(1e-30))
        losses = ((step.loss, exact.loss), (step.evaluated, exact.evaluated))
        return [update, *(abs(a - b) / abs(b) for a, b in losses)]


# --- all of it --------------------------------------------------------------------------------------------------------


def device_of(name: str) -> torch.device:
    """The device of that name, "cuda" or "cpu"."""
    return torch.device(name, 0) if name == "cuda" else CPU


def check(report: Report, skip: Sequence[str] = ()) -> None:
    """A step and an evaluation of every method, in the settings in which users train.

    Args:
        report: receives the outcome.
        skip: names of backends to leave out.
    """
    with exact_float32(), untuned():
        methods = {}
        for name, setting in _plan(report.dry, skip):
            if name not in methods:
                methods[name] = report.check(f"{name} on the CPU", Method, name)
            if methods[name] is not None:
                _compare(report, name, methods[name], setting, device_of(report.device))


def _compare(report: Report, name: str, method: Method, setting: Setting, device: torch.device) -> None:
    errors = report.check(f"{name}, {setting.name}", method.compare, setting, device)
    if errors is not None:
        report.note(f"{name}, {setting.name}: update differs by {errors[0]:.0e}, losses by {errors[1]:.0e}")


def _plan(dry: bool, skip: Sequence[str]) -> list[tuple[str, Setting]]:
    """Methods and settings in the order in which they are checked."""
    if dry:
        # Triton's interpreter takes minutes for a network, and inductor half a minute
        return [(name, BF16) for name in METHODS] + [("kw", setting) for setting in (FLOAT32, FP16, PARALLEL, TRACED)]
    triton = [setting for setting in TRITON if setting.backend not in skip and triton_support.installed()]
    plan = [(name, setting) for setting in (FLOAT32, BF16, FP16) for name in METHODS]
    plan += [(name, setting) for setting in (PARALLEL, *triton) for name in ("kw", "odconv")]
    return [*plan, ("kw", INDUCTOR), *((name, TRACED) for name in METHODS)]
