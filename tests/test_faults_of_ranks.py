"""What a run of several processes survives: a process that is lost or stopped, signals to its launcher.

The names F1 to F30 are those of the catalogue in results/faults.md, whose numbers these tests print.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from faults import measured
from helpers import ROOT, finish, make_image_folder, quick, read_log, started
from launched import ENVIRONMENT, RUN, alive, launcher, position, ranks, wait_for
from states import difference_of

from checkpoints import read


@pytest.fixture(scope="module")
def unbroken_in_three(tmp_path_factory):
    """The folder of a run that nothing hits, and by trial the seconds from the kill to the end, or None."""
    folder, walls = tmp_path_factory.mktemp("three"), {}
    with launcher(3, {**RUN, "epochs": 1, "report": False, "output_dir": folder}) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    yield folder, walls
    finished = [wall for wall in walls.values() if wall is not None]
    text = f", equal to the unbroken run, {max(finished):.0f} s after the kill at most" if finished else ""
    measured("F17", f"{len(finished)} of {len(walls)} finish{text}")


@pytest.mark.parametrize("trial", [0, *(pytest.param(trial, marks=pytest.mark.slow) for trial in range(1, 10))])
def test_one_of_three_processes_killed(trial, unbroken_in_three, tmp_path):
    """F17"""
    (unbroken, walls), rng = unbroken_in_three, random.Random(trial)
    walls[trial] = None
    with launcher(3, {**RUN, "epochs": 1, "report": False, "output_dir": tmp_path}) as process:
        wait_for(lambda: position(tmp_path) >= 5)
        time.sleep(rng.uniform(0, 0.5))
        killed = position(tmp_path) < 1000
        if killed:
            os.kill(rng.choice(ranks(process.pid)), signal.SIGKILL)
        begun = time.monotonic()
        out, _ = process.communicate(timeout=300)
        wall = time.monotonic() - begun
    assert process.returncode == 0, out
    assert not killed or out.count("resuming from") == 1
    assert difference_of(read(tmp_path / "checkpoint-0.pth"), read(unbroken / "checkpoint-0.pth")) == []
    for name in ("log.txt", "steps.jsonl"):
        assert (tmp_path / name).read_text() == (unbroken / name).read_text()
    walls[trial] = wall


@pytest.mark.slow
def test_stopped_process(tmp_path):
    """F18: it answers to nothing; the others end after the time-out, and torchrun starts all again."""
    with launcher(2, {**RUN, "timeout": 5, "report": False, "output_dir": tmp_path}) as process:
        wait_for(lambda: position(tmp_path) >= 5)
        begun = time.monotonic()
        os.kill(ranks(process.pid)[1], signal.SIGSTOP)
        wait_for(lambda: len(read_log(tmp_path)) == 2 if (tmp_path / "log.txt").exists() else False, 150)
        out, _ = process.communicate(timeout=60)
        wall = time.monotonic() - begun
    assert process.returncode == 0 and "did not answer in time" in out, out
    measured("F18", f"finished {wall:.0f} s after the stop")


def test_stopped_siblings_go_on():
    """A process that found another one silent wakes those that its launcher started, and no others."""
    code = (
        "import os, signal, subprocess, sys, startup\n"
        "beside = [subprocess.Popen(['sleep', '60']) for _ in range(2)]\n"
        "below = subprocess.Popen(['sh', '-c', 'sleep 60 & echo $!; wait'], stdout=subprocess.PIPE, text=True)\n"
        "grandchild = int(below.stdout.readline())\n"
        "for pid in (beside[0].pid, grandchild):\n"
        "    os.kill(pid, signal.SIGSTOP)\n"
        "os.waitpid(beside[0].pid, os.WUNTRACED)\n"
        "subprocess.run([sys.executable, '-c', 'import startup; startup.continue_stopped()'])\n"
        "for pid in (beside[0].pid, beside[1].pid, grandchild):\n"
        "    print(open(f'/proc/{pid}/stat').read().split()[2])\n"
        "    os.kill(pid, signal.SIGKILL)\n"
    )
    for environment, states in (({"TORCHELASTIC_RUN_ID": "1"}, "SST"), ({}, "TST")):
        with started([sys.executable, "-c", code], environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            out, _ = process.communicate(timeout=60)
        assert out.split() == list(states)


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_to_torchrun(signals, tmp_path):
    """F21: both processes save at the same update."""
    with launcher(2, {**RUN, "epochs": 30, "save_interval": 0, "output_dir": tmp_path}) as process:
        wait_for(lambda: (tmp_path / "steps.jsonl").exists() and len((tmp_path / "steps.jsonl").read_text()) > 100)
        own = ranks(process.pid)
        begun = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        wait_for(lambda: not any(map(alive, own)), 30)
        wall = time.monotonic() - begun
        out, _ = process.communicate(timeout=60)
    saved = re.findall(r"^stopped by SIGTERM: saved (\S+);", out, re.MULTILINE)
    assert len(saved) == 1 and read(saved[0])["progress"]["update"] > 0, out
    assert len(read(saved[0])["rng"]) == 2
    measured("F21", f"saved once, by both processes, in {wall:.1f} s")
    assert wall < 10


def test_sigkill_to_torchrun(tmp_path):
    """F22: its processes end with it, and never two runs write."""
    options = {**RUN, "epochs": 30, "output_dir": tmp_path}
    with launcher(2, options) as process:
        wait_for(lambda: position(tmp_path) >= 5)
        own = ranks(process.pid)
        begun = time.monotonic()
        done = finish([sys.executable, ROOT / "main.py", *quick(**options)], 60, ENVIRONMENT)
        refused = time.monotonic() - begun
        assert done.returncode == 2 and "another run" in done.stderr
        process.kill()
        begun = time.monotonic()
        wait_for(lambda: not any(map(alive, own)), 10)
        wall = time.monotonic() - begun
    measured("F22", f"processes gone after {wall:.1f} s; a second start refused after {refused:.1f} s")
    assert wall < 5


def test_a_bad_image_in_one_of_two_processes(tmp_path):
    """Each process ends with one line."""
    folder = make_image_folder(tmp_path / "data", train=16, val=8)
    next((folder / "train").rglob("*.JPEG")).write_bytes(b"")
    options = {"data_set": "IMNET", "data_path": folder, "input_size": 32, "batch_size": 4, "epochs": 1}
    with launcher(2, options, RESTARTS=0) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "training images cannot be read" in out
    assert len(re.findall(r"^error: ", out, re.MULTILINE)) == 2, out
    assert not re.search(r"File \".*(main|engine|training)\.py\"", out), out
