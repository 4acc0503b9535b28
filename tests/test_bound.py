"""scripts/bound.py: the least that a dynamic network adds to a static one."""

import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from measure import geometry_of
from scripts.bound import added


@pytest.mark.parametrize(
    ("batch", "size", "convolution", "least"),
    [
        # kernels of 9 x 8 x 8 numbers are mixed for 2 samples from 5 cells, and used at 64 positions
        (2, 8, 2 * 9 * 64 * 64, 2 * 9 * 64 * 5),
        # one tap sees the only position: inputs, or outputs, of all 5 cells cost less than kernels for 100 samples
        (100, 1, 100 * 64, 100 * 5 * (64 + 8) - 100 * 64),
    ],
)
def test_least_multiply_adds(batch, size, convolution, least):
    x, alpha, cells = torch.zeros(batch, 8, size, size), torch.zeros(batch, 9, 5), torch.zeros(5, 8, 8, 1, 1)
    assert added(geometry_of(x, alpha, cells, [3, 3], None, 1, [1, 1])) == (convolution, least)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_bound_is_below_one(mode):
    command = [
        sys.executable,
        "scripts/bound.py",
        "--repeats",
        "1",
        "--mode",
        mode,
        "--batch_size",
        "2",
        "--input_size",
        "32",
    ]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0 < float(re.search(r"bound (\d\.\d+)\n", out)[1]) < 1
