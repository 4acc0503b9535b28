"""A run that meets one random fault after another ends as one without faults."""

import re
import sys

import pytest
import torch
from faults import measured
from helpers import ROOT, finish, make_image_folder, quick
from launched import ENVIRONMENT, RUN
from states import difference_of

import main
from checkpoints import read


@pytest.mark.parametrize("faults", [6, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_random_faults(faults, tmp_path):
    """A run that is killed, interrupted, short of disk, truncated and flipped ends as one without faults."""
    epochs = 6 + faults // 8
    images = make_image_folder(tmp_path / "images", train=48, val=8)
    options = {**RUN, "epochs": epochs, "batch_size": 4, "save_interval": 3, "input_size": 16}
    options |= {"data_set": "IMNET", "data_path": images}
    folder, expected = tmp_path / "run", tmp_path / "expected"
    torch.set_num_threads(1)
    assert main.main(quick(**options, output_dir=expected)) == 0
    command = [sys.executable, ROOT / "tests/faulty_run.py", folder, "7", str(faults)]
    done = finish([*command, *quick(**options, output_dir=folder)], 1500, ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "run.out").read_text()[-3000:]
    counts = {name: int(count) for name, count in re.findall(r"^fault (\w+) (\d+)$", done.stdout, re.MULTILINE)}
    assert sum(counts.values()) == faults
    name = f"checkpoint-{epochs - 1}.pth"
    assert difference_of(read(folder / name), read(expected / name)) == []
    for name in ("checkpoint-best.pth", "log.txt", "steps.jsonl"):
        same = (folder / name).read_bytes() == (expected / name).read_bytes()
        assert same or (name.endswith(".pth") and not difference_of(read(folder / name), read(expected / name)))
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    measured("F23", f"equal after {faults} random faults ({kinds})")
