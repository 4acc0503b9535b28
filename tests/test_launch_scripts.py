"""Jobs of SLURM, which stand-ins for srun and scontrol play on this machine."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import run_with_submitit
from helpers import ROOT, quick, started
from launched import ENVIRONMENT, RUN, position, wait_for

from checkpoints import read

# two tasks on this machine, which get the signals that srun gets; the largest exit code is srun's
SRUN = """#!/usr/bin/env {python}
import os, signal, subprocess, sys
words = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
own = {{"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_STEP_ID": "0", "SLURM_NODELIST": "localhost"}}
own |= {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}}
tasks = []
signal.signal(signal.SIGTERM, lambda number, frame: [task.send_signal(number) for task in tasks])
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
for rank in range(2):
    told = own | {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}}
    tasks.append(subprocess.Popen(words, env=os.environ | told))
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def slurm(tmp_path):
    """The variables of a job in which srun and scontrol are stand-ins; scontrol writes what it is told to a file."""
    from helpers import free_port

    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(SRUN.format(python="python3", port=free_port()))
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    path = f"{folder}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return ENVIRONMENT | {"PATH": path, "SLURM_JOB_ID": "5", "SLURM_SUBMIT_DIR": str(ROOT)}


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, marks=pytest.mark.slow, id="SIGTERM"), pytest.param(signal.SIGUSR1, id="SIGUSR1")],
)
def test_a_slurm_job_is_pre_empted_and_goes_on(number, slurm, tmp_path):
    output, requeued = tmp_path / "out", tmp_path / "scontrol.txt"
    options = {**RUN, "epochs": 30, "save_interval": 0, "output_dir": output}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with started(["bash", ROOT / "scripts/launch_slurm.sh", *quick(**options)], slurm, cwd=tmp_path, **pipes) as job:
        wait_for(lambda: (output / "steps.jsonl").exists() and (output / "steps.jsonl").stat().st_size)
        if number == signal.SIGTERM:
            job.send_signal(number)
        else:
            # of --signal: to the processes of the step, not to the script
            found = ["pgrep", "-P", str(job.pid), "-f", "srun"]
            srun = subprocess.run(found, capture_output=True, text=True).stdout.split()
            os.kill(int(srun[0]), number)
        out, _ = job.communicate(timeout=60)
    assert job.returncode == 143, out
    (saved,) = re.findall(rf"^stopped by {number.name}: saved (\S+);", out, re.MULTILINE)
    assert len(read(saved)["rng"]) == 2 and requeued.read_text() == "requeue 5\n"
    options |= {"epochs": read(saved)["epoch"] + 1}
    command = ["bash", ROOT / "scripts/launch_slurm.sh", *quick(**options)]
    with started(command, slurm, cwd=tmp_path, **pipes) as job:
        out, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and f"resuming from {saved}" in out, out
    assert requeued.read_text() == "requeue 5\n"


def test_a_slurm_script_away_from_the_project(slurm, tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "scripts/launch_slurm.sh"], env=os.environ | slurm | {"SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and re.fullmatch(r"error: no main.py in .*\n", done.stderr)


def test_submitit_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run_with_submitit.main(["--output_dir", str(tmp_path / "out"), "--kw_config", "x"]) == 2
    assert re.fullmatch(r"error: submitit is not installed: .*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")
def test_a_job_of_submitit(tmp_path):
    """submitit's executor for this machine takes the place of SLURM."""
    options = quick(**RUN, output_dir=tmp_path)
    where = options.index("--output_dir")
    words = ["--output_dir", options[where + 1], *options[:where], *options[where + 2 :]]
    command = [sys.executable, ROOT / "scripts/run_with_submitit.py", "--cluster", "local", "--gpus", "1", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0 and re.match(r"job \S+; its logs are in ", done.stdout), done.stderr
    wait_for(lambda: position(tmp_path) == 1000 and (tmp_path / "checkpoint-1.pth").exists())
    deadline = time.monotonic() + 30
    while not list((tmp_path / "slurm").glob("*_result.pkl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (tmp_path / "curves.png").exists()


def test_a_job_that_is_to_stop_saves_first(tmp_path):
    """What submitit calls in the first task when the time is up."""
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    import threading

    options = quick(**{**RUN, "epochs": 30, "save_interval": 0, "output_dir": tmp_path})
    training = run_with_submitit.Training(options)
    task = threading.Thread(target=training)
    task.start()
    wait_for(lambda: (tmp_path / "steps.jsonl").exists() and (tmp_path / "steps.jsonl").stat().st_size)
    again = training.checkpoint()
    task.join(30)
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.function.words == options
    assert list(tmp_path.glob("checkpoint-*-*.pth"))
