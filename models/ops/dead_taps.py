"""Dead taps, which are kernel positions that see only padding: oneDNN does not write their gradients in bfloat16.

For such weights of a strided convolution, oneDNN (the version in torch 2.12) leaves the gradient uninitialised, and
training ends in NaN.  The correct gradient is 0.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .geometry import live_taps, output_size

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


@functools.lru_cache(maxsize=1024)
def dead_taps(
    spatial: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor | None:
    """A mask [*kernel] of the positions that see only padding; None if there are none."""
    out = output_size(spatial, kernel, stride, padding, dilation)
    dims = zip(spatial, kernel, stride, padding, dilation, out, strict=True)
    dead = torch.ones(kernel, dtype=torch.bool)
    dead[torch.meshgrid(*(torch.tensor(live_taps(*sizes), dtype=torch.long) for sizes in dims), indexing="ij")] = False
    return dead if dead.any() else None


def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, arguments: Sequence, groups: int, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and the weight of a convolution, each None unless needed.

    Args:
        dy: gradient of the output, [B, O, *S'].
        x: [B, C, *S].
        weight: [O, C / groups, *kernel].
        arguments: those of `torch.ops.aten.convolution` between the bias and the groups.
        needs: whether the input and the weight need a gradient.
    """
    dx, dweight, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *arguments, groups, [*needs, False])
    if needs[1] and x.device.type == "cpu" and x.dtype == torch.bfloat16:
        dead = dead_taps(tuple(x.shape[2:]), tuple(weight.shape[2:]), *map(tuple, arguments[:3]))
        dweight = dweight if dead is None else dweight.masked_fill(dead, 0)
    return dx, dweight


class _Written(torch.autograd.Function):
    """Return a weight [..., *kernel] unchanged, and set its gradient to 0 at dead taps."""

    @staticmethod
    def forward(ctx, weight, dead):
        ctx.save_for_backward(dead)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        (dead,) = ctx.saved_tensors
        return gradient.masked_fill(dead, 0), None


class WrittenGradients(TorchFunctionMode):
    """Context in which the weights of PyTorch's convolutions get their correct gradients on the CPU: 0 at dead taps."""

    def __torch_function__(
        self, function: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in CONVOLUTIONS and torch.is_grad_enabled():
            args, kwargs = self._with_written_weight(CONVOLUTIONS[function], *args, **kwargs), {}
        return function(*args, **kwargs)

    @staticmethod
    def _with_written_weight(dims, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        """All arguments of a convolution, which may be given by PyTorch's names for them."""
        if not isinstance(padding, str):
            sizes = [
                (v,) * dims if isinstance(v, int) else tuple(v) * (dims // len(v)) for v in (stride, padding, dilation)
            ]
            dead = dead_taps(tuple(input.shape[-dims:]), tuple(weight.shape[2:]), *sizes)
            weight = weight if dead is None else _Written.apply(weight, dead)
        # else nothing is forgotten: "same" requires stride 1, and "valid" has no padding
        return input, weight, bias, stride, padding, dilation, groups
