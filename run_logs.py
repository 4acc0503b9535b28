"""The logs of a run: JSON lines, which are its record, and TensorBoard, Weights & Biases and curves beside them."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_log import picture
from models.config import ConfigError
from utils import is_main_process, peak_memory, replace_file

# seconds between two writes of TensorBoard's file
FLUSH = 30
# of a histogram
BINS = 64


class JsonLines:
    """A file of JSON lines that holds each row once, whole, whatever interrupts a run.

    Rows that could not be written, on a full disk, are written with a later one.

    Args:
        path: the file.
        keeps: which rows of an earlier attempt are kept; the others, and torn lines, are dropped.
        durable: wait after every row until it is on the disk.
    """

    def __init__(self, path: Path, keeps: Callable[[dict[str, Any]], bool], durable: bool) -> None:
        self.path, self.durable = path, durable
        self._unwritten: list[str] = []
        self._warned = False
        if path.is_file():
            self._drop(keeps)

    def _drop(self, keeps: Callable[[dict[str, Any]], bool]) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and (row := _row(line)) is not None and keeps(row)]
        if kept == lines:
            return
        try:
            # a full disk, too, has room for a new name and for a shorter file
            if not kept:
                # a new log begins
                self.path.rename(self.path.with_stem(f"{self.path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"))
            elif kept == lines[: len(kept)]:
                os.truncate(self.path, sum(map(len, kept)))
            else:
                replace_file(self.path, lambda file: file.writelines(kept))
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror}; make room") from None

    def add(self, row: dict[str, Any]) -> None:
        """Append a row. A failure prints a warning, once, and the row waits for the next one."""
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            with open(self.path, "ab") as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    file.write("".join(self._unwritten).encode())
                    file.flush()
                    if self.durable:
                        os.fsync(file.fileno())
                except OSError:
                    # no half of a row stays
                    with contextlib.suppress(OSError):
                        os.truncate(self.path, size)
                    raise
        except OSError as error:
            if not self._warned:
                print(f"warning: {self.path} was not written ({error.strerror})", file=sys.stderr, flush=True)
            self._warned = True
            return
        self._unwritten, self._warned = [], False


def _row(line: bytes) -> dict[str, Any] | None:
    """A row of JSON; None for a torn one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


