"""Runs a function in processes that belong together, as those of a training run."""

import multiprocessing
import pickle
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import free_port

from utils import leave_processes

PATIENCE = 180  # seconds
# they are forked from one process, which imports what takes seconds
multiprocessing.set_forkserver_preload(["engine", "training"])


def in_processes(worker, *arguments, grouped=True, world=2):
    """[worker(0, *arguments), worker(1, *arguments)], each in a process with one thread; `world` of them.

    worker: a function of a module; what it returns must be picklable.  grouped: whether the two are a group of
    `torch.distributed` over gloo.  An error in one of them is raised here and ends both.
    """
    with tempfile.TemporaryDirectory() as folder:
        # as bytes: tensors would be passed as open files, of which a process can take few
        own = (Path(folder), free_port() if grouped else None, world, pickle.dumps((worker, arguments)))
        deadline = time.monotonic() + PATIENCE
        workers = torch.multiprocessing.start_processes(_run, own, nprocs=world, join=False, start_method="forkserver")
        # returns at every process that ends, and raises where one failed
        while not workers.join(timeout=1):
            if time.monotonic() > deadline:
                for process in workers.processes:
                    process.kill()
                raise TimeoutError(f"{worker.__name__}: not done after {PATIENCE} s")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]


def _run(rank, folder, port, world, work):
    torch.set_num_threads(1)
    worker, arguments = pickle.loads(work)
    if port is not None:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    (folder / str(rank)).write_bytes(pickle.dumps(worker(rank, *arguments)))
    if dist.is_initialized():
        dist.barrier()
        leave_processes()
