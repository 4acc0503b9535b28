"""The mixture convolution, written as its definition.  Every fast order is tested against this one."""

import torch
import torch.nn.functional as F


def mixture_conv_naive(x, alpha, cells, kernel_size, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Assemble one kernel per sample from shared cells, then convolve (KernelWarehouse, equations 2 and 3).

    Arguments and result are those of `models.ops.mixture_conv`.  The kernel of a sample is cut into
    m = S * Go * Gi cells (positions, output blocks, input blocks, in this order); cell i is sum_j alpha[i, j] cells[j].
    """
    (batch, c_in), spatial = x.shape[:2], x.shape[2:]
    n, c_out_cell, c_in_cell, *k_cell = cells.shape
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(spatial)]

    g_in = c_in // groups // c_in_cell
    g_space = 1
    for k, kc in zip(kernel_size, k_cell, strict=True):
        g_space *= k // kc
    g_out = alpha.shape[1] // (g_space * g_in)

    kernels = torch.einsum("bmn,nc->bmc", alpha, cells.flatten(1))
    kernels = kernels.reshape(batch, g_space, g_out, g_in, c_out_cell, c_in_cell, *k_cell)
    # -> [B, Go, co, Gi, ci, S, *k]: the layout of a convolution's weight
    kernels = kernels.permute(0, 2, 4, 3, 5, 1, *range(6, 6 + len(k_cell)))
    kernels = kernels.reshape(batch * g_out * c_out_cell, c_in // groups, *kernel_size)

    # a grouped convolution over the batch gives every sample its own kernel
    y = conv(x.reshape(1, batch * c_in, *spatial), kernels, None, stride, padding, dilation, batch * groups)
    y = y.reshape(batch, g_out * c_out_cell, *y.shape[2:])
    return y if bias is None else y + bias.reshape(1, -1, *[1] * len(spatial))
