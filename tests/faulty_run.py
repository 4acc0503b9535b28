"""Runs main.py with one random fault after another: python tests/faulty_run.py FOLDER SEED FAULTS OPTIONS...

Each run is forked from this process, which has loaded torch once, so that hundreds take minutes. Each starts with files
that were damaged, where there are some to spare, and ends by a signal or a full disk. Prints the number of faults of
each kind. FOLDER is the output folder of the run. When all faults have happened the run goes on to its end.
"""

import collections
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from startup import before_torch

before_torch()

import torch  # noqa: E402

import main  # noqa: E402
from checkpoints import Manifest  # noqa: E402

DAMAGES = ("truncate", "flip", "manifest", "stray")
ENDS = ("kill", "term", "interrupt", "full")
# a run that does nothing for so long hangs
PATIENCE = 120


def start(options, log, limit=None):
    """Fork a run, with a largest size of files in place of a full disk; returns its process."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        os.dup2(log, 1), os.dup2(log, 2)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        code = main.main(options)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    os._exit(code)


def mark(folder):
    """What changes whenever a run of the folder saves or logs."""
    names = ("manifest.json", "steps.jsonl")
    return [(folder / name).stat().st_mtime_ns if (folder / name).exists() else 0 for name in names]


def wait(pid, condition):
    """Wait until a condition holds or the process ends; returns its exit code if it did."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError("a run hangs")
        time.sleep(0.005)
    return None


def damage(folder, kind, rng):
    """Damage files that lie in the folder while no run writes; returns whether there was any to spare."""
    files = Manifest(folder).files
    found = sorted(
        (entry["epoch"], entry["update"] if entry["update"] is not None else 10**9, name)
        for name, entry in files.items()
        if "best" not in name and (folder / name).is_file()
    )
    if kind == "stray":
        (folder / f".checkpoint-{rng.randrange(9)}.pth.{rng.randrange(9999)}.tmp").write_bytes(b"half")
        return True
    if kind == "manifest":
        path = folder / "manifest.json"
        if not path.exists():
            return False
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
        return True
    if len(found) < 2:
        return False
    path = folder / found[-1][2]
    content = bytearray(path.read_bytes())
    if kind == "truncate":
        del content[rng.randrange(len(content)) :]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return True


def inject(folder, options, log, kind, rng):
    """Start a run and let a fault happen; returns its exit code if it came to its end before."""
    before = mark(folder)
    limit = rng.randrange(1, 200_000) if kind == "full" else None
    pid = start(options, log, limit)
    code = wait(pid, lambda: mark(folder) != before)
    if code is None:
        time.sleep(rng.uniform(0, 0.3))
        number = {"term": signal.SIGTERM, "interrupt": signal.SIGINT}.get(kind, signal.SIGKILL)
        os.kill(pid, number)
        code = wait(pid, lambda: False)
    if code in (0, -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT):
        return code
    raise RuntimeError(f"a run ended with {code} after {kind}")


def faulty_run(folder, seed, faults, options):
    rng, counts = random.Random(seed), collections.Counter()
    # a limit of files would count for the text that a run prints, too, but not for a pipe
    writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=open(folder.with_suffix(".out"), "ab"))
    log = writer.stdin.fileno()
    while counts.total() < faults:
        kind = rng.choice(DAMAGES)
        if damage(folder, kind, rng):
            counts[kind] += 1
        if counts.total() == faults:
            break
        kind = rng.choice(ENDS)
        code = inject(folder, options, log, kind, rng)
        counts[kind] += 1
        if code == 0:
            break
    for kind, count in counts.items():
        print(f"fault {kind} {count}")
    code = wait(start(options, log), lambda: False)
    return code


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    # processes that are forked later would inherit a pool of threads that does not exist in them
    torch.set_num_threads(1)
    sys.exit(faulty_run(folder, int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
