"""The progress of an epoch or of an evaluation: one changing line on a terminal, plain lines elsewhere."""

import sys
import time

import torch

import terminal
from utils import is_main_process, peak_memory

# seconds between two drawings of the line
PAUSE = 0.1
# characters of the bar
SHORTEST, LONGEST = 5, 30


class Progress:
    """Prints how far an epoch or an evaluation is; on the first process only.

    Args:
        title: what is running.
        total: number of steps.
        images: images per step over all processes, for the speed.
        device: device whose greatest memory is shown.
        begin: steps that an earlier run has done.
        epochs_left: epochs that come after this one; None: this is no epoch of a run.
        between: seconds from the end of an epoch to the begin of the next, as it took last time.
    """

    def __init__(
        self,
        title: str,
        total: int,
        images: int,
        device: torch.device,
        begin: int = 0,
        epochs_left: int | None = None,
        between: float = 0.0,
    ) -> None:
        self.title, self.total, self.images, self.device, self.begin = title, total, images, device, begin
        self.epochs_left, self.between = epochs_left, between
        self.metrics: dict[str, float] = {}
        self._start, self._drawn = time.perf_counter(), float("-inf")
        self._main = is_main_process()
        if begin < total:
            self.update(begin)

    def update(self, done: int, metrics: dict[str, float] | None = None, lasting: bool = False) -> None:
        """Show that `done` steps are complete.

        Args:
            done: number of steps.
            metrics: name -> value, the most important first; None: those of the last call that had some.
            lasting: where there is no terminal, print a line; the other calls print none there.
        """
        if not self._main:
            return
        self.metrics = self.metrics if metrics is None else metrics
        if not terminal.is_terminal(sys.stdout):
            if lasting:
                print("  ".join([f"{self.title} {done}/{self.total}", *self._parts(done)]), flush=True)
            return
        now = time.perf_counter()
        if now - self._drawn >= PAUSE or done == self.total:
            self._drawn = now
            terminal.draw(fitted(self.title, done, self.total, self._parts(done), terminal.room()))

    def close(self, keep: bool) -> None:
        """Leave the line on the terminal, or take it away."""
        if self._main:
            (terminal.keep if keep else terminal.erase)()

    def _parts(self, done: int) -> list[str]:
        """What to tell beside the bar, the most important first."""
        metrics = [f"{name} {value:.4g}" for name, value in self.metrics.items()]
        elapsed, ours = time.perf_counter() - self._start, done - self.begin
        if not ours:
            return metrics
        step = elapsed / ours
        left = step * (self.total - done)
        speed = f"{self.images / step:.0f} images/s"
        if self.epochs_left is None:
            return [*metrics, f"left {_clock(left)}", speed, self._memory()]
        run = left + self.between + self.epochs_left * (step * self.total + self.between)
        times = f"left {_clock(run)}", f"left of epoch {_clock(left)}"
        return [*metrics[:1], times[0], speed, *metrics[1:2], self._memory(), times[1], *metrics[2:]]

    def _memory(self) -> str:
        return f"memory {peak_memory(self.device) / 2**20:.0f} MiB"


def fitted(title: str, done: int, total: int, parts: list[str], room: int) -> str:
    """A line with a bar, of at most `room` characters: as many of the parts as fit, from the first on."""
    head, count = f"{title} ", f"{done}/{total}"
    text = ""
    for part in parts:
        if len(head) + SHORTEST + len(f"[] {count}{text}  {part}") > room:
            break
        text += f"  {part}"
    length = min(LONGEST, room - len(f"{head}[] {count}{text}"))
    if length < SHORTEST:
        # no room for a bar
        return (head + count)[:room]
    filled = length * min(done, total) // max(total, 1)
    return f"{head}[{'#' * filled}{'-' * (length - filled)}] {count}{text}"


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
