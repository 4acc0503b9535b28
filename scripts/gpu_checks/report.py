"""The outcome of the checks: what passed, what failed, and for what there was no time."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


class Mismatch(Exception):
    """Two results differ by more than rounding. The message tells by how much."""


class LostDevice(Exception):
    """The GPU cannot be used any more in this process. The message tells what ran before."""


@dataclass
class Report:
    """Runs checks until a time, and remembers their outcome.

    Attributes:
        device: "cuda" or "cpu".
        minutes: of the whole command.
        dry: whether only the code is tried, with the smallest cases.
        passed: number of checks that passed.
        failures: lines about those that failed.
        left: names of those for which there was no time.
        lines: text about what was checked, for the written report.
    """

    device: str
    minutes: float
    dry: bool = False
    passed: int = 0
    failures: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    deadline: float = 0.0

    def begin(self, title: str, until: float) -> None:
        """Begin a section, which ends at a share of the whole time."""
        self.deadline = self.started + 60 * self.minutes * until
        print(f"\n{title} ({self.elapsed():.0f} s)", flush=True)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def time_left(self) -> float:
        """Seconds until the section has to end."""
        return self.deadline - time.monotonic()

    def note(self, line: str) -> None:
        """Print a line, and keep it for the written report."""
        print(f"  {line}", flush=True)
        self.lines.append(line)

    def fail(self, name: str, reason: str) -> None:
        """Print and keep a failure."""
        self.failures.append(f"{name}: {reason}")
        print(f"  FAILED {self.failures[-1]}", flush=True)

    def check(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that raises an exception where something is wrong; returns its result, or None.

        Raises:
            LostDevice: nothing can run on the GPU any more.
        """
        if self.time_left() <= 0:
            self.left.append(name)
            return None
        before = len(self.failures)
        result = self.attempt(name, function, *arguments)
        self.passed += len(self.failures) == before
        return result

    def attempt(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """As `check`, for what counts only where it fails, whatever the time."""
        try:
            result = function(*arguments)
            if self.device == "cuda":
                # an error of a kernel shows here at the latest
                torch.cuda.synchronize()
            return result
        except Exception as error:
            text = " ".join(str(error).split()) or "no message"
            self.fail(name, text[:300] if isinstance(error, Mismatch) else f"{type(error).__name__}: {text[:300]}")
            self._require_device(name)
            return None

    def _require_device(self, name: str) -> None:
        if self.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            raise LostDevice(
                f"{name} left the GPU unusable for this process, so nothing after it ran; --skip BACKEND goes on "
                "without a backend"
            ) from None

    @property
    def ok(self) -> bool:
        """Whether all checks were made, and passed."""
        return not self.failures and not self.left

    def summary(self) -> str:
        """One line about all checks."""
        text = f"{self.passed} checks passed, {len(self.failures)} failed"
        if self.left:
            text += f", {len(self.left)} were not made for lack of time: give more --minutes"
        return text
