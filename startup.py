"""Settings of the process that are made first, some of them because they must come before torch is loaded."""

import contextlib
import ctypes
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import terminal

# of prctl(2), which is Linux's
_PR_SET_PDEATHSIG = 1


def before_torch() -> None:
    """Let OpenMP's threads wait briefly, and keep torch's profiler quiet.

    By default OpenMP's threads spin for milliseconds while they wait. This starves other threads wherever there are
    more threads than free cores, for example beside loader processes: measured up to 100 times slower on 2 busy cores.
    Without any spinning, every small operation waits for a thread to wake up: MobileNetV2 at batch 1 takes twice as
    long. Here they spin for about 20 microseconds and then sleep.

    Environment variables that the user has set are kept.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["GOMP_SPINCOUNT"] = "10000"
    # otherwise the profiler prints a line at every start and stop
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def end_with_launcher() -> None:
    """End this process when torchrun, which started it, dies: it would train on, and nobody would know.

    Processes that nobody restarts would also keep the next run out of the output folder.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    launcher = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        # it died before the request
        os.kill(os.getpid(), signal.SIGKILL)


def continue_stopped() -> None:
    """Let the stopped processes that torchrun started beside this one go on, so that they can end.

    A stopped process does not see the SIGTERM by which torchrun ends the others before it starts all of them again, and
    torchrun waits for 30 seconds before it kills. For a process that has just found that another one does not answer.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # processes end while they are looked at
        with contextlib.suppress(OSError):
            # proc(5): "PID (NAME) STATE PARENT ...", and a name may hold spaces and parentheses
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state == "T" and int(parent) == os.getppid():
                os.kill(int(stat.parent.name), signal.SIGCONT)


class _Outlived(io.FileIO):
    """Takes text that nobody can read any more, and drops it. Other text erases the changing line of the terminal."""

    def write(self, data: bytes) -> int | None:
        try:
            if self.isatty() and terminal.was_drawn():
                super().write(terminal.ERASE.encode())
            return super().write(data)
        except OSError:
            return len(data)


@contextlib.contextmanager
def outlive_output() -> Iterator[None]:
    """Within this context the process goes on when its text cannot be written, and text erases the changing line.

    A full disk below a log that a shell made, a closed terminal or a `tee` that was killed would otherwise end the run
    by an exception in `print`. The run's own logs tell of themselves, and are in other files.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_outlived, before)
    try:
        yield
    finally:
        terminal.keep()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = before


def _outlived(stream: TextIO) -> TextIO:
    try:
        file = _Outlived(stream.fileno(), "w", closefd=False)
        stream.flush()
    except (OSError, AttributeError):
        # a buffer in memory, as tests and notebooks have, or no output at all
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(file), encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering
    )
