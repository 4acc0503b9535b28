"""KernelWarehouse's attention in one compiled call computes what its layers do, or leaves it to them."""

import pytest
import torch
from tolerance import assert_same
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from models.methods.kernel_warehouse.layer import KWAttention
from models.ops import attention
from models.ops.backends import compiled
from models.ops.control import forced_backend


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory):
    """Numbers that are read before they are written are NaN."""


@pytest.fixture
def calls(monkeypatch):
    """The names of the compiled functions that were called."""
    names = []

    def run(functions, name, *arrays):
        names.append(name)
        return compiled.run(functions, name, *arrays)

    monkeypatch.setattr(attention, "run", run)
    return names


def make(channels=40, m=3, n=5, dtype=torch.float64, **settings):
    module = KWAttention(channels, torch.rand(m, n + 1), (0, m), **settings).to(dtype).eval()
    with torch.no_grad():
        for tensor in (*module.parameters(), module.norm1.running_mean, module.norm1.running_var):
            tensor.add_(torch.rand_like(tensor))
    return module


def by_layers(module, pooled):
    """alpha by the layers, which are called where gradients are needed."""
    with torch.enable_grad():
        return module(pooled).detach()


# channels, hidden units over channels, m, n: all lengths around whole vectors, and matrices for several threads
SHAPES = [
    (1, 1.0, 1, 1),
    (16, 1.0, 2, 15),
    (17, 1.0, 3, 16),
    (160, 1 / 16, 6, 58),
    (400, 1 / 16, 1, 33),
    (300, 1.0, 9, 40),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_layers(shape, temperature, dtype, calls):
    channels, reduction, m, n = shape
    module = make(channels, m, n, dtype, reduction=reduction)
    module.temperature.fill_(temperature)
    for batch in (1, 3):
        pooled = torch.randn(batch, channels, dtype=dtype)
        with torch.no_grad():
            assert_same(module(pooled), by_layers(module, pooled))
    assert calls == ["forward"] * 2


def test_without_a_temperature(calls):
    module, pooled = make(use_temperature=False), torch.randn(2, 40, dtype=torch.float64)
    with torch.inference_mode():
        alpha = module(pooled)
    assert_same(alpha, by_layers(module, pooled))
    assert calls == ["forward"]


def test_does_not_depend_on_the_number_of_threads(calls):
    module, pooled, results = make(2048, 9, 47, torch.float32), torch.randn(1, 2048), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        with torch.no_grad():
            results.append(module(pooled))
    assert len(calls) == 4
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_not_finite_stays_not_finite(calls):
    module, pooled = make(), torch.full((1, 40), float("nan"), dtype=torch.float64)
    with torch.no_grad():
        assert module(pooled).isnan().all()
    assert calls == ["forward"]


def test_autocast_keeps_the_data_type_of_the_layers(calls):
    module, pooled = make(dtype=torch.float32), torch.randn(2, 40).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alpha = module(pooled)
    assert alpha.dtype == torch.float32
    assert_same(alpha, by_layers(module, pooled.float()))
    assert calls == ["forward"]


def test_one_that_needs_its_layers_calls_them(calls):
    """Gradients, training, hooks, traces, transformations and other settings need the layers themselves."""
    module, pooled = make(), torch.randn(2, 40, dtype=torch.float64)
    expected = by_layers(module, pooled)
    with torch.no_grad():
        for part in (module.fc1, module.norm1, module.fc2):
            seen = []
            handle = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            assert_same(module(pooled), expected)
            handle.remove()
            assert seen
        with forced_backend("portable"):
            assert_same(module(pooled), expected)
        assert_same(torch.vmap(module)(pooled.unsqueeze(1)).squeeze(1), expected)
        assert "addmm" in make_fx(module)(pooled).code
        assert module(torch.randn(attention.MOST_SAMPLES + 1, 40, dtype=torch.float64)).isfinite().all()
        for settings in ({"norm": "layer"}, {"attention_function": "softmax"}, {"nonlocal_basis_ratio": 0.5}):
            other = KWAttention(40, torch.rand(3, 41), (0, 3), **settings).double().eval()
            assert_same(other(pooled), by_layers(other, pooled))
        module.train()
        module(pooled)
        module.eval()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert module(mode.from_tensor(pooled)).shape == (2, 3, 5)
    assert calls == []
