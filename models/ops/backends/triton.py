"""The backend "triton" on NVIDIA GPUs: kernels are assembled in the layout of the convolution that then reads them."""

from . import triton_calls

CASTS_CELLS = False
available = triton_calls.available


def _convolve(call, source, alpha, cells, target, forward):
    for a, b in call.pieces(source.element_size()):
        call.convolve(source[a:b], call.assemble(alpha[a:b], cells), target[a:b], forward)


def forward(x, alpha, cells, geo):
    """Assemble kernels, then convolve every sample with its own."""
    return triton_calls.forward(_convolve, x, alpha, cells, geo)


def backward(dy, x, alpha, cells, geo, needs):
    """Gradients of `forward`; the kernels are assembled again."""
    return triton_calls.backward(_convolve, dy, x, alpha, cells, geo, needs)
