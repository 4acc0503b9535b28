"""Signals that ask a run to stop.

SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal was closed), and SIGUSR1, which SLURM can send before a job ends.
"""

import atexit
import multiprocessing
import multiprocessing.util  # first, since what is registered last runs first when the process ends
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

# every further Ctrl-C says that the user does not want to wait
PATIENCE = 3
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Stopped(Exception):
    """A signal ended the run; the message says what was saved. `code` is the exit code: 130 for Ctrl-C, else 143."""

    def __init__(self, number: int, about: str = "nothing was saved") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: {about}")
        self.code = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


class StopSignals:
    """Takes the signals while the context lasts.

    Before training a signal raises `Stopped`. Within `deferred()` it is kept in `asked` until the run has saved.

    Attributes:
        asked: number of the signal that came; 0: none.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._deferred = False
        self._interrupts = 0
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python takes signals in its main thread only
        if threading.current_thread() is threading.main_thread():
            # nohup lets SIGHUP be ignored
            taken = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._take) for number in taken}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on keep a signal in `asked`, which the run looks at between two updates."""
        self._deferred = True

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # a process that was forked from this one, and that ends with it
            return
        self._interrupts += number == signal.SIGINT
        if self._interrupts >= PATIENCE:
            os._exit(128 + signal.SIGINT)
        first, self.asked = not self.asked, self.asked or number
        if not self._deferred and first:
            raise Stopped(number)


def leave_signals_to_parent(worker: int = 0) -> None:
    """In a loader process: a signal to the whole group must not end it before the run has saved.

    It ends when the process that started it ends, or tells it to.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_loader_processes() -> None:
    """End those of this process, also one that hangs.

    At the end of a process Python sends SIGTERM to those that are left, which they ignore, and waits for them.
    """
    left = [worker for worker in multiprocessing.active_children() if worker.daemon]
    if left:
        # torch's handler would raise an error for each
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in left:
        worker.kill()
        worker.join()
