"""Deterministic state-dict filling, so that two implementations can be compared without shipping weights.

Every tensor is drawn from NumPy's legacy MT19937 stream (stable across NumPy versions), seeded by
crc32(key) ^ seed, and scaled so that activations keep a sane size through a deep network.
"""

import zlib

import numpy as np
import torch


def fill_tensor(key: str, t: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Value for one state-dict entry `key`, of `t`'s shape and dtype."""
    if not t.dtype.is_floating_point:  # num_batches_tracked
        return torch.zeros_like(t)
    rng = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0x7FFFFFFF)
    z = torch.from_numpy(rng.standard_normal(t.numel()).astype(np.float32)).reshape(t.shape)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return 1.0 + 0.1 * z.abs()
    if leaf in ("running_mean", "bias", "basis_bias"):
        return 0.1 * z
    if leaf == "gamma":
        return 0.1 * z
    if t.ndim == 1:  # norm weights
        return 1.0 + 0.1 * z
    if ".weights." in "." + key:  # warehouse cells: (n, c_out, c_in, *k)
        return z * (2.0 * t.shape[0] / (t.shape[2] * 9)) ** 0.5
    fan_in = int(np.prod(t.shape[2:] if t.ndim == 5 else t.shape[1:]))  # 5-D: (kernels, c_out, c_in, k, k)
    return z * (2.0 / fan_in) ** 0.5


def fill_(state_dict: dict, seed: int = 0) -> dict:
    """A new dict with the same keys, every tensor replaced by its deterministic value."""
    return {k: fill_tensor(k, v, seed) for k, v in state_dict.items()}


def make_input(shape, seed: int = 0) -> torch.Tensor:
    """Images (B, C, H, W): noise, with a mean and a contrast of its own for every sample and channel."""
    rng = np.random.RandomState(1234 + seed)
    b, c, h, w = shape
    noise = rng.standard_normal((b, c, h, w))
    mean = 2.0 * rng.standard_normal((b, c, 1, 1))
    contrast = np.exp(rng.standard_normal((b, c, 1, 1)))
    ramp = np.linspace(-1, 1, h)[:, None] * rng.standard_normal((b, c, 1, 1)) + np.linspace(
        -1, 1, w
    ) * rng.standard_normal((b, c, 1, 1))
    return torch.from_numpy((mean + contrast * (0.5 * noise + ramp)).astype(np.float32))
