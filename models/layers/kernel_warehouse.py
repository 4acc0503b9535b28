"""KernelWarehouse layers: drop-in replacements of convolutions and linear layers (Li and Yao, ICML 2024).

Shapes: x is [B, C, *S] (KWLinear: [B, ..., C]), alpha [B, m, n], cells [n, co, ci, *k]; see `warehouse.py`.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import mixture_conv
from .warehouse import Warehouse

ATTENTION_FUNCTIONS = ("caf", "softmax", "sigmoid", "relu")


class KWAttention(nn.Module):
    """Attentions alpha of every mixture of a layer to every cell of its warehouse (equation 4, section A.3).

    Pooled input [B, C] -> FC -> norm -> ReLU -> FC -> z [B, m, n + 1] -> attention function; the last entry is the
    zero cell, which takes part in the normalisation only.  attention_function: "caf" (z / sum |z|), or those of
    Table 8: "softmax", "sigmoid", "relu" (max(z, 0) / sum |z|).
    nonlocal_basis_ratio < 1 predicts the logits of the cells of other layers from a smaller basis.
    cell_sharing=False gives a mixture no cell but its own and the zero cell (Table 6, "without sharing"; b = 1 only).
    """

    def __init__(
        self,
        in_channels,
        beta,
        own_cells,
        *,
        reduction=1 / 16,
        norm="batch",
        attention_function="caf",
        use_temperature=True,
        nonlocal_basis_ratio=1.0,
        cell_sharing=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if attention_function not in ATTENTION_FUNCTIONS:
            raise ValueError(
                f"unknown attention_function '{attention_function}', choose from {', '.join(ATTENTION_FUNCTIONS)}"
            )
        if norm not in ("batch", "layer"):
            raise ValueError(f"unknown norm '{norm}' of the attention, choose 'batch' or 'layer'")
        kwargs = {"device": device, "dtype": dtype}
        self.m, self.n = beta.shape[0], beta.shape[1] - 1
        self.own_cells, self.attention_function = own_cells, attention_function
        hidden = max(int(in_channels * reduction), 16)
        self.fc1 = nn.Linear(in_channels, hidden, bias=norm == "layer", **kwargs)
        self.norm1 = (nn.BatchNorm1d if norm == "batch" else nn.LayerNorm)(hidden, **kwargs)
        # without sharing: the two cells [m, 2] of every mixture
        own = None if cell_sharing else self._own_cell_of_each(device)
        self.register_buffer("only", own, persistent=False)
        logits = self.m * (self.n + 1 if cell_sharing else 2)
        if nonlocal_basis_ratio >= 1.0 or not cell_sharing:
            self.basis = 0
            self.fc2 = nn.Linear(hidden, logits, **kwargs)
        else:
            own = own_cells[1] - own_cells[0]
            self.basis = max(int((self.n - own) * nonlocal_basis_ratio), 16)
            self.fc2 = nn.Linear(hidden, self.m * (own + self.basis + 1), bias=False, **kwargs)
            self.fc3 = nn.Linear(self.basis, self.n - own, bias=False, **kwargs)
            self.basis_bias = nn.Parameter(torch.zeros(logits, **kwargs))
        # neither is part of the state_dict, as in released checkpoints: beta follows from the plan, the temperature
        # from the training schedule
        self.register_buffer("beta", beta.to(**kwargs) if use_temperature else None, persistent=False)
        self.register_buffer("temperature", torch.zeros((), **kwargs), persistent=False)
        self.reset_parameters()

    def _own_cell_of_each(self, device):
        first, last = self.own_cells
        if last - first != self.m:
            raise ValueError(
                f"cell_sharing false needs one cell for every mixture, not {last - first} for {self.m}; "
                "use cell_num_ratio 1"
            )
        own = torch.arange(first, last, device=device)
        return torch.stack([own, torch.full_like(own, self.n)], dim=1)

    def reset_parameters(self):
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            elif name != "norm1.weight":
                nn.init.zeros_(parameter)

    def logits(self, pooled):
        """z [B, m, n + 1] of pooled inputs [B, C]."""
        hidden = self.fc1(pooled)
        if self.norm1.training and pooled.shape[0] == 1 and type(self.norm1) is nn.BatchNorm1d:
            hidden = self._normalise_single(hidden)
        else:
            hidden = self.norm1(hidden)
        z = self.fc2(F.relu(hidden))
        if self.basis:
            first, last = self.own_cells
            own, basis, zero = z.view(-1, self.m, z.shape[1] // self.m).split([last - first, self.basis, 1], dim=2)
            other = self.fc3(basis)
            z = torch.cat([other[..., :first], own, other[..., first:], zero], dim=2)
            z = z + self.basis_bias.view(self.m, self.n + 1)
        if self.only is not None:
            # cells of other mixtures get logits that every attention function turns into 0
            fill = 0.0 if self.attention_function in ("caf", "relu") else float("-inf")
            z = z.view(-1, self.m, 2)
            return z.new_full((len(z), self.m, self.n + 1), fill).scatter(2, self.only.expand_as(z), z)
        return z.view(-1, self.m, self.n + 1)

    def _normalise_single(self, hidden):
        """The norm's running statistics, since the statistics of a single sample are degenerate."""
        if not torch.compiler.is_compiling():
            warnings.warn(
                "a batch of one sample in train mode: the attention's BatchNorm uses its running statistics",
                stacklevel=2,
            )
        norm = self.norm1
        return F.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)

    def forward(self, pooled):
        """alpha [B, m, n] of pooled inputs [B, C]."""
        z = self.logits(pooled)
        if self.attention_function == "softmax":
            alpha = z.softmax(dim=2)
        elif self.attention_function == "sigmoid":
            alpha = z.sigmoid()
        else:
            # 1e-3 keeps the division finite; it is part of the released models
            total = z.abs().sum(dim=2, keepdim=True) + 1e-3
            alpha = (z if self.attention_function == "caf" else z.relu()) / total
        if self.beta is not None:
            alpha = torch.lerp(alpha, self.beta.to(alpha.dtype), self.temperature.to(alpha.dtype))
        return alpha[..., : self.n]

    def extra_repr(self):
        return f"m={self.m}, n={self.n}, attention_function={self.attention_function}"


