"""The mixture convolution, written as its definition.  Every backend is tested against this one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .sample_conv import grouped_sample_conv


def mixture_conv_naive(
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    kernel_size: Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Assemble one kernel per sample from shared cells, then convolve (KernelWarehouse, equations 2 and 3).

    Arguments and result are those of `models.ops.mixture_conv`.  The kernel of a sample is cut into m = T * Go * Gi
    cells (kernel positions, output blocks, input blocks, in this order); cell i is sum_j alpha[i, j] cells[j].
    """
    batch, c_in = x.shape[:2]
    n, c_out_cell, c_in_cell, *k_cell = cells.shape

    g_in = c_in // groups // c_in_cell
    g_space = 1
    for k, kc in zip(kernel_size, k_cell, strict=True):
        g_space *= k // kc
    g_out = alpha.shape[1] // (g_space * g_in)

    kernels = torch.einsum("bmn,nc->bmc", alpha, cells.flatten(1))
    kernels = kernels.reshape(batch, g_space, g_out, g_in, c_out_cell, c_in_cell, *k_cell)
    # -> [B, Go, co, Gi, ci, T, *k]: the layout of a convolution's weight
    kernels = kernels.permute(0, 2, 4, 3, 5, 1, *range(6, 6 + len(k_cell)))
    kernels = kernels.reshape(batch, g_out * c_out_cell, c_in // groups, *kernel_size)
    return grouped_sample_conv(x, kernels, bias, stride, padding, dilation, groups)
