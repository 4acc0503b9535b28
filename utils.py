"""Start of distributed processes, files that are replaced as a whole, seeds, and memory."""

import argparse
import contextlib
import datetime
import json
import os
import random
import re
import resource
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

# before there is a group: the functions of this module keep the one of its import as a default, and `leave_processes`
# could not end it
import torch.distributed.nn.functional
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from models.config import ConfigError
from models.messages import printable

# ---------------------------------------------------------------------------------------------------- processes

GPU_BACKEND = "nccl"


@dataclass(frozen=True)
class Process:
    """One process among those of the run.

    Args:
        rank, world: index of the process and number of processes.
        local_rank, local_world: the same, counted on this machine alone.
        device: device of the model.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_launcher(args: argparse.Namespace, env: Mapping[str, str] = os.environ) -> tuple[int, int, int, int, str]:
    """Read the environment variables that the launcher of the processes set.

    Known launchers are torchrun and torch.distributed.launch (RANK, WORLD_SIZE, LOCAL_RANK or --local-rank), Open MPI
    (with --dist_on_itp) and SLURM's steps. Without any of them there is one process.

    Returns:
        Rank, world, local rank, local world (see `Process`), and the address at which the processes meet.

    Raises:
        ConfigError: the options imply several processes, and no launcher gives the rank of this one.
    """
    url = args.dist_url
    if args.dist_on_itp and "OMPI_COMM_WORLD_RANK" in env:
        names = (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        )
        rank, world, local_rank, local_world = (int(env.get(name, 1)) for name in names)
        if url == "env://":
            url = f"tcp://{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', '29500')}"
        return rank, world, local_rank, local_world, url
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        local_rank = int(env.get("LOCAL_RANK", max(args.local_rank, 0)))
        return rank, world, local_rank, int(env.get("LOCAL_WORLD_SIZE", world)), url
    if in_slurm_step(env):
        rank, local_rank = int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0))
        world = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))
        nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", 1)))
        if url == "env://":
            # every task derives the same address, because rank 0 runs on the first node of the step
            hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", "")
            host = env.get("MASTER_ADDR") or first_host(hosts) or env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
            port = env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000
            url = f"tcp://{host}:{port}"
        return rank, world, local_rank, max(1, world // nodes), url
    if url != "env://" or args.world_size > 1:
        asked = f"--dist_url {url}" if url != "env://" else f"--world_size {args.world_size}"
        raise ConfigError(
            f"{asked}: no launcher says which of the processes this one is; start them with torchrun or srun, or set "
            "RANK, WORLD_SIZE and LOCAL_RANK in the environment of each"
        )
    if int(env.get("SLURM_NTASKS", 1)) > 1:
        print(
            f"note: one process, though SLURM allocated {env['SLURM_NTASKS']} tasks; srun starts them all", flush=True
        )
    return 0, 1, max(args.local_rank, 0), 1, url


def in_slurm_step(env: Mapping[str, str] = os.environ) -> bool:
    """Whether srun started this process. A job's batch script runs alone, but it has a SLURM_PROCID of 0, too."""
    step = {"SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"} & set(env)
    return "SLURM_PROCID" in env and (bool(step) or int(env["SLURM_PROCID"]) > 0)


def first_host(hosts: str) -> str:
    """First name of a SLURM node list: `node[03-05,9],login` -> `node03`."""
    match = re.match(r"([^\[,]*)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", hosts)
    return "".join(part or "" for part in match.groups())


def start_processes(args: argparse.Namespace) -> Process:
    """Choose the device and join the other processes, by NCCL for tensors on GPUs and by gloo for those on the CPU.

    Raises:
        ConfigError: the device does not exist, or no launcher gives the rank of this process.
    """
    rank, world, local_rank, local_world, url = read_launcher(args)
    name = args.device
    if name.startswith("cuda") and not torch.cuda.is_available():
        if rank == 0:
            print("no GPU found: running on the CPU", flush=True)
        name = "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or local_rank) if world == 1 else local_rank
        if torch.cuda.device_count() == 1 and "LOCAL_RANK" not in os.environ:
            # under srun and mpirun each process may see one GPU only, which is its own
            index = 0
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs"
            )
        name = f"cuda:{index}"
        torch.cuda.set_device(index)
    device = torch.device(name)
    if world > 1:
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            # gloo as well, since the EMA of the weights may be kept on the CPU
            f"cpu:gloo,cuda:{GPU_BACKEND}" if on_gpu else "gloo",
            init_method=url,
            rank=rank,
            world_size=world,
            device_id=device if on_gpu else None,
            timeout=datetime.timedelta(seconds=args.timeout),
        )
    return Process(rank, world, local_rank, local_world, device)


