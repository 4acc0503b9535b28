"""Random calls of the mixture convolution, and what its definition gives for them in double precision."""

import math
import random

import torch

from models.ops import mixture_conv_naive


def make_call(seed, dtype=torch.float64, backend=None):
    """A random call that is valid, and of the kind that a backend is for: inputs and the arguments after them."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    while True:
        dims = rng.choice([1, 2, 2, 2, 3])
        groups, c_in, g_in = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3, 7]), rng.choice([1, 2, 3])
        c_out, g_out = rng.choice([1, 2, 3, 5]), groups * rng.choice([1, 2])
        if rng.random() < 0.3:
            # a cell over all groups, as in depth-wise convolutions
            c_out, g_out = groups * rng.choice([1, 2]), 1
        if backend == "depthwise":
            dims, groups, c_in, g_in = min(dims, 2), rng.choice([1, 2, 6, 19]), 1, 1
            c_out, g_out = rng.choice([(1, groups), (1, 2 * groups), (groups, 1), (groups, 2)])
        elif backend == "outputs":
            g_in, g_out = 1, groups * rng.choice([1, 2])
        kernel = [1 if backend == "pointwise" else rng.choice([1, 2, 3, 5]) for _ in range(dims)]
        stride = [rng.choice([1, 1, 2, 3]) for _ in range(dims)]
        padding = [0 if backend == "pointwise" else rng.choice([0, 1, 2]) for _ in range(dims)]
        dilation = [rng.choice([1, 1, 2, 3]) for _ in range(dims)]
        size = [rng.choice([1, 2, 3, 5, 7]) for _ in range(dims)]
        if backend == "winograd":
            g_out, size = groups * rng.choice([1, 2]), [rng.choice([2, 3, 4, 5, 7, 10]) for _ in range(2)]
            kernel, stride, dilation, padding = [3] * 2, [1] * 2, [1] * 2, [rng.choice([0, 1, 2]) for _ in range(2)]
            dims = 2
        reach = [s + 2 * p - d * (k - 1) for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
        if min(reach) > 0 and math.prod(size) * math.prod(kernel) < 4000:
            break
    window = [1] * dims if backend == "winograd" or (rng.random() < 0.7 and backend != "outputs") else kernel
    taps = math.prod(kernel) // math.prod(window)
    batch, n = rng.choice([1, 2, 3, 9]), rng.choice([1, 3, 6])

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(batch, groups * g_in * c_in, *size)
    if rng.random() < 0.4:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    tensors = x, normal(batch, taps * g_out * g_in, n), normal(n, c_out, c_in, *window)
    bias = normal(g_out * c_out).requires_grad_() if rng.random() < 0.5 else None
    return [t.requires_grad_() for t in tensors], (kernel, bias, stride, padding, dilation, groups)


def with_gradients(function, tensors, arguments, **kwargs):
    y = function(*tensors, *arguments, **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    bias = arguments[1] if len(arguments) > 1 else None
    return [y, *torch.autograd.grad(y, tensors if bias is None else [*tensors, bias], dy)]


def definition(tensors, arguments):
    """Output and gradients by the definition in double precision."""
    kernel, bias, *rest = arguments
    exact = [t.detach().double().requires_grad_() for t in tensors]
    bias = bias if bias is None else bias.detach().double().requires_grad_()
    return with_gradients(mixture_conv_naive, exact, (kernel, bias, *rest))
