"""A whole run that goes on from a checkpoint, and steps in which nothing may wait for the device."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import engine
import main as program
from models import build_model

from .cases import METHODS
from .operators import exact_float32, untuned
from .report import Mismatch, Report
from .training import BATCH, CLASSES, Setting, device_of, images, train

# of the check for synchronisations: the first for every method
STEPS = [
    Setting("bf16, channels-last, EMA on the device", "bf16", True, "device", opt="adamw"),
    Setting("fp16 with a scaler", "fp16", opt="adamw"),
    Setting("DistributedDataParallel", "bf16", parallel=True),
]


# --- synchronisations -------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """The last update, which logs, is not made."""


class _Refuse(TorchDispatchMode):
    """On the CPU, what a GPU would have to be waited for is an error, as in CUDA's synchronisation debug mode."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.WAITS:
            raise RuntimeError(f"{function} reads numbers from the device, which waits for it")
        return function(*args, **kwargs or {})


class _Watched:
    """Batches of an epoch; from the second update on, waiting for the device is an error, until `context` ends."""

    def __init__(self, device: torch.device, steps: int, context: contextlib.ExitStack) -> None:
        pictures, labels = images(BATCH)
        if device.type == "cuda":
            pictures, labels = pictures.pin_memory(), labels.pin_memory()
        self.batch, self.device, self.steps, self.context = (pictures, labels), device, steps, context
        self.dataset = TensorDataset(pictures, labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # the first update may compile, tune and allocate
        yield self.batch
        self.context.enter_context(_refused(self.device))
        for _ in range(self.steps - 2):
            yield self.batch
        raise _Enough


@contextlib.contextmanager
def _refused(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        with _Refuse():
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_synchronisations(report: Report) -> None:
    """Steps of every method, and of a few in other settings."""
    with untuned():
        for setting in STEPS:
            for name in METHODS if setting is STEPS[0] and not report.dry else ("kw",):
                report.check(f"synchronisation in a step, {name}, {setting.name}", _steps, name, setting, report.device)


def _steps(name: str, setting: Setting, device: str) -> None:
    """Updates in which nothing waits for the device.

    Raises:
        RuntimeError: something does.
    """
    device = device_of(device)
    torch.manual_seed(0)
    model = build_model(METHODS[name], num_classes=CLASSES).to(device)
    # a CPU is looked at in every update; here it stands for a GPU
    with (
        mock.patch.object(engine, "waiting_is_free", lambda device: False),
        contextlib.suppress(_Enough),
        contextlib.ExitStack() as context,
    ):
        train(model, _Watched(device, 4, context), 4, setting, device)


# --- a whole run ------------------------------------------------------------------------------------------------------


def check_resumed_run(report: Report) -> None:
    """A run of main.py that goes on from a checkpoint, against the unbroken one."""
    with exact_float32(), untuned():
        equal = report.check("resume", _resume, device_of(report.device))
    if equal:
        report.note(f"a resumed run equals the unbroken one, {equal}")


def _resume(device: torch.device) -> str:
    """A run of main.py that goes on from a checkpoint equals the unbroken one, random numbers of the device included.

    Returns:
        How equal they are.

    Raises:
        Mismatch: they differ by more than two unbroken runs do.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write_images(root / "data")
        own = {**METHODS["kw"], "drop_path": 0.1, "dropout": 0.1}
        own |= {"data_path": root / "data", "device": device.type, "epochs": 2, "input_size": 32, "batch_size": 8}
        own |= {"use_amp": True, "channels_last": True, "model_ema": True, "warmup_epochs": 0, "num_workers": 0}
        own |= {"lr": 0.001, "seed": 1, "pin_mem": device.type == "cuda"}
        for name, more in {"one": {}, "other": {}, "resumed": {"resume": root / "one/checkpoint-0.pth"}}.items():
            words = [f"--{key}={str(value).lower() if value is True or value is False else value}"
                     for key, value in {**own, **more, "output_dir": root / name}.items()]  # fmt: skip
            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                code = program.main(words)
            if code != 0:
                raise Mismatch(f"main.py ended with {code}: {told.getvalue().strip()[-200:]}")
        one, other, resumed = (
            torch.load(root / name / "checkpoint-1.pth", map_location="cpu", weights_only=True)
            for name in ("one", "other", "resumed")
        )
    unequal = _unequal(one["rng"], resumed["rng"])
    if unequal:
        raise Mismatch(f"the random generators differ after a resume: {unequal}")
    distance, noise = _distance(one["model"], resumed["model"]), _distance(one["model"], other["model"])
    if distance > 3 * noise:
        raise Mismatch(f"weights differ by {distance:.1e} after a resume, and by {noise:.1e} without one")
    return "bit for bit" if distance == 0 else f"to {distance:.0e}; two unbroken runs to {noise:.0e}"


def _write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 4)):
        for label in range(2):
            (folder / part / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (40, 40, 3), dtype=np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(folder / part / f"class{label}" / f"{index}.png")


def _unequal(a: Any, b: Any, name: str = "rng") -> str:
    """The name of the first part in which two states differ; empty: they are equal."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next(filter(None, (_unequal(a[key], b[key], f"{name}.{key}") for key in a)), "")
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return next(filter(None, (_unequal(x, y, f"{name}.{i}") for i, (x, y) in enumerate(zip(a, b)))), "")
    same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(np.all(a == b))
    return "" if same else name


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference of all weights, relative to the weights."""
    first, second = (torch.cat([value.double().flatten() for value in state.values()]) for state in (a, b))
    return float((first - second).norm() / first.norm())