class _KWLayer(nn.Module):
    """What convolutions and linear layers share: a warehouse, an attention, a bias."""

    def _setup(
        self,
        in_channels,
        kernel_shape,
        bias,
        warehouse,
        layer,
        device,
        dtype,
        *,
        attention_init="one-to-one",
        **attention,
    ):
        if warehouse is None:
            warehouse = Warehouse({"": kernel_shape}, device=device, dtype=dtype)
            self.own_warehouse, layer = warehouse, ""
        if warehouse.kernels.get(layer) != tuple(kernel_shape):
            raise ValueError(
                f"warehouse '{warehouse.name}' was made for {warehouse.kernels}, not for a layer '{layer}' with a "
                f"kernel of {list(kernel_shape)}; name that layer and its kernel when making the warehouse"
            )
        # a shared warehouse is registered at the root of the model, and nowhere else
        object.__setattr__(self, "_warehouse", warehouse)
        self.layer = layer
        self.attention = KWAttention(
            in_channels,
            warehouse.initial_attention(layer, attention_init),
            warehouse.own_cells(layer),
            use_temperature=attention_init != "none",
            device=device,
            dtype=dtype,
            **attention,
        )
        self.bias = nn.Parameter(torch.zeros(kernel_shape[0], device=device, dtype=dtype)) if bias else None

    @property
    def warehouse(self):
        """The warehouse that this layer takes its cells from."""
        return self._warehouse

    def set_temperature(self, temperature):
        """tau of equation 4, from 1 (each mixture is its own cell) to 0 (attention alone)."""
        self.attention.temperature.fill_(temperature)


