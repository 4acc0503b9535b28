"""How far apart two computations of the same thing may be, in one place."""

import torch

# relative to the largest value of the reference; observed at most 4e-16, 1.5e-6, 8e-3 and 1e-3 in tests/test_ops.py
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

# of a whole network's logits in float64, relative to their standard deviation; observed at most 4e-9, which is how
# the recorded numbers were rounded
NETWORK = 1e-6


def difference(value, reference):
    """Largest difference, relative to the largest value of the reference."""
    assert value.shape == reference.shape, f"{list(value.shape)} is not {list(reference.shape)}"
    if not reference.numel():
        return 0.0
    value, reference = value.detach(), reference.detach()
    error = (value.double() - reference.double()).abs().max()
    assert torch.isfinite(error), "not finite"
    return float(error / reference.double().abs().max().clamp_min(1e-30))


def assert_same(value, reference, dtype=None):
    """Fails where the two differ by more than dtype (the value's by default) allows."""
    limit = RELATIVE[dtype or value.dtype]
    error = difference(value, reference)
    assert error <= limit, f"differs by {error:.2e}, more than {limit:.0e}"
