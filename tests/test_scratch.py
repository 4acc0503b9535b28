"""Memory that calls of the operator share.  Other tests replace it by fresh memory, to see what is not written."""

import pytest
import torch
from mixture_calls import with_gradients

from models.ops import mixture_conv
from models.ops.backends import BACKENDS, available_backends
from models.ops.geometry import geometry


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kernel", "groups", "size"), [(1, 1, 20), (1, 1, 5), (3, 1, 20), (3, 8, 20)])
def test_the_next_call_changes_no_result(backend, last, dtype, kernel, groups, size):
    """Memory that successive calls share holds nothing that a call returned."""
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
