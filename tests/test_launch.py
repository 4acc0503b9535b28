"""Whole runs as users start them: one process, torch.distributed.launch, torchrun, SLURM; and what they must share."""

import argparse
import os
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import KW, METHODS, METHODS_OF_RUNS, finish, free_port, launch, make_image_folder, quick, read_log, started
from processes import in_processes

import main
import utils
from checkpoints import read
from models import build_model
from models.config import ConfigError
from utils import first_host, read_launcher, start_processes

LINE = re.compile(r"^\* Acc@1 ([\d.]+) Acc@5 ([\d.]+) loss ([\d.]+)$", re.MULTILINE)


# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """11 images to evaluate, which 2 and 3 do not divide, in 3 classes, fewer than the 5 of Acc@5."""
    return make_image_folder(tmp_path_factory.mktemp("images"), train=25, val=11)


def run_options(folder, **options):
    model = {"model": "kw_test_resnet", "temp_epoch": 3}
    if options.get("model", "kw_test_resnet") == "kw_test_resnet":
        model |= KW
    return quick(**{"data_set": "IMNET", "data_path": folder, "input_size": 32, "batch_size": 4, **model, **options})


def accuracy(text):
    return [tuple(map(float, match)) for match in LINE.findall(text)]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run of two processes through torch.distributed.launch, which passes --local-rank."""
    output = tmp_path_factory.mktemp("trained")
    options = {"mixup": 0.8, "update_freq": 2, "num_workers": 1, "lr": 0.005, "model_ema": True, "model_ema_eval": True}
    done = launch(run_options(folder, output_dir=output, **options), "launch", processes=2)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_training_in_processes(trained):
    output, out = trained
    log = read_log(output)
    assert [line["epoch"] for line in log] == [0, 1]
    # 25 images, 2 processes, batches of 4: 3 batches each, one update of 2, and one left over
    assert "4 x 2 x 2 = 16 images an update, 1 updates an epoch" in out
    logged = [tuple(round(line[f"test_{name}"], 3) for name in ("acc1", "acc5", "loss")) for line in log]
    assert accuracy(out) == logged
    assert all(line["test_acc5"] == 100.0 for line in log)
    state = read(output / "checkpoint-1.pth")
    assert state["world_size"] == 2 == len(state["rng"])
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in state["model"])


@pytest.mark.parametrize("launcher, processes", [("inside", 1), ("torchrun", 2), ("launch", 3)])
def test_evaluation_prints_what_training_logged(trained, folder, launcher, processes, capsys):
    output, _ = trained
    arguments = run_options(folder, eval=True, resume=output / "checkpoint-1.pth", model_ema_eval=True)
    if launcher == "inside":
        assert main.main(arguments) == 0
        out = capsys.readouterr().out
    else:
        done = launch(arguments, launcher, processes)
        assert done.returncode == 0, done.stderr
        out = done.stdout
    line = read_log(output)[-1]
    expected = tuple(round(line[f"test_{name}"], 3) for name in ("acc1", "acc5", "loss"))
    assert accuracy(out) == [expected]
    assert f"EMA * Acc@1 {line['test_acc1_ema']:.3f} " in out


def test_resume_with_torchrun_equals_the_unbroken_run(trained, folder, tmp_path):
    """The first epoch again, then the second through another launcher: the same weights and log."""
    output, _ = trained
    for name in ("checkpoint-0.pth", "log.txt"):
        (tmp_path / name).write_bytes((output / name).read_bytes())
    options = {"mixup": 0.8, "update_freq": 2, "num_workers": 1, "lr": 0.005, "model_ema": True, "model_ema_eval": True}
    done = launch(run_options(folder, output_dir=tmp_path, **options), "torchrun", processes=2)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert (tmp_path / "log.txt").read_text() == (output / "log.txt").read_text()
    ours, theirs = read(tmp_path / "checkpoint-1.pth"), read(output / "checkpoint-1.pth")
    for part in ("model", "model_ema"):
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])
    assert ours["best"] == theirs["best"]


def test_one_process_as_a_user_starts_it(folder, tmp_path):
    done = launch(run_options(folder, epochs=1, output_dir=tmp_path, device="cuda"), env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert "running on the CPU" in done.stdout and len(accuracy(done.stdout)) == 1
    # plain lines where there is no terminal
    assert "\r" not in done.stdout and re.search(
        r"epoch 1/1 6/6 .*left 0:00:00 .*images/s .*memory \d+ MiB", done.stdout
    )


@pytest.mark.slow
def test_non_finite_loss_stops_all_processes(folder, tmp_path):
    """The learning rate makes the weights overflow; no process hangs, and no checkpoint holds a NaN."""
    arguments = run_options(folder, opt="sgd", lr=1e30, epochs=3, output_dir=tmp_path)
    done = launch(arguments, "torchrun", processes=2, timeout=120)
    assert done.returncode != 0
    assert len(re.findall(r"error: the loss or the gradient is not finite at step \d+ of epoch \d+", done.stderr)) == 2
    for path in tmp_path.glob("*.pth"):
        assert all(torch.isfinite(value).all() for value in read(path)["model"].values() if value.is_floating_point())


def test_nothing_outlives_a_test(tmp_path):
    """Processes that a launcher starts in sessions of their own end with it, when a test runs out of time."""
    child = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)"
    parent = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True).wait()"
    )
    with pytest.raises(AssertionError, match="out of time"), started([sys.executable, "-c", parent], cwd=tmp_path):
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        raise AssertionError("out of time")
    command = Path("/proc", (tmp_path / "pid").read_text(), "cmdline")
    # nothing, or a process that has ended and that nobody has asked for its exit code
    assert not command.exists() or not command.read_bytes()


def launcher(**options):
    defaults = {"dist_url": "env://", "dist_on_itp": False, "local_rank": -1, "world_size": 1, "timeout": 60}
    return argparse.Namespace(**{**defaults, **options})


def test_launcher_environments():
    assert read_launcher(launcher(), {}) == (0, 1, 0, 1, "env://")
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert read_launcher(launcher(), torchrun) == (5, 8, 1, 4, "env://")
    old = {"RANK": "1", "WORLD_SIZE": "2"}
    assert read_launcher(launcher(local_rank=1), old)[:3] == (1, 2, 1)
    slurm = {
        "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_JOB_ID": "20007",
        "SLURM_NODELIST": "gpu[03-04]", "SLURM_STEP_ID": "0",
    }  # fmt: skip
    assert read_launcher(launcher(), slurm) == (9, 16, 1, 8, "tcp://gpu03:20007")
    slurm |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert read_launcher(launcher(), slurm)[4] == "tcp://10.0.0.1:1234"
    # torchrun started by srun: torchrun's ranks count
    assert read_launcher(launcher(), {**slurm, **torchrun})[:3] == (5, 8, 1)
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert read_launcher(launcher(dist_on_itp=True), mpi)[:3] == (3, 4, 1)


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}], ids=["sbatch", "shell"])
def test_alone_in_an_allocation_of_many_tasks(step, capsys):
    """The script of a SLURM job, and a shell that srun opened in it, run once and wait for nobody."""
    script = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    assert read_launcher(launcher(), {**script, **step})[:4] == (0, 1, 0, 1)
    assert step or "8 tasks" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"dist_url": "tcp://127.0.0.1:1"}, {"world_size": 2}], ids=str)
def test_several_processes_without_a_launcher_are_refused(options, tmp_path, capsys):
    """Each would take itself for the first of one, and write to the same folder."""
    assert main.main(quick(**options, output_dir=tmp_path / "out")) == 2
    assert re.search(r"^error: --(dist_url|world_size).*torchrun", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 5])
def test_a_gpu_of_its_own_for_every_task(rank, monkeypatch):
    """srun --gpus-per-task=1 shows each task one GPU, which is its number 0."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    step = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": 8, "SLURM_STEP_NODELIST": "gpu1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in step.items():
        monkeypatch.setenv(name, str(value))
    assert start_processes(launcher(device="cuda")).device == torch.device("cuda:0") and chosen == [0]
    # torchrun shows all of them to all
    for name, value in {"RANK": rank, "WORLD_SIZE": 8, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    with nullcontext() if rank == 0 else pytest.raises(ConfigError, match="has no GPU"):
        start_processes(launcher(device="cuda"))


def _gpu_worker(rank, port):
    """A process of two whose GPUs have a backend that takes no tensor of the CPU, as NCCL."""
    environment = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**environment, "GLOO_SOCKET_IFNAME": "lo"}.items()})
    dist.Backend.register_backend("gpus", lambda *args: dist.ProcessGroupGloo(*args), devices="cuda")
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 2)
    torch.cuda.set_device = lambda index: None
    start, utils.GPU_BACKEND = dist.init_process_group, "gpus"

    start("gpus", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        utils.reduce_sum(torch.tensor([rank]))
    dist.destroy_process_group()

    # the device of NCCL, to which this one cannot be bound
    dist.init_process_group = lambda *args, device_id, **kwargs: start(*args, **kwargs)
    utils.start_processes(launcher(device="cuda"))
    average = torch.nn.BatchNorm1d(3)
    average.running_mean.fill_(rank + 1)
    utils.synchronise_buffers(average)
    return average.running_mean.tolist(), utils.reduce_sum(torch.tensor([rank + 1])).tolist()


def test_averages_on_the_cpu_with_several_gpus():
    """--model_ema_force_cpu: buffers and counts on the CPU go over another backend than NCCL."""
    assert in_processes(_gpu_worker, free_port(), grouped=False) == [([1.0] * 3, [3])] * 2


def _ddp_worker(rank):
    torch.manual_seed(rank)
    model = build_model({"model": "kw_test_resnet", **KW}, num_classes=3)
    net = utils.in_parallel(model, torch.device("cpu"))
    sent = []
    broadcast = dist._broadcast_coalesced
    dist._broadcast_coalesced = lambda *args: sent.append(args) or broadcast(*args)
    for _ in range(2):
        net(torch.randn(4, 3, 32, 32)).sum().backward()
    own = torch.cat([buffer.flatten().double() for buffer in model.buffers()])
    utils.synchronise_buffers(model)
    one = torch.cat([buffer.flatten().double() for buffer in model.buffers()])
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return len(sent), *(float(t.square().sum()) for t in (own, one, gradient))


def test_buffers_are_each_process_s_own_until_the_end_of_an_epoch():
    first, second = in_processes(_ddp_worker)
    assert first[0] == second[0] == 0, "buffers were broadcast in a forward pass"
    assert first[1] != second[1] and first[2] == second[2] == first[1] and first[3] == second[3]


def test_a_group_is_left_while_its_network_exists():
    """Some of a hundred processes would hang if the network owned the group last, or abort if threads outlived it."""
    code = (
        "import pathlib, torch, torch.distributed as dist, utils\n"
        "def threads():\n"
        "    names = [p.read_text() for p in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "    return sum('gloo' in name for name in names)\n"
        "def once():\n"
        "    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "    net = utils.in_parallel(torch.nn.Linear(8, 8), torch.device('cpu'))\n"
        "    net(torch.randn(4, 8)).sum().backward()\n"
        "    dist.all_reduce(torch.ones(3))\n"
        "    assert threads()\n"
        "    utils.leave_processes()\n"
        "    assert not threads(), 'threads of gloo remain'\n"
        "for _ in range(500):\n    once()\n"
    )
    result = finish([sys.executable, "-c", code], 120, {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "hosts, first",
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[03-05,9]", "n03"),
        ("n[7,9],m", "n7"),
        ("n[1-2]-ib", "n1-ib"),
        ("gpu-1-[2-3]", "gpu-1-2"),
    ],
)
def test_slurm_host_lists(hosts, first):
    assert first_host(hosts) == first


def _main_worker(rank, port, arguments):
    """main.py with the variables that torchrun sets."""
    own = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**own, "GLOO_SOCKET_IFNAME": "lo"}.items()})
    return main.main(arguments)


