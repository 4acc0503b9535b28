"""The mixture convolution as a registered operator, with the backend chosen per call."""

import functools
import math
from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from .backends import BACKENDS, available_backends
from .backends.triton_support import TritonFailed
from .control import backend_forced, is_plain, tell
from .cost import cheapest
from .geometry import Geometry, geometry, output_size
from .layout import in_layout, is_channels_last
from .naive import mixture_conv_naive
from .portable import portable_mixture_conv


def mixture_conv(
    x: torch.Tensor,
    alpha: torch.Tensor,
    cells: torch.Tensor,
    kernel_size: int | Sequence[int],
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Convolve every sample with its own kernel, mixed from shared cells (KernelWarehouse, equations 2 and 3).

    A kernel [O, C / groups, *kernel_size] is cut into m = T * Go * Gi cells (kernel positions, output blocks, input
    blocks, in this order).

    Args:
        x: [B, C, *S] with one to three spatial dimensions.
        alpha: [B, m, n], the weights of the n cells in each of the m mixtures.
        cells: [n, co, ci, *k], where k is all ones or the kernel size.
        bias: [O] or None.
        backend: a name in `models.ops.backends.BACKENDS`, "naive" for the reference, or "portable" for plain
            operations of PyTorch; all agree up to rounding. By default, the cost model chooses the one that it expects
            to be the fastest.

    Returns:
        [B, O, *S'], with channels innermost in memory if those of x are; under autocast in its data type, unless x is
        in float64, else in that of x.

    Raises:
        ValueError: if the shapes do not fit, or the backend does not exist or cannot evaluate them.
    """
    dims = x.ndim - 2
    kernel_size, stride, padding, dilation = (
        [v] * dims if isinstance(v, int) else list(v) for v in (kernel_size, stride, padding, dilation)
    )
    _check(x, alpha, cells, kernel_size, groups)
    tell("mixture_conv", x, alpha, cells, kernel_size, bias, stride, padding, dilation, groups)
    name = backend or backend_forced() or "auto"
    if name not in (*BACKENDS, "auto", "naive", "portable"):
        raise ValueError(f"there is no backend '{name}'; there are naive, portable, {', '.join(BACKENDS)}")
    # tensors without data, which are used to count operations, have no autocast
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if dtype != torch.float64 and x.dtype == torch.float64:
        dtype = x.dtype
    x, alpha, bias = x.to(dtype), alpha.to(dtype), bias if bias is None else bias.to(dtype)
    if name == "naive":
        return mixture_conv_naive(x, alpha, cells.to(dtype), kernel_size, bias, stride, padding, dilation, groups)
    if name == "portable":
        return portable_mixture_conv(x, alpha, cells.to(dtype), kernel_size, bias, stride, padding, dilation, groups)
    operator, strict = _operator(x, alpha, cells, bias), backend is not None
    return operator(x, alpha, cells, bias, kernel_size, stride, padding, dilation, groups, name, strict)


def _operator(x, alpha, cells, bias):
    """The way to call the operator: with autograd, by PyTorch's dispatcher, or directly.

    Calling the dispatcher takes longer than small layers take to compute.
    """
    tensors = [x, alpha, cells] if bias is None else [x, alpha, cells, bias]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and not torch.compiler.is_compiling():
        return _Differentiable.apply
    return _evaluate if all(map(is_plain, tensors)) else torch.ops.kernelwarehouse.mixture_conv


def _check(x, alpha, cells, kernel_size, groups):
    """Refuse shapes that would otherwise silently give wrong results."""
    n, c_out, c_in, *window = cells.shape
    if len(window) != x.ndim - 2 or len(kernel_size) != x.ndim - 2:
        raise ValueError(f"x {list(x.shape)}, cells {list(cells.shape)} and kernel_size {kernel_size} differ in rank")
    if math.prod(window) != 1 and window != list(kernel_size):
        raise ValueError(f"cells {list(cells.shape)} must be 1 or {kernel_size} wide, like the kernel")
    channels, taps = x.shape[1], math.prod(kernel_size) // math.prod(window)
    if channels % (groups * c_in) or alpha.ndim != 3 or alpha.shape[2] != n:
        raise ValueError(
            f"alpha {list(alpha.shape)} and cells {list(cells.shape)} do not fit x {list(x.shape)} in {groups} groups"
        )
    if alpha.shape[1] % (taps * (channels // groups // c_in)) or alpha.shape[1] * c_out // taps % groups:
        raise ValueError(
            f"{alpha.shape[1]} mixtures of cells {list(cells.shape)} do not make a kernel of size {kernel_size} for "
            f"{channels} channels in {groups} groups"
        )


def _geometry_and_backend(x, alpha, cells, kernel_size, stride, padding, dilation, groups, backend, strict, backward):
    lists = (tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))
    shapes, last = (x.shape, alpha.shape, cells.shape), is_channels_last(x)
    return _plan(*shapes, *lists, groups, last, x.dtype, x.device.type, backend, strict, backward)


@functools.lru_cache(maxsize=4096)
def _plan(
    x_shape,
    alpha_shape,
    cells_shape,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    last,
    dtype,
    device,
    backend,
    strict,
    backward,
) -> tuple[Geometry, str]:
    """Geometry and backend of a call, cached because networks repeat the same calls."""
    geo = geometry(x_shape, alpha_shape, cells_shape, kernel_size, stride, padding, dilation, groups, last)
    available = available_backends(geo, dtype, device)
    if backend not in ("auto", *available):
        if strict:
            raise ValueError(f"backend '{backend}' cannot evaluate this call; available: {', '.join(available)}")
        backend = "auto"
    return geo, cheapest(geo, available, dtype.itemsize, device, backward) if backend == "auto" else backend


def _as_evaluated(cells, x, backend):
    """The cells in the data type that a backend works in.

    Under autocast the operator gets them uncast: if its caller cast them, every layer would keep a copy of its
    warehouse.
    """
    return cells if BACKENDS[backend].casts_cells else cells.to(x.dtype)


def _evaluate(
    x: torch.Tensor,
    alpha: torch.Tensor,
    cells: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    strict: bool,
) -> torch.Tensor:
    arguments = (x, alpha, cells, kernel_size, stride, padding, dilation, groups, backend, strict)
    geo, backend = _geometry_and_backend(*arguments, False)
    if x.shape[0] == 0:
        return x.new_empty(0, geo.c_out, *geo.out)
    try:
        y = BACKENDS[backend].forward(x, alpha, _as_evaluated(cells, x, backend), geo)
    except TritonFailed:
        if strict:
            raise
        _plan.cache_clear()
        geo, backend = _geometry_and_backend(*arguments, False)
        y = BACKENDS[backend].forward(x, alpha, _as_evaluated(cells, x, backend), geo)
    y = in_layout(y, is_channels_last(x))
    # in place, because allocating new memory costs as much as the addition
    return y if bias is None else y.add_(bias.view(-1, *[1] * len(geo.out)))


_mixture_conv = torch.library.custom_op("kernelwarehouse::mixture_conv", _evaluate, mutates_args=())


@_mixture_conv.register_fake
def _(x, alpha, cells, bias, kernel_size, stride, padding, dilation, groups, backend, strict):
    taps = math.prod(kernel_size) // math.prod(cells.shape[3:])
    c_out = alpha.shape[1] // (taps * (x.shape[1] // groups // cells.shape[2])) * cells.shape[1]
    out = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    if is_channels_last(x):
        return x.new_empty(x.shape[0], *out, c_out).movedim(-1, 1)
    return x.new_empty(x.shape[0], c_out, *out)


@torch.library.custom_op("kernelwarehouse::mixture_conv_backward", mutates_args=())
def _mixture_conv_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    alpha: torch.Tensor,
    cells: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    needs: list[bool],
) -> list[torch.Tensor]:
    arguments = (x, alpha, cells, kernel_size, stride, padding, dilation, groups, backend, False)
    geo, backend = _geometry_and_backend(*arguments, True)
    if x.shape[0] == 0:
        return [torch.zeros_like(t) for t, need in zip((x, alpha, cells), needs, strict=True) if need]
    try:
        grads = BACKENDS[backend].backward(dy, x, alpha, _as_evaluated(cells, x, backend), geo, needs)
    except TritonFailed:
        _plan.cache_clear()
        geo, backend = _geometry_and_backend(*arguments, True)
        grads = BACKENDS[backend].backward(dy, x, alpha, _as_evaluated(cells, x, backend), geo, needs)
    result = []
    for grad, like in zip(grads, (x, alpha, cells), strict=True):
        if grad is not None:
            out = torch.empty_like(like)
            result.append(grad if grad.stride() == out.stride() and grad.dtype == out.dtype else out.copy_(grad))
    return result


@_mixture_conv_backward.register_fake
def _(dy, x, alpha, cells, kernel_size, stride, padding, dilation, groups, backend, needs):
    return [torch.empty_like(t) for t, need in zip((x, alpha, cells), needs, strict=True) if need]


def _setup_context(ctx, inputs, output):
    x, alpha, cells, _, *ctx.arguments, _ = inputs
    ctx.save_for_backward(x, alpha, cells)


def _backward(ctx, dy):
    needs = list(ctx.needs_input_grad[:3])
    grads = iter(torch.ops.kernelwarehouse.mixture_conv_backward(dy, *ctx.saved_tensors, *ctx.arguments, needs))
    dbias = dy.sum((0, *range(2, dy.ndim))) if ctx.needs_input_grad[3] else None
    return (*(next(grads) if need else None for need in needs), dbias, *[None] * 7)


_mixture_conv.register_autograd(_backward, setup_context=_setup_context)


def _slices(tensors, dims, count):
    """The tensors of every single call in a vmapped one; `dims` are the mapped dimensions, None for shared tensors."""
    moved = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)]
    return [[t if dim is None else t[i] for t, dim in zip(moved, dims, strict=True)] for i in range(count)]


def _vmap(info, dims, x, alpha, cells, bias, *rest):
    """One call with a larger batch if cells and bias are shared, else one call after the other."""
    count, operator = info.batch_size, torch.ops.kernelwarehouse.mixture_conv
    calls = _slices((x, alpha, cells, bias), dims[:4], count)
    if dims[2] is not None or dims[3] is not None:
        return torch.stack([operator(*tensors, *rest) for tensors in calls]), 0
    x, alpha = (torch.cat([tensors[i] for tensors in calls]) for i in (0, 1))
    return operator(x, alpha, cells, bias, *rest).unflatten(0, (count, -1)), 0


def _vmap_backward(info, dims, dy, x, alpha, cells, *rest):
    """One call after the other, because each has its own gradient of the cells."""
    calls = _slices((dy, x, alpha, cells), dims[:4], info.batch_size)
    results = [torch.ops.kernelwarehouse.mixture_conv_backward(*tensors, *rest) for tensors in calls]
    return [torch.stack(grads) for grads in zip(*results, strict=True)], [0] * len(results[0])


_mixture_conv.register_vmap(_vmap)
_mixture_conv_backward.register_vmap(_vmap_backward)


class _Differentiable(torch.autograd.Function):
    """The operator outside compiled code; has half the overhead of the registered one, and works with torch.func."""

    @staticmethod
    def forward(*arguments):
        # Backends return views of what they compute.  Without `detach`, autograd would forbid changing them in place,
        # which the activation after a convolution may do.
        return torch.ops.kernelwarehouse.mixture_conv(*arguments).detach()

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(once_differentiable(_backward))
    vmap = staticmethod(_vmap)
