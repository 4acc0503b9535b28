"""What a run survives: kills at any moment and system call, lost loader processes, signals, a closed terminal.

The names F1 to F30 are those of the catalogue in results/faults.md, whose numbers these tests print.
"""

import argparse
import collections
import ctypes
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults import measured
from helpers import ROOT, finish, quick, read_log, started
from launched import ENVIRONMENT, RUN, children, position, wait_for
from processes import in_processes
from torch.utils.data import DataLoader, TensorDataset

from checkpoints import RunFolder, newest_checkpoint, read, remove_stale_files
from command_line import make_parser, merged_options, parse_words
from engine import evaluate
from loading.sampling import EvalSampler
from utils import make_folder


def saver(folder, pipe):
    """Saves 5 MB for ever, and tells which saves were done."""
    run = RunFolder(folder, 2)
    state = {"model": {"weight": torch.arange(1_250_000.0)}, "epoch": 0}
    for epoch in range(10_000):
        if run.save({**state, "epoch": epoch}, epoch):
            os.write(pipe, f"{epoch}\n".encode())
    os._exit(0)


@pytest.mark.parametrize("trials", [25, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_during_saves(trials, tmp_path, capsys):
    """F1"""
    torch.set_num_threads(1)
    rng, lost, stale = random.Random(0), 0, 0
    for trial in range(trials):
        folder = make_folder(str(tmp_path / str(trial)))
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            saver(folder, writer)
        os.close(writer)
        with os.fdopen(reader) as told:
            first = told.readline()
            time.sleep(rng.uniform(0, 0.3))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done = int((first + told.read()).split()[-1])
        state = read(newest_checkpoint(folder))
        assert state["model"]["weight"].shape == (1_250_000,)
        lost += state["epoch"] < done
        stale += any(path.suffix == ".tmp" for path in folder.iterdir())
        remove_stale_files(folder)
        assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
        shutil.rmtree(folder)
    measured("F1", f"0 of {trials} folders do not resume, {lost} finished saves lost; {stale} temporary files removed")
    assert lost == 0


needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
ANY_PROCESS_MAY_TRACE = 0x59616D61, ctypes.c_ulong(-1)  # PR_SET_PTRACER, PR_SET_PTRACER_ANY of linux/prctl.h


def traced_save(folder, *words, most=-1):
    """The third save of a folder, in a child: what it printed, and a line of strace for each of its system calls.

    Those of other threads, which read the file back, are left out.  most: bytes above which no file may grow in it.
    """
    torch.set_num_threads(1)
    folder.mkdir()
    run, state = RunFolder(folder, 2), {"model": {"weight": torch.arange(30000.0)}}
    for epoch in (0, 1):
        run.save({**state, "epoch": epoch}, epoch)
    printed = folder.parent / "printed.txt"
    (waits, begins), (reads, ready) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(*ANY_PROCESS_MAY_TRACE, 0, 0, 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with open(printed, "w") as sys.stdout:
            sys.stderr = sys.stdout
            os.write(ready, b".")
            os.read(waits, 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, -1))
            try:
                print("SAVED", run.save({**state, "epoch": 2}, 2, best=["acc1"]), flush=True)
            finally:
                os._exit(0)
    os.read(reads, 1)
    command = ["strace", "-f", "-y", "-p", str(pid), *words]
    with started(command, stderr=subprocess.PIPE, text=True) as strace:
        first = strace.stderr.readline()
        if "attached" not in first:
            os.kill(pid, signal.SIGKILL)
        os.write(begins, b".")
        _, traced = strace.communicate(timeout=60)
    os.waitpid(pid, 0)
    for end in (waits, begins, reads, ready):
        os.close(end)
    if "attached" not in first:
        pytest.skip(f"strace cannot trace a process here: {first.strip()}")
    lines = [re.fullmatch(r"(?:\[pid +(\d+)\] )?(.*)", line) for line in traced.splitlines()]
    return printed.read_text(), [line[2] for line in lines if line[1] in (None, str(pid))]


def calls_of(traced, folder):
    """(call, its number among those with its name, file name) of the system calls in the folder."""
    counts, calls = collections.Counter(), []
    for line in traced:
        # a call during which another thread makes one is told in two lines, of which the second has no such beginning
        if call := re.match(r"(\w+)\((.*?)(?:\) += |<unfinished|$)", line):
            counts[call[1]] += 1
            if str(folder) in call[2]:
                target = re.findall(r"[\"<]([^\">]*)[\">]", call[2])[-1]
                calls.append((call[1], counts[call[1]], Path(target).name if target != str(folder) else "."))
    return calls


@needs_strace
def test_order_of_a_save(tmp_path):
    """F3"""
    folder = tmp_path / "run"
    printed, traced = traced_save(folder, "-e", "trace=fsync,rename")
    assert "SAVED True" in printed, traced[-20:]
    calls = calls_of(traced, folder)
    orders = 0
    for index, (call, _, target) in enumerate(calls):
        if call == "rename":
            before, after = calls[index - 1], calls[index + 1]
            assert before[0] == "fsync" and before[2].startswith(f".{target}.") and after[::2] == ("fsync", ".")
            orders += 1
    # the checkpoint and the best one, each with its manifest, and the manifest again when the oldest is deleted
    assert orders == 5
    measured("F3", f"{orders} of {orders} files in this order")


@needs_strace
@pytest.mark.parametrize(
    ("name", "least"),
    [("openat", 10), ("writev", 1), ("write", 5), ("close", 10), ("fsync", 10), ("rename", 5), ("unlink", 1)],
)
def test_killed_at_every_system_call_of_a_save(name, least, tmp_path):
    """F2"""
    _, traced = traced_save(tmp_path / "whole", "-e", f"trace={name}")
    numbers = [number for _, number, _ in calls_of(traced, tmp_path / "whole")]
    assert len(numbers) >= least
    for number in numbers:
        folder = tmp_path / str(number)
        printed, _ = traced_save(folder, "-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={number}")
        assert printed == "", number
        assert read(newest_checkpoint(folder))["epoch"] in (1, 2), number
        shutil.rmtree(folder)
    measured("F2", f"{len(numbers)} of {len(numbers)} kills at {name} leave a folder that resumes")


@needs_strace
@pytest.mark.parametrize("fault", ["fsync:error=EIO:when=1", "rename:error=EROFS:when=1", "write:error=ENOSPC"])
def test_failing_system_calls_of_a_save(fault, tmp_path):
    """F5, F4"""
    folder, call = tmp_path / "run", fault.partition(":")[0]
    if call == "write":
        printed, _ = traced_save(folder, "-e", "trace=none", most=4096)
    else:
        printed, _ = traced_save(folder, "-e", f"trace={call}", "-e", f"inject={fault}")
    assert "SAVED False" in printed, printed
    assert printed.count("checkpoint-2.pth was not saved") == 1
    assert [read(folder / f"checkpoint-{epoch}.pth")["epoch"] for epoch in (0, 1)] == [0, 1]
    assert newest_checkpoint(folder).name == "checkpoint-1.pth" and not list(folder.glob(".checkpoint*"))
    measured("F5" if call != "write" else "F4", f"{fault}: told as not saved, older files intact")


@pytest.mark.parametrize(("number", "limit"), [(signal.SIGKILL, 5), (signal.SIGSTOP, 12)])
def test_loader_process_killed_or_stopped(number, limit, tmp_path):
    """F15"""
    options = {**RUN, "num_workers": 1, "timeout": 3, "epochs": 50, "output_dir": tmp_path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with started([sys.executable, ROOT / "main.py", *quick(**options)], ENVIRONMENT, **pipes) as process:
        wait_for(lambda: position(tmp_path) >= 5)
        worker = [pid for pid in children(process.pid) if b"main.py" in Path(f"/proc/{pid}/cmdline").read_bytes()][-1]
        begun = time.monotonic()
        os.kill(worker, number)
        out, _ = process.communicate(timeout=60)
        wall = time.monotonic() - begun
    assert process.returncode == 1 and "Traceback" not in out, out[-2000:]
    assert "error: loading images failed" in out and "same command continues" in out
    measured("F15", f"{number.name}: an error after {wall:.1f} s")
    assert wall < limit


def test_no_file_descriptors():
    """F16"""
    begun = time.monotonic()
    command = ["bash", "-c", 'ulimit -n 24; exec "$@"', "bash", sys.executable, ROOT / "main.py"]
    done = finish([*command, *quick(num_workers=2, epochs=1)], 60, ENVIRONMENT)
    wall = time.monotonic() - begun
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search("^error: loading images failed .*Too many open files", done.stderr, re.MULTILINE)
    measured("F16", f"24 file descriptors: an error, {wall:.0f} s after the start")


@pytest.mark.slow
def test_no_shared_memory(tmp_path):
    """F16"""
    script = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "bash", "-c", script, "bash", sys.executable, ROOT / "main.py"]
    if finish(["unshare", "-m", "true"], 10).returncode:
        pytest.skip("unshare -m is not allowed here")
    begun = time.monotonic()
    done = finish([*command, *quick(num_workers=1, epochs=1, input_size=96, batch_size=64)], 60, ENVIRONMENT)
    wall = time.monotonic() - begun
    assert done.returncode == 1 and "error: loading images failed" in done.stderr and "/dev/shm" in done.stderr
    measured("F16", f"1 MB of shared memory: an error, {wall:.0f} s after the start")


def _evaluated(rank, world):
    """The counts of an evaluation of 1, 5, 10 and 1001 images by this process and the others."""
    args = argparse.Namespace(channels_last=False, timeout=60, use_amp=False, amp_dtype="auto", dist_eval=world > 1)
    counts = []
    for size in (1, 5, 10, 1001):
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(size, 6, generator=generator), torch.arange(size) % 6)
        loader = DataLoader(data, 16, sampler=EvalSampler(size, rank, world))
        result = evaluate(torch.nn.Flatten(), loader, args=args, device=torch.device("cpu"))
        counts.append([result[name] for name in ("correct1", "correct5", "count")])
    return counts


@pytest.mark.parametrize("world", [2, 3, *(pytest.param(world, marks=pytest.mark.slow) for world in (4, 8))])
def test_evaluation_by_any_number_of_processes(world):
    """F25: images are not repeated to make the processes' parts equal."""
    (alone,) = in_processes(_evaluated, 1, grouped=False, world=1)
    assert [count for *_, count in alone] == [1, 5, 10, 1001] and 0 < alone[-1][0] < 1001
    assert in_processes(_evaluated, world, world=world) == [alone] * world
    measured("F25", f"{world} processes: equal counts for 1, 5, 10 and 1001 images")


def test_without_assertions(tmp_path):
    """F29: the weights overflow, and python -O ends the run all the same."""
    options = quick(opt="sgd", lr=1e30, min_lr=1e30, output_dir=tmp_path)
    done = finish([sys.executable, "-O", ROOT / "main.py", *options], 60, ENVIRONMENT)
    assert done.returncode == 1 and "not finite" in done.stderr and not list(tmp_path.glob("checkpoint*"))
    measured("F29", "weights that are not finite end the run")


def test_ctrl_c_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "main.py", *quick(**RUN, num_workers=1, output_dir=tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with started(command, ENVIRONMENT, **pipes) as process:
        wait_for(lambda: position(tmp_path) >= 5)
        # as a terminal does, to the processes that load images, too
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert re.fullmatch(r"stopped by SIGINT: saved \S+; the same command continues there\n", err)


def test_an_error_that_nobody_foresaw_ends_the_loader_processes(tmp_path):
    """They ignore the SIGTERM that Python sends them when it ends, while the traceback still holds their loader."""
    program = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import main, engine
def fails(*args, **kwargs): raise RuntimeError("unforeseen")
engine.evaluate = fails
main.main(sys.argv[1:])
"""
    done = finish([sys.executable, "-c", program, *quick(epochs=1, num_workers=1)], 60, ENVIRONMENT)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: unforeseen\n")


def test_a_terminal_that_is_closed(tmp_path):
    """Text that cannot be written ends nothing; the signal that comes with it saves."""
    options = quick(**{**RUN, "save_interval": 0}, num_workers=1, output_dir=tmp_path)
    reader, gone = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        streams = {"stdout": full, "stderr": gone, "start_new_session": True}
        with started([sys.executable, ROOT / "main.py", *options], ENVIRONMENT, **streams) as process:
            wait_for(lambda: (tmp_path / "steps.jsonl").exists() and (tmp_path / "steps.jsonl").read_text())
            os.killpg(process.pid, signal.SIGHUP)
            assert process.wait(60) == 143
        assert [path.name for path in tmp_path.glob("*.pth")] != []
        with started([sys.executable, ROOT / "main.py", *options], ENVIRONMENT, **streams) as process:
            assert process.wait(60) == 0
    os.close(gone)
    assert [row["epoch"] for row in read_log(tmp_path)] == [0, 1]


@pytest.mark.alone
def test_cost_of_a_save(tmp_path):
    """A save that is read back, hashed, flushed and listed holds the run up at most 1.5 times as long as a bare one."""
    state = {"model": {str(index): torch.randn(1_000_000) for index in range(25)}, "epoch": 0}
    folder, times = RunFolder(make_folder(str(tmp_path / "run")), 2), {"bare": [], "ours": [], "whole": []}
    # what else the machine does only adds to a time, so that the least counts; more saves where it does much
    for epoch in range(30):
        if epoch >= 7 and min(times["ours"]) < 1.5 * min(times["bare"]):
            break
        begun = time.perf_counter()
        torch.save(state, tmp_path / f"bare-{epoch}.pth")
        times["bare"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        assert folder.save({**state, "epoch": epoch}, epoch, wait=False)
        times["ours"].append(time.perf_counter() - begun)
        folder.wait()
        times["whole"].append(time.perf_counter() - begun)
        (tmp_path / f"bare-{epoch}.pth").unlink()
    bare, ours, whole = map(min, times.values())
    (options, _) = merged_options(parse_words(make_parser(), []))
    default = 60 * int(options.save_interval.removesuffix("m"))
    measured(
        "cost",
        f"holds the run up {ours / bare:.2f} times a bare torch.save ({bare * 1000:.0f} ms) and is whole after "
        f"{whole / bare:.2f} times; takes {100 * ours / default:.3f} % of the {default} s between two saves",
    )
    assert ours < 1.5 * bare and ours < 0.01 * default