def is_main_process() -> bool:
    """Whether this is the first process, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def log(message: str) -> None:
    """Print a line on the first process only; names of files and texts of checkpoints in it are made `printable`."""
    if is_main_process():
        print(printable(message), flush=True)


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# How DistributedDataParallel exchanges gradients; `scripts/benchmark_parallel.py` measures each setting against others.
PARALLEL = {
    # Each process averages the BatchNorm statistics of its own images, until `synchronise_buffers` makes them equal.
    # Broadcasting KernelWarehouse's hundreds of buffers would delay every forward pass.
    "broadcast_buffers": False,
    # Gradients lie in the buckets that are sent: the same values, without a copy of all gradients in memory.
    "gradient_as_bucket_view": True,
    # With it, torch 2.12 fails in the first update of several batches (`no_sync`; pytorch/pytorch#187732).
    "static_graph": False,
    # All parameters take part in every step; searching the graph for others would take time in every one.
    "find_unused_parameters": False,
}


def in_parallel(
    model: torch.nn.Module, device: torch.device, compression: str = "none", **settings: Any
) -> torch.nn.parallel.DistributedDataParallel:
    """The model with its gradients averaged over the processes.

    Args:
        model: on its device.
        device: of the model.
        compression: "bf16": gradients are rounded to bfloat16 before they are sent, and back afterwards; "none": they
            are sent as they are.
        settings: arguments of DistributedDataParallel that replace those of `PARALLEL`.

    Raises:
        ConfigError: the processes cannot add numbers of that type.
    """
    devices = [device] if device.type == "cuda" else None
    net = torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, **{**PARALLEL, **settings})
    if compression == "bf16":
        _require_sums(torch.bfloat16, device)
        net.register_comm_hook(None, bf16_compress_hook)
    _parallel.add(net)
    return net


# networks that average their gradients over the processes, as long as they exist
_parallel: weakref.WeakSet[torch.nn.parallel.DistributedDataParallel] = weakref.WeakSet()


def leave_processes() -> None:
    """Leave the group of all processes, and end the threads that gloo worked with.

    These may need Python's lock, to let go of a tensor. Who owns the group last must therefore not hold the lock while
    it waits for them, or some of a hundred processes hang (PyTorch's issue 56297); and they must not outlive Python,
    or some abort. Python's own references let go of the lock; the reducer of a DistributedDataParallel does not. So the
    reducers of networks made by `in_parallel` go first: these networks can no longer be trained.
    """
    for net in _parallel:
        net.reducer = net.logger = net.process_group = None
    dist.destroy_process_group()


def _require_sums(dtype: torch.dtype, device: torch.device) -> None:
    """Try a sum over the processes in a data type.

    Raises:
        ConfigError: the backend that connects them has none; in all processes.
    """
    try:
        dist.all_reduce(torch.ones(1, dtype=dtype, device=device))
    except (RuntimeError, TypeError) as error:
        # gloo: "Invalid scalar type"; NCCL: "Unconvertible NCCL type"; anything else is another fault
        if "type" not in str(error):
            raise
        raise ConfigError(
            f"--grad_compression: {dist.get_backend()} of torch {torch.__version__} cannot add {dtype} over processes "
            f"({' '.join(str(error).split())[:100]}); leave it at none"
        ) from None


def synchronise_buffers(*modules: torch.nn.Module) -> None:
    """Give every process the buffers of the first one, which are saved and with which all processes must evaluate."""
    if dist.is_initialized():
        for module in modules:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def gather(value: Any) -> list[Any]:
    """`value` of every process, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_first(value: Any) -> list[Any] | None:
    """`value` of every process, in order of rank, on the first process; None on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, 0)
    return values


def share(value: Any) -> Any:
    """The first process's `value`, on all processes."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


# words in the errors of gloo, NCCL and the store where the other processes meet
_LOST = (
    "gloo",
    "NCCL",
    "ncclRemote",
    "onnection closed",
    "onnection reset",
    "TCPStore",
    "store->",
    "socket",
    "Broken pipe",
)


def lost_processes(error: RuntimeError) -> str | None:
    """What to say where an error means that other processes of the run ended or hang; None for another error."""
    text = " ".join(str(error).split())
    if not dist.is_initialized() or not any(word in text for word in _LOST):
        return None
    late = "imed out" in text or "imeout" in text
    what = "did not answer in time (--timeout)" if late else "ended"
    return (
        f"process {dist.get_rank()} of {dist.get_world_size()}: another process of the run {what}; its own message "
        f"tells why, and the same command continues from the last checkpoint ({text[:160]})"
    )


def make_folder(path: str) -> Path:
    """Make a folder.

    Raises:
        ConfigError: it cannot be made, or is not writable.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: the folder cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{path}: the folder is not writable")
    return Path(path)


def check_target(path: str | Path) -> Path:
    """Refuse a file that could not be written at the end, before anything slow is done.

    Returns:
        The path of the file, without symbolic links.

    Raises:
        ConfigError: names the file and the reason.
    """
    try:
        path = Path(path).resolve()
        taken = path.exists() and not path.is_file()
    except (OSError, ValueError) as error:
        # a name that is too long, or that has a NUL byte
        raise ConfigError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    if taken:
        raise ConfigError(f"{path}: not a file that can be replaced; give the path of a file")
    try:
        # the name of the temporary file is longer, and may be too long
        with tempfile.TemporaryFile(dir=path.parent), contextlib.suppress(FileNotFoundError):
            beside(path).stat()
        return path
    except OSError as error:
        if not path.parent.exists():
            raise ConfigError(f"{path}: there is no folder {path.parent}; make it first") from None
        raise ConfigError(f"{path}: cannot be written: {path.parent}: {error.strerror}") from None


def check_not_read(output: Path | None, inputs: Iterable[str | Path | None]) -> None:
    """Refuse to write over a file that is read.

    Args:
        output: the file to write; None: there is none.
        inputs: what is read. None, URLs and whatever else is no path of this machine cannot be the output.

    Raises:
        ConfigError: names the file that would be lost.
    """
    if output is None or not output.exists():
        return
    for path in inputs:
        if path is not None and os.path.exists(path) and os.path.samefile(path, output):
            raise ConfigError(f"{output}: is {path} itself, which is read; give another name, or it would be lost")


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Raises a `ConfigError` that names `path` if the body of the `with` statement cannot write it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


def beside(path: Path) -> Path:
    """The temporary file that becomes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to, which replaces `path` if the body of the `with` statement succeeds.

    Whenever the process dies, `path` holds either the old file or the whole new one.
    """
    temporary = beside(path)
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Replace `path` by a file that is written whole; on the disk, one follows the other in this order."""
    _flush_to_disk(temporary)
    os.replace(temporary, path)
    _flush_to_disk(path.parent)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, write: Callable[[IO[bytes]], Any], verify: Callable[[Path], Any] | None = None) -> None:
    """Write a file as `replacing` does.

    Args:
        path: file to write.
        write: called with an open file, writes the content into it.
        verify: called with the path of the written file before it replaces the old one; raises if it is damaged.
    """
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            write(file)
        if verify is not None:
            verify(temporary)