class TensorBoard:
    """A log for TensorBoard, written by this process itself; the first failure turns it off with a warning.

    tensorboardX's `SummaryWriter` writes in a thread of its own, and waits for ever where its disk is full.

    Args:
        folder: where the file is made.
        step: steps from here on, which an earlier attempt may have written, are hidden.

    Raises:
        ConfigError: tensorboardX is not installed.
    """

    def __init__(self, folder: str, step: int) -> None:
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        except ImportError:
            raise ConfigError("--log_dir needs tensorboardX: pip install tensorboardX, or leave it out") from None
        self._event, self._summary, self._writer, self._folder = Event, summary, None, folder
        self._flushed = time.monotonic()

        def begin() -> None:
            os.makedirs(folder, exist_ok=True)
            # the file's name has its second, in which another run may have started
            self._writer = EventsWriter(os.path.join(folder, "events"), f".{os.getpid()}.{time.monotonic_ns()}")
            session = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=step, wall_time=time.time(), session_log=session))
            self._writer.flush()

        self._try(begin)

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics; `step` is the number of updates so far."""
        self._add(step, lambda: [self._summary.scalar(name, value) for name, value in metrics.items()])

    def add_text(self, step: int, name: str, lines: list[str]) -> None:
        """Write lines as they are."""
        # Markdown shows indented lines so
        self._add(step, lambda: [self._summary.text(name, "\n".join(f"    {line}" for line in lines))])

    def add_attentions(self, step: int, alphas: dict[str, Tensor]) -> None:
        """Write histograms of attentions (of `attention_log.Attentions`); with matplotlib, a picture of them, too."""
        alphas = {name: alpha for name, alpha in alphas.items() if alpha.isfinite().all()}

        def summaries() -> list[Any]:
            made = [
                self._summary.histogram(f"alpha/{name}", alpha.flatten().numpy(), BINS)
                for name, alpha in alphas.items()
            ]
            with contextlib.suppress(ImportError):
                made.append(self._summary.image("attentions", picture(alphas).numpy(), dataformats="HWC"))
            return made

        if alphas:
            self._add(step, summaries)

    def _add(self, step: int, summaries: Callable[[], list[Any]]) -> None:
        def write() -> None:
            for summary in summaries():
                self._writer.write_event(self._event(step=step, wall_time=time.time(), summary=summary))
            if time.monotonic() - self._flushed > FLUSH:
                self._writer.flush()
                self._flushed = time.monotonic()

        if self._writer is not None:
            self._try(write)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._try(self._writer.close)
            self._writer = None

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            print(
                f"warning: TensorBoard's log in {self._folder} ends here ({error.strerror}); the run goes on",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            writer, self._writer = self._writer, None
            if writer is not None:
                # what could not be written stays in the file's buffer, and closing tries once more
                with contextlib.suppress(OSError):
                    writer.close()


class RunLog:
    """Metrics of a run, on the first process.

    `log.txt` has a JSON line per epoch, `steps.jsonl` one per logged step. They hold no times, so that equal runs write
    equal files. `times.jsonl` has the times of the logged steps, and the greatest memory so far.

    Args:
        args: options `output_dir`, `log_dir`, `enable_wandb`, `project`, `wandb_ckpt`.
        start_epoch: first epoch of this run; lines that an earlier attempt wrote for it and later epochs are dropped.
        start_step: updates that are done; lines of an earlier attempt beyond them are dropped.

    Raises:
        ConfigError: the options name a logger that is not installed; the disk is full.
    """

    def __init__(self, args: argparse.Namespace, start_epoch: int, start_step: int) -> None:
        self.epochs = self.steps = self.times = self.tensorboard = self.wandb = None
        # step and time of the log before, images per step, and the device
        self._pace: tuple[int, float, int, torch.device] | None = None
        self.upload = args.wandb_ckpt
        if not is_main_process():
            return
        if args.output_dir:
            folder = Path(args.output_dir)
            self.epochs = JsonLines(
                folder / "log.txt", lambda row: _number(row, "epoch") in range(start_epoch), durable=True
            )
            self.steps = JsonLines(
                folder / "steps.jsonl", lambda row: _number(row, "step") in range(start_step + 1), durable=False
            )
            self.times = JsonLines(
                folder / "times.jsonl", lambda row: _number(row, "step") in range(start_step + 1), durable=False
            )
        if args.log_dir:
            self.tensorboard = TensorBoard(args.log_dir, start_step + 1)
            options = [f"{name}: {json.dumps(value)}" for name, value in vars(args).items() if name != "given"]
            self.tensorboard.add_text(start_step + 1, "options", options)
        if args.enable_wandb:
            try:
                import wandb
            except ImportError:
                raise ConfigError("--enable_wandb needs wandb: pip install wandb, or leave it out") from None
            self.wandb = wandb.init(project=args.project, config=vars(args))

    def begin(self, step: int, images: int, device: torch.device) -> None:
        """Begin an epoch, or the rest of one, whose speed is measured from here on.

        Args:
            step: number of updates so far.
            images: per update, of all processes.
            device: whose memory is measured.
        """
        self._pace = (step, time.perf_counter(), images, device)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Log metrics during an epoch; `step` is the number of updates so far."""
        if self.times is not None and self._pace is not None:
            before, since, images, device = self._pace
            now = time.perf_counter()
            speed = (step - before) * images / max(now - since, 1e-9)
            row = {"seconds": round(now - since, 4), "images_per_second": round(speed, 2)}
            self.times.add({"step": step, **row, "memory_mib": round(peak_memory(device) / 2**20, 1)})
            self._pace = (step, now, images, device)
        if self.steps is not None:
            self.steps.add({"step": step, **{name.removeprefix("train/"): value for name, value in metrics.items()}})
        self._show(step, metrics)

    def epoch(self, step: int, metrics: dict[str, float | None]) -> None:
        """Log metrics of a whole epoch; `step` is the number of updates so far."""
        if self.epochs is not None:
            self.epochs.add(metrics)
        self._show(step, {f"epoch/{name}": value for name, value in metrics.items() if value is not None})

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        if self.tensorboard is not None:
            self.tensorboard.add(step, metrics)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    @property
    def shows_attentions(self) -> bool:
        """Whether `attentions` does something."""
        return self.tensorboard is not None

    def attentions(self, step: int, alphas: dict[str, Tensor]) -> None:
        """Log the attentions that `attention_log.Attentions` kept; `step` is the number of updates so far."""
        if self.tensorboard is not None:
            self.tensorboard.add_attentions(step, alphas)

    def checkpoint(self, path: Path) -> None:
        """Upload a checkpoint to Weights & Biases, where `wandb_ckpt` is set."""
        if self.wandb is not None and self.upload:
            self.wandb.save(str(path))

    def close(self) -> None:
        """Finish the logs of TensorBoard and Weights & Biases."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _number(row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    return value if type(value) is int else -1


def plot_curves(log_path: Path, image_path: Path) -> None:
    """Draw the losses and accuracies of a `log.txt` as a PNG. Lines that are torn are left out.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the image cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = (_row(line) for line in log_path.read_bytes().splitlines())
    rows = [row for row in found if row is not None and _number(row, "epoch") >= 0]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"loss": ("train_loss", "test_loss"), "top-1 accuracy (%)": ("train_acc1", "test_acc1", "test_acc1_ema")}
    for axes, (label, names) in zip(figure.subplots(1, len(panels)), panels.items()):
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
            if points:
                axes.plot(*zip(*points), label=name, marker="." if len(points) < 50 else None)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    replace_file(image_path, lambda file: figure.savefig(file, format="png", dpi=120))
