"""What timm and mmengine make of files that this project refuses: the second table of results/faults.md."""

import contextlib
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import timm
import torch
from helpers import ROOT
from test_hostile_code import TRAP, Evil
from timm.models import load_checkpoint

from checkpoints import files, read
from models import build_model

mmengine = pytest.importorskip("mmengine", reason="requirements-detection.txt is not installed")
from mmengine.runner.checkpoint import load_checkpoint as load_by_mmengine  # noqa: E402

pytestmark = pytest.mark.slow
FLIPS = 40


def ours(model, path):
    model.load_state_dict(read(path)["model"])


LOADERS = {
    "here": ours,
    f"timm {timm.__version__}": lambda model, path: load_checkpoint(model, str(path)),
    f"mmengine {mmengine.__version__}": lambda model, path: load_by_mmengine(model, str(path), map_location="cpu"),
}


def weights():
    return build_model({"model": "test_resnet"}, num_classes=10)


def alone(function, *arguments):
    """What a function returns in a process of its own: `detection`, which other tests import, mends mmengine."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result(timeout=120)


def written(name, folder, content):
    """The file that each of them would write: those of the others are plain ones of torch."""
    path = folder / "checkpoint-0.pth"
    if name == "here":
        files.write_checkpoint(path, content)
    else:
        torch.save({"state_dict": content["model"]}, path)
    return path


def flipped_bits_accepted(name, folder):
    model = weights()
    path = written(name, folder, {"model": model.state_dict(), "epoch": 0})
    whole, rng, accepted = path.read_bytes(), random.Random(1), 0
    for _ in range(FLIPS):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with contextlib.suppress(Exception):
            LOADERS[name](model, path)
            accepted += 1
    return accepted


def code_ran(name, folder):
    model = weights()
    path, target = folder / "evil.pth", folder / "ran"
    torch.save({"model": model.state_dict(), "state_dict": model.state_dict(), "args": Evil(target)}, path)
    # whether it loads does not matter
    with contextlib.suppress(Exception):
        LOADERS[name](model, path)
    return target.exists()


@pytest.mark.parametrize("name", LOADERS)
def test_flipped_bits(name, tmp_path):
    accepted = alone(flipped_bits_accepted, name, tmp_path)
    assert_is_told("flipped bits loaded", name, f"{accepted} of {FLIPS}")
    assert name != "here" or accepted == 0


@pytest.mark.parametrize("name", LOADERS)
def test_code_with_the_variable(name, tmp_path, monkeypatch):
    for variable, value in TRAP.items():
        monkeypatch.setenv(variable, value)
    ran = alone(code_ran, name, tmp_path)
    assert_is_told("code with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1", name, "ran" if ran else "did not run")
    assert name != "here" or not ran


def assert_is_told(fault, name, result):
    """The table has what was found."""
    lines = (ROOT / "results/faults.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| beside others |"))
    row = next(line for line in lines if line.startswith(f"| {fault} |"))
    print(fault, name, result)
    names, results = ([cell.strip() for cell in line.split("|")] for line in (head, row))
    assert results[names.index(name)] == result
