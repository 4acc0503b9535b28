"""The backend "triton_fused" on NVIDIA GPUs, for small maps: tiles of kernels are mixed where they are multiplied."""

from . import triton_calls

CASTS_CELLS = False
available = triton_calls.available


def forward(x, alpha, cells, geo):
    """Mix tiles of kernels and multiply by them at once."""
    return triton_calls.forward(triton_calls.Call.mix_and_convolve, x, alpha, cells, geo)


def backward(dy, x, alpha, cells, geo, needs):
    """Gradients of `forward`; the kernels are mixed again."""
    return triton_calls.backward(triton_calls.Call.mix_and_convolve, dy, x, alpha, cells, geo, needs)