def _pool(x, dim):
    """Mean over positions.  The gradient of a sum is a view where that of a mean is a tensor as large as x."""
    if x.dtype == torch.float16:
        # the sum could overflow
        return x.mean(dim)
    return x.sum(dim) / x.shape[dim]


def _tuple(value, dims, what):
    value = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(value) != dims:
        raise ValueError(f"{what} {value} needs {dims} numbers")
    return value


class _KWConvNd(_KWLayer):
    dims = None

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        *,
        warehouse=None,
        layer="",
        device=None,
        dtype=None,
        **attention,
    ):
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups {groups} must divide in_channels {in_channels} and out_channels {out_channels}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _tuple(kernel_size, self.dims, "kernel_size")
        self.stride, self.dilation = _tuple(stride, self.dims, "stride"), _tuple(dilation, self.dims, "dilation")
        if padding == "valid":
            padding = 0
        elif padding == "same":
            sizes = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            if any(s != 1 for s in self.stride) or any(size % 2 for size in sizes):
                raise ValueError("padding 'same' needs stride 1 and odd kernels; give the padding in numbers")
            padding = [size // 2 for size in sizes]
        self.padding = _tuple(padding, self.dims, "padding")
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self._setup(in_channels, shape, bias, warehouse, layer, device, dtype, **attention)

    def forward(self, x):
        alpha = self.attention(_pool(x.flatten(2), dim=2))
        y = mixture_conv(
            x,
            alpha,
            self._warehouse.cells,
            self.kernel_size,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        return y

    def extra_repr(self):
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", 0), ("dilation", 1), ("groups", 1)):
            if getattr(self, name) not in (default, (default,) * self.dims):
                text += f", {name}={getattr(self, name)}"
        return f"{text}, bias={self.bias is not None}, warehouse={self._warehouse.name}"


class KWConv1d(_KWConvNd):
    """`nn.Conv1d` whose kernel is mixed per sample from a warehouse: [B, C_in, L] -> [B, C_out, L'].

    warehouse: a `Warehouse` that was made for a kernel [C_out, C_in / groups, *K] named `layer`, registered by the
    caller (once, at the root of the model); None gives the layer one of its own.  attention: `attention_init` (see
    `Warehouse.initial_attention`), and of `KWAttention` reduction, norm, attention_function, nonlocal_basis_ratio and
    cell_sharing.  Raises ValueError for sizes that do not fit.
    """

    dims = 1


class KWConv2d(_KWConvNd):
    """`nn.Conv2d` whose kernel is mixed per sample from a warehouse: [B, C_in, H, W] -> [B, C_out, H', W'].

    Arguments and errors as for `KWConv1d`.
    """

    dims = 2


class KWConv3d(_KWConvNd):
    """`nn.Conv3d` whose kernel is mixed per sample from a warehouse: [B, C_in, D, H, W] -> [B, C_out, D', H', W'].

    Arguments and errors as for `KWConv1d`.
    """

    dims = 3


class KWLinear(_KWLayer):
    """`nn.Linear` whose matrix is mixed per sample from a warehouse: [B, ..., C_in] -> [B, ..., C_out].

    The attention pools over all dimensions between the first and the last.  Its kernel is [C_out, C_in, 1].
    The other arguments and errors are those of `KWConv1d`.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        *,
        warehouse=None,
        layer="",
        device=None,
        dtype=None,
        **attention,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features, 1)
        self._setup(in_features, shape, bias, warehouse, layer, device, dtype, **attention)

    def forward(self, x):
        tokens = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        alpha = self.attention(_pool(tokens, dim=1))
        y = mixture_conv(tokens.transpose(1, 2), alpha, self._warehouse.cells, (1,), self.bias)
        return y.transpose(1, 2).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, warehouse={self._warehouse.name}"
        )
