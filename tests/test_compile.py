"""torch.compile: every method trains with compiled forward and backward passes, and computes what it does without."""

import time

import pytest
import torch
from helpers import METHODS
from tolerance import difference

from models import build_model, convert


def gradients(model, forward, images):
    y = forward(images)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [y, *torch.autograd.grad(y.square().mean(), parameters, allow_unused=True)]


def assert_compiles(model, images, backend):
    torch.compiler.reset()
    expected = gradients(model, model, images)
    start = time.perf_counter()
    values = gradients(model, torch.compile(model, backend=backend), images)
    print(f"{backend}: {time.perf_counter() - start:.1f} s")
    for value, reference in zip(values, expected, strict=True):
        assert (value is None) == (reference is None)
        if value is not None:
            # observed at most 2e-6; deep networks amplify rounding errors
            assert difference(value, reference) < 1e-3


def test_context_gates_compile():
    """BatchNorm's gradient has the layout that the compiler expects."""
    net = convert(torch.nn.Sequential(torch.nn.Conv2d(8, 32, 3, padding=1)), "cgc").eval()
    assert_compiles(net, torch.randn(4, 8, 9, 9), "aot_eager")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_compiles(name, backend):
    """On a core of its own a method takes a minute or less, most of it in the C++ compiler."""
    model = build_model(METHODS[name], num_classes=10).eval()
    assert_compiles(model, torch.randn(4, 3, 32, 32), backend)