def shown(text: str | Path) -> str:
    r"""A text that UTF-8 can hold: a path's bytes that are no UTF-8 are escaped as \xff, lone surrogates as \ud800."""
    try:
        return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def csv_cell(value: Any) -> Any:
    """A value for a CSV file; what a spreadsheet would run, or a terminal obey, becomes a plain text.

    A text that begins like a formula gets an apostrophe in front, and control characters but line breaks are escaped.
    Numbers stay as they are.
    """
    if not isinstance(value, str):
        return value
    lines = [printable(line) for line in value.split("\n")]
    return ("'" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else "") + "\n".join(lines)


def as_json(value: Any) -> str:
    """A value as JSON in any script. Characters that a terminal would obey are escaped, and read back as they were."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # line breaks between the entries are JSON's own; those in texts are escaped already
    return "".join(
        letter if letter == "\n" or printable(letter) == letter else json.dumps(letter)[1:-1] for letter in text
    )


def write_out(text: str, path: Path | None) -> None:
    """Write a text in UTF-8, as `shown`, to a file, or where `path` is None to the standard output.

    Raises:
        ConfigError: the file or the standard output cannot be written; an older file is intact.
    """
    content = shown(text).encode()
    if path is None:
        _print(content)
        return
    with errors_name(path):
        replace_file(path, lambda file: file.write(content))


def _print(content: bytes) -> None:
    """Write a text to the standard output as it is, in any script, also where the terminal's encoding has another one.

    Raises:
        ConfigError: it is closed, or cannot be written.
    """
    if sys.stdout is None:
        raise ConfigError("the standard output is closed; give --output")
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
    except OSError as error:
        # nothing more is written, not even when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # a reader that closes the pipe, such as head, has enough
        if not isinstance(error, BrokenPipeError):
            raise ConfigError(f"the standard output cannot be written: {error.strerror}") from None


def set_seed(seed: int) -> None:
    """Seed the random generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def peak_memory(device: torch.device) -> int:
    """The greatest memory so far in bytes: that of tensors on a GPU, and that of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
