"""Two machines, as two network namespaces.

They train to the weights of one process; one is lost and comes back, or for good; the link goes down.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from faults import measured
from helpers import ROOT, finish, free_port, quick, read_log, started
from launched import ENVIRONMENT, RUN, position, wait_for
from states import difference_of

from checkpoints import read

HOSTS = {"A": "10.77.0.1", "B": "10.77.0.2"}
PORT = 29471


def ip(*words, check=True):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


@pytest.fixture
def network():
    """Host -> its namespace; the two are joined by a link."""
    names = {host: f"faults{os.getpid()}{host}" for host in HOSTS}
    made = ip("netns", "add", names["A"], check=False)
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here (root with CAP_SYS_ADMIN can): {made.stderr.strip()}")
    try:
        ip("netns", "add", names["B"])
        ip("link", "add", "toA", "netns", names["A"], "type", "veth", "peer", "name", "toB", "netns", names["B"])
        for host, name in names.items():
            device = f"to{host}"
            ip("-n", name, "addr", "add", f"{HOSTS[host]}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names.values():
            for pid in ip("netns", "pids", name, check=False).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            ip("netns", "del", name, check=False)


def host(network, name, nodes, processes, options):
    """scripts/launch.sh on a host. Both have one name here, so each is told whether the meeting point is its own."""
    settings = "join_timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    environment = {
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"to{name}", "NODES": nodes, "PROCESSES": str(processes),
        "HEAD": f"{HOSTS['A']}:{PORT}", "INTERVAL": "0.2",
        "TORCHRUN": f"--rdzv-conf is_host={int(name == 'A')},{settings} --local-addr {HOSTS[name]}",
    }  # fmt: skip
    command = ["ip", "netns", "exec", network[name], "bash", ROOT / "scripts/launch.sh", *quick(**options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return started(command, ENVIRONMENT | environment, **pipes)


def lose(network, name):
    """End all processes of a host at once."""
    for pid in ip("netns", "pids", network[name]).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


# Every sum over a batch is then a sum over its images: a layer with BatchNorm would see the images of its own process
# only. Random choices in loading an image depend on the image alone, so that the augmentation can stay.
SAME = {
    "model": "dyconv_test_convnext", "opt": "momentum", "lr": 0.05, "warmup_epochs": 0, "epochs": 1,
    "input_size": 32,
}  # fmt: skip
IMAGES = 68  # of an update; 21 updates of the 1,437 digits


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The checkpoint and the log of one process."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, ROOT / "main.py", *quick(**SAME, batch_size=IMAGES, output_dir=folder)]
    done = finish(command, 120, ENVIRONMENT)
    assert done.returncode == 0 and f"{IMAGES} images an update, 21 updates" in done.stdout, done.stderr
    return read(folder / "checkpoint-0.pth"), read_log(folder)[-1]


def by_torchrun(folder):
    """Command and environment of a launcher on each host, which starts one process."""
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", HOSTS["A"], "--master-port", str(free_port())]
    options = quick(**SAME, batch_size=IMAGES // 2, timeout=60, output_dir=folder)
    for rank, name in enumerate(HOSTS):
        yield name, ["-m", "torch.distributed.run", *words, "--node-rank", str(rank), ROOT / "main.py", *options], {}


def by_srun(folder):
    """Command and environment of four tasks, two on each host, with what srun sets."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "4"}
    step |= {"SLURM_STEP_NODELIST": "10.77.0.[1-2]", "SLURM_JOB_ID": str(free_port()), "SLURM_NNODES": "2"}
    options = quick(**SAME, batch_size=IMAGES // 4, timeout=60, output_dir=folder)
    for task in range(4):
        own = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % 2), "SLURM_NODEID": str(task // 2)}
        yield "AB"[task // 2], [ROOT / "main.py", *options], step | own


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("launched", [by_torchrun, by_srun])
def test_two_machines_train_to_the_weights_of_one_process(launched, network, alone, tmp_path):
    """With as many images an update: 21 updates, each after an exchange of gradients over the link."""
    with contextlib.ExitStack() as stack:
        tasks = []
        for name, command, own in launched(tmp_path):
            environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": f"to{name}"} | own
            command = ["ip", "netns", "exec", network[name], sys.executable, *command]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            tasks.append(stack.enter_context(started(command, environment, **pipes)))
        texts = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0] * len(tasks), "\n".join(texts)
    ours, (theirs, logged) = read(tmp_path / "checkpoint-0.pth"), alone
    assert ours["world_size"] == len(tasks) and f"{IMAGES} images an update, 21 updates" in texts[0]
    differences = [(ours["model"][key] - value).abs().max().item() for key, value in theirs["model"].items()]
    print(f"largest difference of {len(differences)} weights: {max(differences):.1e}")
    assert max(differences) <= 1e-6
    row = read_log(tmp_path)[-1]
    assert row["test_acc1"] == logged["test_acc1"]
    assert [row[name] for name in ("train_loss", "test_loss")] == pytest.approx(
        [logged[name] for name in ("train_loss", "test_loss")], rel=1e-5
    )


@pytest.mark.slow
def test_a_machine_is_lost_and_comes_back(network, tmp_path):
    """F19"""
    options = {**RUN, "batch_size": 16, "timeout": 20, "report": False, "output_dir": tmp_path}
    with host(network, "A", "2", 2, options) as first:
        with host(network, "B", "2", 2, options):
            wait_for(lambda: position(tmp_path) >= 5)
            begun = time.monotonic()
            lose(network, "B")
        time.sleep(4)
        with host(network, "B", "2", 2, options) as again:
            out, _ = first.communicate(timeout=300)
            again.communicate(timeout=60)
    wall = time.monotonic() - begun
    assert first.returncode == 0 == again.returncode, out
    assert "on 4 x cpu" in out and "resuming from" in out
    assert [row["epoch"] for row in read_log(tmp_path)] == list(range(2))
    measured("F19", f"finished with 4 of 4 processes, {wall:.0f} s after the loss")


@pytest.mark.slow
def test_a_machine_is_lost_for_good(network, tmp_path):
    """F20: half of the processes go on from the checkpoint, with as many images an update."""
    options = {**RUN, "batch_size": 16, "timeout": 20, "report": False, "output_dir": tmp_path}
    with host(network, "A", "1:2", 2, options) as first, host(network, "B", "1:2", 2, options):
        wait_for(lambda: position(tmp_path) >= 5)
        world = read(max(tmp_path.glob("checkpoint-0-*.pth"), key=os.path.getmtime))["world_size"]
        begun = time.monotonic()
        lose(network, "B")
        out, _ = first.communicate(timeout=300)
    wall = time.monotonic() - begun
    assert first.returncode == 0 and world == 4, out
    last = read(tmp_path / "checkpoint-1.pth")
    assert last["world_size"] == 2 and last["images_per_update"] == {"images": 64, "target": 64}
    assert re.search(r"2 processes: 16 x 2 x 2 = 64 images an update as before, not 16 x 1 x 2 = 32", out)
    assert [row["epoch"] for row in read_log(tmp_path)] == list(range(2))
    measured("F20", f"4 -> 2 processes, 64 images an update before and after, finished {wall:.0f} s after the loss")


@pytest.mark.slow
def test_the_link_goes_down_and_comes_back(network, tmp_path):
    """F20: both wait no longer than the time-out, and go on when they can reach each other."""
    options = {**RUN, "timeout": 5, "report": False, "output_dir": tmp_path}
    with host(network, "A", "2", 1, options) as first, host(network, "B", "2", 1, options) as second:
        wait_for(lambda: position(tmp_path) >= 5)
        begun = time.monotonic()
        ip("-n", network["B"], "link", "set", "toB", "down")
        time.sleep(12)
        ip("-n", network["B"], "link", "set", "toB", "up")
        out, _ = first.communicate(timeout=300)
        wall = time.monotonic() - begun
        with contextlib.suppress(subprocess.TimeoutExpired):
            second.communicate(timeout=30)
    state = max(tmp_path.glob("checkpoint-*.pth"), key=os.path.getmtime)
    if first.returncode == 0:
        # the process saw its time-out, or its launcher, which misses the other one, too, was faster
        assert "resuming from" in out, out[-3000:]
        assert [row["epoch"] for row in read_log(tmp_path)] == list(range(2))
        measured("F20", f"link down for 12 s: finished after {wall:.0f} s")
    else:
        # the meeting point was out of reach too long: what was saved is good
        assert "another process of the run " in out, out[-3000:]
        assert difference_of(read(state), read(state)) == []
        measured("F20", f"link down for 12 s: ended after {wall:.0f} s, with a checkpoint")
