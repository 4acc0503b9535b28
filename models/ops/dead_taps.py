"""Positions of a kernel that see nothing but padding, and whose weights oneDNN forgets in bfloat16.

oneDNN (the one of torch 2.12) does not write the gradient of such weights of a strided convolution: it is what was in
the memory before, and training ends in NaN.  The gradient is 0.
"""

import functools

import torch
from torch.overrides import TorchFunctionMode

from .geometry import live_taps, output_size

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


@functools.lru_cache(maxsize=1024)
def dead_taps(spatial, kernel, stride, padding, dilation):
    """A mask [*kernel] of the positions that see only padding; None where there are none.  All arguments are tuples."""
    out = output_size(spatial, kernel, stride, padding, dilation)
    dims = zip(spatial, kernel, stride, padding, dilation, out, strict=True)
    dead = torch.ones(kernel, dtype=torch.bool)
    dead[torch.meshgrid(*(torch.tensor(live_taps(*sizes), dtype=torch.long) for sizes in dims), indexing="ij")] = False
    return dead if dead.any() else None


def convolution_backward(dy, x, weight, arguments, groups, needs):
    """(dx, dweight) of a convolution, each where it is needed.

    arguments: those of `torch.ops.aten.convolution` between the bias and the groups.
    """
    dx, dweight, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *arguments, groups, [*needs, False])
    if needs[1] and x.device.type == "cpu" and x.dtype == torch.bfloat16:
        dead = dead_taps(tuple(x.shape[2:]), tuple(weight.shape[2:]), *map(tuple, arguments[:3]))
        dweight = dweight if dead is None else dweight.masked_fill(dead, 0)
    return dx, dweight


class _Written(torch.autograd.Function):
    """A weight [..., *kernel] as it is, whose gradient is 0 at dead taps."""

    @staticmethod
    def forward(ctx, weight, dead):
        ctx.save_for_backward(dead)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        (dead,) = ctx.saved_tensors
        return gradient.masked_fill(dead, 0), None


class WrittenGradients(TorchFunctionMode):
    """Within it the weights of convolutions of PyTorch have the gradients that they should have on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in CONVOLUTIONS and torch.is_grad_enabled() and len(args) > 1:
            args = self._with_written_weight(CONVOLUTIONS[function], *args)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _with_written_weight(dims, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        rest = bias, stride, padding, dilation, groups
        if isinstance(padding, str):
            # "same" has stride 1, where nothing is forgotten
            return x, weight, *rest
        sizes = [
            (v,) * dims if isinstance(v, int) else tuple(v) * (dims // len(v)) for v in (stride, padding, dilation)
        ]
        dead = dead_taps(tuple(x.shape[-dims:]), tuple(weight.shape[2:]), *sizes)
        return x, weight if dead is None else _Written.apply(weight, dead), *rest
