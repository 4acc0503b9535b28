"""Ends a wait that nothing else would end."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self


class TookTooLong(Exception):
    """What was watched is not done in time."""


class Watchdog:
    """A context that raises `TookTooLong` in the main thread where it lasts longer than allowed; it is used many times.

    torch's loader has a time-out of its own, which does not cover all of its waits: for the tensors of a process that
    was stopped it waits for ever. In other threads than the main one, which alone takes signals, nothing is watched.

    Args:
        seconds: allowed for each use.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began: float | None = None
        self._ended = threading.Event()
        self._before: signal.Handlers | None = None
        self._watches = threading.current_thread() is threading.main_thread()
        if self._watches:
            self._before = signal.signal(signal.SIGUSR2, self._raise)
            threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True).start()

    def close(self) -> None:
        """Watch no more."""
        self._ended.set()
        if self._watches:
            signal.signal(signal.SIGUSR2, self._before)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._began = None

    def _watch(self, main: int) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            began = self._began
            if began is not None and time.monotonic() - began > self.seconds:
                signal.pthread_kill(main, signal.SIGUSR2)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        # the wait may have ended since
        if self._began is not None:
            self._began = None
            raise TookTooLong(f"nothing came for {self.seconds:g} s")
