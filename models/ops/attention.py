"""KernelWarehouse's attention in one compiled call, for inference on the CPU.

At small batches every one of its small operations takes longer to call than to compute.
"""

import ctypes
import functools

import torch
from torch import Tensor, nn

from .backends.compiled import compiles, library, run
from .control import is_plain

SOURCE = "attention.cpp"
# samples up to which a product of matrices gains nothing
MOST_SAMPLES = 16


class _Call(ctypes.Structure):
    """The shapes of a call, as `attention.cpp` reads them."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in "samples channels hidden mixtures cells threads".split()),
        *((name, ctypes.c_double) for name in ("norm_epsilon", "epsilon")),
    ]


_call = functools.lru_cache(maxsize=1024)(_Call)


def attend(
    pooled: Tensor,
    fc1: nn.Module,
    norm: nn.Module,
    fc2: nn.Module,
    beta: Tensor | None,
    temperature: Tensor,
    epsilon: float,
    mixtures: int,
) -> Tensor | None:
    """z / (sum |z| + epsilon) of z = fc2(relu(norm(fc1(pooled)))), blended with beta, without the zero cell.

    Args:
        pooled: [B, C].
        fc1, norm, fc2: the layers.
        beta: [m, n + 1], the attention at temperature 1; None if the temperature has no effect.
        temperature: [].
        epsilon: keeps the division finite.
        mixtures: m.

    Returns:
        alpha [B, m, n] in the data type of the layers. None where calling the layers is the only way: when gradients,
        hooks, traces or transformations of functions need them, for many samples, and for other kinds of layers.
    """
    if torch.is_grad_enabled() or not is_plain(pooled) or not pooled.is_cpu or len(pooled) > MOST_SAMPLES:
        return None
    if not (type(fc1) is type(fc2) is nn.Linear and isinstance(norm, nn.BatchNorm1d)) or norm.training:
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in (fc1, norm, fc2)):
        return None
    # attributes of a module take a microsecond each
    first, last, affine, statistics = fc1._parameters, fc2._parameters, norm._parameters, norm._buffers
    matrix, logits, dtype = first["weight"], last["weight"], first["weight"].dtype
    arrays = (
        matrix, statistics["running_mean"], statistics["running_var"], affine["weight"], affine["bias"], logits,
        last["bias"], temperature if beta is None else beta, temperature,
    )  # fmt: skip
    if first["bias"] is not None or not compiles(SOURCE, dtype, "cpu"):
        return None
    if not all(array is not None and array.dtype == dtype and array.is_contiguous() for array in arrays):
        return None
    if pooled.dtype != dtype:
        if not torch.is_autocast_enabled("cpu"):
            return None
        pooled = pooled.to(dtype)
    (batch, channels), (hidden, _), cells = pooled.shape, matrix.shape, logits.shape[0] // mixtures
    call = _call(batch, channels, hidden, mixtures, cells, torch.get_num_threads(), norm.eps, epsilon)
    alpha = pooled.new_empty(batch, mixtures, cells - 1)
    run(library(SOURCE, dtype), "forward", call, pooled.contiguous(), *arrays[:-2], beta, temperature, alpha)
    return alpha
