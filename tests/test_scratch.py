"""Memory that calls of the operator share.  Other tests replace it by fresh memory, to see what is not written."""

import pytest
import torch
from mixture_calls import with_gradients
from tolerance import assert_same

from models.ops import mixture_conv, scratch
from models.ops.backends import BACKENDS, available_backends
from models.ops.geometry import geometry


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kernel", "groups", "size"), [(1, 1, 20), (1, 1, 5), (3, 1, 20), (3, 8, 20)])
def test_the_next_call_changes_no_result(backend, last, dtype, kernel, groups, size, monkeypatch):
    """Memory that successive calls share holds nothing that a call returned."""
    monkeypatch.setattr(scratch, "LENT_BYTES", 0)
    alpha = torch.randn(2, kernel**2 * 2, 3)
    x, cells = torch.randn(2, 8, size, size), torch.randn(3, 4, 8 // groups, 1, 1)
    x = x.to(memory_format=torch.channels_last) if last else x
    arguments = ([kernel] * 2, None, [1, 1], [kernel // 2] * 2, [1, 1], groups)
    tensors = [t.to(dtype).requires_grad_() for t in (x, alpha, cells)]
    geo = geometry(*(t.shape for t in tensors), [kernel] * 2, *arguments[2:], last)
    if backend not in available_backends(geo, dtype, "cpu"):
        pytest.skip("this backend cannot evaluate such a convolution")
    results = with_gradients(mixture_conv, tensors, arguments, backend=backend)
    copies = [result.clone() for result in results]
    others = [(2 * t.detach()).requires_grad_() for t in tensors]
    with_gradients(mixture_conv, others, arguments, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(results, copies, strict=True))


@pytest.fixture
def like(monkeypatch):
    """A tensor for `lent`, which has lent nothing before."""
    monkeypatch.setattr(scratch, "_idle", {})
    return torch.empty(0)


SHAPE = (3, scratch.LENT_BYTES // 8)


def test_memory_is_lent_again_when_nothing_refers_to_it(like):
    first = scratch.lent(SHAPE, like)
    assert first.shape == SHAPE and first.dtype == like.dtype and first.is_contiguous()
    address = first.data_ptr()
    assert scratch.lent(SHAPE, like).data_ptr() != address
    part = first[1:]
    del first
    assert scratch.lent(SHAPE, like).data_ptr() != address, "a view refers to it"
    del part
    again = [scratch.lent(SHAPE, like) for _ in range(3)]
    assert address in {t.data_ptr() for t in again} and len({t.data_ptr() for t in again}) == 3
    smaller = scratch.lent((1, SHAPE[1]), like)
    assert smaller.data_ptr() not in {t.data_ptr() for t in again}


def test_idle_memory_is_bounded(like, monkeypatch):
    monkeypatch.setattr(scratch, "IDLE_BYTES", 2 * 4 * SHAPE[0] * SHAPE[1])
    tensors = [scratch.lent(SHAPE, like) for _ in range(5)]
    tensors.clear()
    assert len(scratch._idle) == 2
    scratch.forget()
    assert not scratch._idle


def test_small_memory_is_not_lent(like):
    scratch.lent((2, 2), like)
    assert not scratch._idle


def test_a_parameter_keeps_its_gradient(like, monkeypatch):
    """Gradients of two layers that share cells, which autograd adds up, and then those of the next step."""
    monkeypatch.setattr(scratch, "LENT_BYTES", 0)
    torch.manual_seed(0)
    cells = torch.randn(3, 4, 4, 1, 1, requires_grad=True)

    def gradient(backend):
        for _ in range(2):
            x, alpha = torch.randn(2, 8, 5, 5), torch.randn(2, 4, 3)
            mixture_conv(
                mixture_conv(x, alpha, cells, 1, backend=backend), alpha, cells, 1, backend=backend
            ).sum().backward()
        kept, cells.grad = cells.grad, None
        return kept

    state = torch.get_rng_state()
    found = [gradient("fused") for _ in range(3)]
    torch.set_rng_state(state)
    for kept in found:
        assert_same(kept, gradient("naive"))
