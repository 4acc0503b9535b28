"""A training that saves all the time: mmengine's loop and this project's hook, on a model of one layer.

    python tests/detector_saver.py WORK KEEP EPOCHS            train, or go on, until that epoch
    python tests/detector_saver.py WORK KEEP EPOCHS TRIALS     the same in a child that is killed while it saves
    python tests/detector_saver.py WORK KEEP EPOCHS CALL       killed when it enters a function of `CALLS`

The second is done TRIALS times, and then the training ends with one epoch more. The last is done for the first call of
the function, the second, and so on, in a folder each, until a training makes no such call; after each it goes on to
its end. After every training it prints a JSON line: the names of the checkpoints, of those that cannot be read, and of
the temporary files.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import mmdet.visualization  # noqa: F401 -- once, and not in every child, which takes more than a second
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner

from checkpoints import read
from detection.hooks import newest_detector
from models.config import ConfigError

torch.set_num_threads(1)
# functions of os, by the system call that they make
CALLS = {"fsync": ("fsync",), "rename": ("rename", "replace"), "unlink": ("unlink", "remove")}


class Tiny(BaseModel):
    """About half a megabyte of weights."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(400, 300)

    def forward(self, inputs, mode="loss"):
        return {"loss": self.layer(inputs).square().mean()}


def train(work, keep, epochs):
    path = newest_detector(work)
    data = torch.utils.data.DataLoader([{"inputs": torch.ones(400)}] * 2, batch_size=2)
    hooks = {"checkpoint": {"type": "SafeCheckpointHook", "interval": 1, "max_keep_ckpts": keep}}
    runner = Runner(
        Tiny(), str(work), train_dataloader=data, train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}}, default_hooks=hooks,
        load_from=None if path is None else str(path), resume=path is not None, default_scope="mmdet",
        log_level="ERROR", experiment_name=f"run{time.time_ns()}",
    )  # fmt: skip
    runner.train()


def found(work):
    paths, bad = sorted(Path(work).glob("*.pth")), []
    for path in paths:
        try:
            read(path)
        except ConfigError:
            bad.append(path.name)
    left = [path.name for path in Path(work).glob(".*.tmp")]
    return {"checkpoints": [path.name for path in paths], "bad": bad, "temporary": left}


def newest(work):
    """The time of the last checkpoint; 0 where there is none."""
    times = [0]
    for path in Path(work).glob("*.pth"):
        # another process may remove it at any moment
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime_ns)
    return max(times)


def kill_at(call, number):
    """Kill this process when it makes a system call for the given time."""
    calls = 0

    def counted(function):
        def instead(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return instead

    for name in CALLS[call]:
        setattr(os, name, counted(getattr(os, name)))


def in_child(work, keep, epochs, call=None, number=0):
    """Train in a child, which is killed at a call; returns its process number."""
    pid = os.fork()
    if pid == 0:
        if call is not None:
            kill_at(call, number)
        train(work, keep, epochs)
        os._exit(0)
    return pid


def killed(work, keep, epochs):
    """Train in a child, and kill it soon after its first checkpoint; returns whether it was killed."""
    before = newest(work)
    pid = in_child(work, keep, epochs)
    deadline = time.monotonic() + 60
    while newest(work) == before and time.monotonic() < deadline:
        time.sleep(0.001)
    # a save takes some tens of milliseconds
    time.sleep(random.uniform(0, 0.2))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def ended(work, pid):
    """Whether a child was killed, and what it left."""
    _, status = os.waitpid(pid, 0)
    return {"killed": os.WIFSIGNALED(status), "code": os.waitstatus_to_exitcode(status), **found(work)}


def at_every_call(work, keep, epochs, call):
    for number in itertools.count(1):
        folder = work / str(number)
        first = ended(folder, in_child(folder, keep, epochs, call, number))
        print(json.dumps(first), flush=True)
        if not first["killed"]:
            break
        print(json.dumps(ended(folder, in_child(folder, keep, epochs))), flush=True)


def main():
    work, keep, epochs, *trials = sys.argv[1:]
    if not trials:
        train(work, int(keep), int(epochs))
        return
    if trials[0] in CALLS:
        at_every_call(Path(work), int(keep), int(epochs), trials[0])
        return
    random.seed(0)
    for _ in range(int(trials[0])):
        was_killed = killed(work, int(keep), int(epochs))
        print(json.dumps({"killed": was_killed, **found(work)}), flush=True)
    last = int(newest_detector(work).stem.removeprefix("epoch_"))
    train(work, int(keep), last + 1)
    print(json.dumps({"last": last + 1, **found(work)}), flush=True)


if __name__ == "__main__":
    main()