@pytest.mark.parametrize("method", METHODS_OF_RUNS)
def test_every_method_in_processes(method, folder, tmp_path, capsys):
    """Trained by two processes, evaluated by one: the same numbers."""
    options = {**METHODS[method], "temp_epoch": 1, "epochs": 1, "update_freq": 2}
    arguments = run_options(folder, **options, output_dir=tmp_path)
    assert in_processes(_main_worker, free_port(), arguments, grouped=False) == [0, 0]
    logged = read_log(tmp_path)[-1]
    assert read(tmp_path / "checkpoint-0.pth")["world_size"] == 2
    assert main.main(run_options(folder, **options, eval=True, resume=tmp_path / "checkpoint-0.pth")) == 0
    (printed,) = accuracy(capsys.readouterr().out)
    # after so few steps running statistics are those of no image, and a loss may be huge
    assert printed == pytest.approx([logged[f"test_{name}"] for name in ("acc1", "acc5", "loss")], rel=1e-6, abs=5e-4)


@pytest.mark.slow
def test_slurm_run(folder, tmp_path):
    """Two processes with the variables that srun sets."""
    environment = {
        "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODELIST": "localhost", "SLURM_STEP_ID": "0",
        "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, main.__file__, *run_options(folder, epochs=1, output_dir=tmp_path)]
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    with started(command, environment | ranks[0]) as first, started(command, environment | ranks[1]) as second:
        assert [task.wait(timeout=120) for task in (first, second)] == [0, 0]
    assert read(tmp_path / "checkpoint-0.pth")["world_size"] == 2
