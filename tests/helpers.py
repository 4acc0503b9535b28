"""What several tests of the training loop share: made images, and ways to start main.py."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpu_checks import cases

ROOT = Path(__file__).parent.parent
KW, METHODS = cases.KW, cases.METHODS
# whole runs take seconds: with --slow those of methods that are one of the others under another name, or keep no state
# that none of the others keeps
_ALIKE = ("kw1d2x", "od", "se", "cbam", "eca", "dyconv", "condconv", "cgc", "weightnet", "we")
METHODS_OF_RUNS = [pytest.param(name, marks=pytest.mark.slow) if name in _ALIKE else name for name in METHODS]
EXIF_ORIENTATION = 0x0112


def make_image_folder(root, train=13, val=11, classes=("ant", "bee", "cat")):
    """ImageNet's layout with JPEGs of many sizes and kinds. The class is the third of the picture that is bright.

    train, val: images in all, divided among the classes in turn.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            label = index % len(classes)
            height, width = rng.integers(36, 90, 2)
            pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
            third = slice(label * width // len(classes), (label + 1) * width // len(classes))
            pixels[:, third] += 150
            image = Image.fromarray(pixels)
            path = root / split / classes[label] / f"{index}.JPEG"
            kind = index // len(classes) % 4
            if kind == 1:
                image.convert("L").save(path)
            elif kind == 2:
                image.convert("CMYK").save(path)
            elif kind == 3:
                # stored on its side, with the note that turns it upright
                exif = Image.Exif()
                exif[EXIF_ORIENTATION] = 6
                image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
            else:
                image.save(path)
    return root


def make_cifar(root, name, train=13, test=11):
    """CIFAR's binary version: label bytes, then the red, green and blue plane, row by row. Returns what was drawn.

    CIFAR10's training images are spread over its five files.

    Returns:
        "train" and "test" -> a list of (label, bytes of the three planes).
    """
    rng = np.random.default_rng(0)
    folder = root / {"CIFAR10": "cifar-10-batches-bin", "CIFAR100": "cifar-100-binary"}[name]
    folder.mkdir(parents=True)
    drawn = {}
    for split, count in (("train", train), ("test", test)):
        labels = [index * 7 % {"CIFAR10": 10, "CIFAR100": 100}[name] for index in range(count)]
        drawn[split] = [(label, rng.integers(0, 256, 3072, dtype=np.uint8).tobytes()) for label in labels]
        # the coarse label is one that the fine one never is
        heads = [bytes([label]) if name == "CIFAR10" else bytes([(label + 1) % 20, label]) for label in labels]
        records = [head + planes for head, (_, planes) in zip(heads, drawn[split])]
        parts = {f"{split}.bin": records}
        if name == "CIFAR10":
            cuts = [0, 1, 4, 6, 9, count]
            batches = {f"data_batch_{i + 1}.bin": records[cuts[i] : cuts[i + 1]] for i in range(5)}
            parts = batches if split == "train" else {"test_batch.bin": records}
        for file, content in parts.items():
            (folder / file).write_bytes(b"".join(content))
    return drawn


def words(**options):
    """Options as words of a command line."""
    result = []
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        result += [
            f"--{name}",
            *("none" if v is None else str(v).lower() if v is True or v is False else str(v) for v in values),
        ]
    return result


def quick(**options):
    """A run of seconds: the digits, a model of 0.4 M parameters, light augmentation."""
    defaults = {
        "model": "test_resnet", "data_set": "digits", "input_size": 16, "batch_size": 64, "epochs": 2, "lr": 0.002,
        "warmup_epochs": 0, "mixup": 0, "cutmix": 0, "num_workers": 0, "seed": 1, "device": "cpu",
    }  # fmt: skip
    return words(**{**defaults, **options})


def read_log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


def refused(capsys, arguments):
    """The one line of a refused run."""
    # not for those that only start processes: it loads what a run needs
    import main

    assert main.main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert "epoch 0" not in captured.out
    return lines[0]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(arguments, launcher="single", processes=1, timeout=180, env=None):
    """Start main.py as a user does; returns the completed process with its text.

    launcher: single, launch (torch.distributed.launch) or torchrun.
    """
    starters = {
        "single": [],
        "launch": ["-m", "torch.distributed.launch"],
        "torchrun": ["-m", "torch.distributed.run"],
    }
    starter = starters[launcher]
    if starter:
        starter = [*starter, f"--nproc_per_node={processes}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(env or {})}
    command = [sys.executable, *starter, str(ROOT / "main.py"), *arguments]
    return finish(command, timeout, environment)


@contextlib.contextmanager
def started(command, env=None, **kwargs):
    """A process that ends with the block, and with it all that it started, in sessions of their own, too."""
    mark = f"STARTED_BY_TEST={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    with _signals_heeded():
        process = subprocess.Popen(
            [str(word) for word in command], env={**os.environ, **(env or {}), name: value}, **kwargs
        )
    try:
        yield process
    finally:
        while pids := [pid for pid in _processes() if mark.encode() in _environment(pid)]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        process.wait()


@contextlib.contextmanager
def _signals_heeded():
    """Processes that start in the block heed signals that this one may ignore, as in the background or under nohup."""
    ignored = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def _processes():
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment(pid):
    """The variables of a process; none of one that has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def finish(command, timeout, env=None, cwd=ROOT):
    """Run a command to its end; returns the completed process with its text.

    Raises:
        AssertionError: it takes longer than `timeout` seconds; tells where a process of Python stands, and its text.
    """
    env = {**(env or {}), "PYTHONFAULTHANDLER": "1"}
    with started(command, env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            out, err = process.communicate(timeout=10)
            raise AssertionError(f"still running after {timeout} s\n{err[-6000:]}\n{out[-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def replaced(net):
    """The layers that a conversion made dynamic -> their warehouses or methods."""
    return {name: label for name, label in net.conversion.items() if not label.startswith("static: ")}
