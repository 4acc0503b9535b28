"""scripts/bound.py: the least that a dynamic network adds to a static one."""

import argparse
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from measure import geometry_of
from scripts import bound


@pytest.mark.parametrize(
    ("batch", "size", "stride", "n", "convolution", "least"),
    [
        # kernels of 9 x 8 x 8 numbers are mixed for 2 samples from 5 cells, and used at 64 positions
        (2, 16, 2, 5, 2 * 9 * 64 * 64, 2 * 9 * 64 * 5),
        # at stride 1 these are 16 squares, each of which takes 16 products of spectra for 36 of the definition
        (2, 8, 1, 60, 2 * 9 * 64 * 64, 2 * 9 * 64 * 60 - 2 * 20 * 64 * 16),
        # these save more than mixing from few cells takes
        (2, 8, 1, 5, 2 * 9 * 64 * 64, 0),
        # one tap sees the only position: inputs, or outputs, of all 5 cells cost less than kernels for 100 samples
        (100, 1, 1, 5, 100 * 64, 100 * 5 * (64 + 8) - 100 * 64),
    ],
)
def test_least_multiply_adds(batch, size, stride, n, convolution, least):
    x, alpha, cells = torch.zeros(batch, 8, size, size), torch.zeros(batch, 9, n), torch.zeros(n, 8, 8, 1, 1)
    assert bound.added(geometry_of(x, alpha, cells, [3, 3], None, stride, [1, 1])) == (convolution, least)


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


@pytest.mark.parametrize("rates", [(1e9, 0), (float("inf"), 1e-3)], ids=["products", "bytes"])
def test_training_adds_what_inference_does_three_times(rates, monkeypatch, capsys):
    """Two more products for each; a warehouse is read once more, and its gradient is written."""
    monkeypatch.setattr(bound, "peak_rate", lambda repeats: rates[0])
    monkeypatch.setattr(bound, "reading_seconds", lambda numbers, repeats: rates[1])
    monkeypatch.setattr(bound, "median_seconds", lambda function, repeats: 1.0)
    for mode in ("inference", "training"):
        args = argparse.Namespace(mode=mode, batch_size=2, input_size=32, repeats=1, layers=False)
        bound.bound("configs/resnet18/kw1x_resnet18.json", args)
    first, second = map(float, re.findall(r"additions at least ([\d.]+) ms", capsys.readouterr().out))
    assert first > 5 and second == pytest.approx(3 * first, abs=0.2)
