"""Runs of main.py in processes, by a launcher and without, for tests that hit some of them."""

import contextlib
import re
import subprocess
import time
from pathlib import Path

from helpers import ROOT, free_port, quick, started

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
# a run of seconds, which saves every few updates
RUN = {"epochs": 2, "batch_size": 32, "drop_path": 0.1, "mixup": 0.5, "save_interval": 5, "log_interval": 5}


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "out of time"
        time.sleep(0.02)


def position(folder):
    """Updates of the newest checkpoint of the first epoch, by its name; 1000 after the epoch."""
    names = [path.stem.split("-")[1:] for path in Path(folder).glob("checkpoint-[0-9]*.pth")]
    return max((1000 if len(name) == 1 or name[0] != "0" else int(name[1]) for name in names), default=0)


def children(pid):
    """Processes that a process has started, and those that these have."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *children(child)]
    return found


def ranks(pid):
    """Processes of main.py below a launcher, in order of their start; without those that load images."""
    own = []
    for child in sorted(children(pid)):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            parent = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{child}/status").read_text())[1])
            if any(word.endswith(b"main.py") for word in words) and parent == pid:
                own.append(child)
    return own


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


def launcher(processes, options, **environment):
    """scripts/launch.sh, with the launcher's process in the place of the script's."""
    own = {"PROCESSES": processes, "INTERVAL": "0.1", "HEAD": f"127.0.0.1:{free_port()}", **environment}
    command = ["bash", ROOT / "scripts/launch.sh", *quick(**options)]
    text = {name: str(value) for name, value in own.items()}
    return started(command, ENVIRONMENT | text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
