"""KernelWarehouse layers: drop-in replacements of convolutions and linear layers (Li and Yao, ICML 2024).

Shapes: x is [B, C, *S] (KWLinear: [B, ..., C]), alpha [B, m, n], cells [n, co, ci, *k]; see `warehouse.py`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import mixture_conv, with_bias
from ...ops.attention import attend
from ..attention_functions import EPSILON, Annealed, total
from ..layer import AttentionNorm, Conv1d, Conv2d, Conv3d, Linear, check_choice, global_pool, hidden_width, scaled
from ..odconv import ODHeads
from .warehouse import STATIC, Warehouse

ATTENTION_FUNCTIONS = ("caf", "softmax", "sigmoid", "relu")


class KWAttention(nn.Module):
    """Attentions alpha of every mixture of a layer to every cell of its warehouse (equation 4, section A.3).

    Pooled input [B, C] -> FC -> norm -> ReLU -> FC -> z [B, m, n + 1] -> attention function. The last entry of z is the
    zero cell, which only takes part in the normalisation.

    Args:
        in_channels: C.
        beta: initial attention [m, n + 1] (`Warehouse.initial_attention`).
        own_cells: range (first, last + 1) of the layer's own cells (`Warehouse.own_cells`).
        reduction: hidden width over C; the hidden layer is at least 16 wide.
        norm: "batch" or "layer".
        attention_function: "caf" (z / sum |z|), or one of Table 8: "softmax", "sigmoid", "relu" (max(z, 0) / sum |z|).
        use_temperature: whether the temperature blends alpha with beta.
        is_constant: start with the attention beta for every input and at every temperature (for "caf" alone).
        nonlocal_basis_ratio: below 1, the logits of other layers' cells are predicted from a smaller basis.
        cell_sharing: if false, a mixture has only its own cell and the zero cell (Table 6, "without sharing"; this
            needs b = 1).

    Raises:
        ValueError: for settings that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        beta: Tensor,
        own_cells: tuple[int, int],
        *,
        reduction: float = 1 / 16,
        norm: str = "batch",
        attention_function: str = "caf",
        use_temperature: bool = True,
        is_constant: bool = False,
        nonlocal_basis_ratio: float = 1.0,
        cell_sharing: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("attention_function", [attention_function], ATTENTION_FUNCTIONS)
        check_choice("norm", [norm], ("batch", "layer"))
        kwargs = {"device": device, "dtype": dtype}
        self.m, self.n = beta.shape[0], beta.shape[1] - 1
        self.own_cells, self.attention_function = own_cells, attention_function
        hidden = hidden_width(in_channels, reduction, 16)
        self.fc1 = nn.Linear(in_channels, hidden, bias=norm == "layer", **kwargs)
        self.norm1 = (AttentionNorm if norm == "batch" else nn.LayerNorm)(hidden, **kwargs)
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
        # neither is in the state dict, as in released checkpoints: the plan determines beta, and the training schedule
        # the temperature
        self.register_buffer("beta", beta.to(**kwargs) if use_temperature else None, persistent=False)
        self.register_buffer("temperature", torch.zeros((), **kwargs), persistent=False)
        self.reset_parameters()
        if is_constant:
            if attention_function != "caf":
                raise ValueError(f"attention_init 'static' is for attention_function 'caf', not '{attention_function}'")
            self.hold(beta)

    @torch.no_grad()
    def hold(self, alpha: Tensor) -> None:
        """Start with a constant attention alpha [m, n + 1], the zero cell last, of which |alpha| adds up to `STATIC`.

        The last layer starts with zero weights, so that its logits are its biases; it still learns. The attentions are
        equal to the logits, since the sum of |z| and `EPSILON`, by which these are divided, is 1.
        """
        z = alpha.to(self.fc2.weight)
        if self.only is not None:
            z = z.gather(1, self.only)
        self.fc2.weight.zero_()
        (self.basis_bias if self.basis else self.fc2.bias).copy_(z.flatten())
        if self.beta is not None:
            self.beta.copy_(alpha)

    def _own_cell_of_each(self, device: torch.device | str | None) -> Tensor:
        first, last = self.own_cells
        if last - first != self.m:
            raise ValueError(
                f"cell_sharing false needs one cell for every mixture, not {last - first} for {self.m}; "
                "use cell_num_ratio 1"
            )
        own = torch.arange(first, last, device=device)
        return torch.stack([own, torch.full_like(own, self.n)], dim=1)

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            elif name != "norm1.weight":
                nn.init.zeros_(parameter)

    def hidden(self, pooled: Tensor) -> Tensor:
        """[B, H] of pooled inputs [B, C]."""
        return F.relu(self.norm1(self.fc1(pooled)))

    def _logits(self, hidden: Tensor) -> Tensor:
        """z [B, m, n + 1] of hidden vectors [B, H]."""
        z = self.fc2(hidden)
        if self.basis:
            first, last = self.own_cells
            own, basis, zero = z.view(-1, self.m, z.shape[1] // self.m).split([last - first, self.basis, 1], dim=2)
            other = self.fc3(basis)
            z = torch.cat([other[..., :first], own, other[..., first:], zero], dim=2)
            z = z + self.basis_bias.view(self.m, self.n + 1)
        if self.only is not None:
            # the cells of other mixtures get a logit that the attention function maps to 0
            fill = 0.0 if self.attention_function in ("caf", "relu") else float("-inf")
            z = z.view(-1, self.m, 2)
            return z.new_full((z.shape[0], self.m, self.n + 1), fill).scatter(2, self.only.expand_as(z), z)
        return z.view(-1, self.m, self.n + 1)

    def forward(self, pooled: Tensor, hidden: Tensor | None = None) -> Tensor:
        """alpha [B, m, n] of pooled inputs [B, C], of which the hidden vectors [B, H] may be known already."""
        if hidden is None and self.attention_function == "caf" and not self.basis and self.only is None:
            layers = self.fc1, self.norm1, self.fc2
            alpha = attend(pooled, *layers, self.beta, self.temperature, EPSILON, self.m)
            if alpha is not None:
                return alpha
        z = self._logits(self.hidden(pooled) if hidden is None else hidden)
        if self.attention_function == "softmax":
            alpha = z.softmax(dim=2)
        elif self.attention_function == "sigmoid":
            alpha = z.sigmoid()
        else:
            alpha = (z if self.attention_function == "caf" else z.relu()) / total(z, dim=2)
        if self.beta is not None:
            alpha = torch.lerp(alpha, self.beta.to(alpha.dtype), self.temperature.to(alpha.dtype))
        return alpha[..., : self.n]

    def extra_repr(self) -> str:
        return f"m={self.m}, n={self.n}, attention_function={self.attention_function}"


def attention_size(
    channels: int,
    m: int,
    n: int,
    *,
    own: int = 0,
    reduction: float = 1 / 16,
    norm: str = "batch",
    nonlocal_basis_ratio: float = 1.0,
    cell_sharing: bool = True,
) -> int:
    """The number of parameters of a `KWAttention`, without making one.

    Args:
        channels: of the layer's input.
        m: mixtures of the layer.
        n: cells of the warehouse.
        own: number of the layer's own cells.
        reduction, norm, nonlocal_basis_ratio, cell_sharing: as for `KWAttention`.
    """
    hidden = hidden_width(channels, reduction, 16)
    first = (channels + 2) * hidden + (hidden if norm == "layer" else 0)
    logits = m * (n + 1 if cell_sharing else 2)
    if nonlocal_basis_ratio >= 1.0 or not cell_sharing:
        return first + (hidden + 1) * logits
    basis = max(int((n - own) * nonlocal_basis_ratio), 16)
    return first + hidden * m * (own + basis + 1) + basis * (n - own) + logits


class _KWLayer(Annealed):
    """A kernel mixed from the cells of a warehouse."""

    def _setup(
        self,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bias: bool,
        *,
        warehouse: Warehouse | None = None,
        layer: str = "",
        attention_init: str = "one-to-one",
        attentions: Sequence[str] = (),
        **attention: Any,
    ) -> None:
        if warehouse is None:
            warehouse = Warehouse({"": self.kernel_shape}, device=device, dtype=dtype)
            self.own_warehouse, layer = warehouse, ""
        if warehouse.kernels.get(layer) != self.kernel_shape:
            raise ValueError(
                f"warehouse '{warehouse.name}' was made for {warehouse.kernels}, not for a layer '{layer}' with a "
                f"kernel of {list(self.kernel_shape)}; name that layer and its kernel when making the warehouse"
            )
        # only the root of the model registers a shared warehouse as a submodule
        object.__setattr__(self, "_warehouse", warehouse)
        self.layer, self.attention_init = layer, attention_init
        self.attention = KWAttention(
            self.in_channels,
            warehouse.initial_attention(layer, attention_init),
            warehouse.own_cells(layer),
            use_temperature=attention_init != "none",
            is_constant=attention_init == "static",
            device=device,
            dtype=dtype,
            **attention,
        )
        self.heads = self._make_heads(attentions, device, dtype) if attentions else None
        self.bias = nn.Parameter(torch.zeros(self.out_channels, device=device, dtype=dtype)) if bias else None

    def _make_heads(
        self, attentions: Sequence[str], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> ODHeads:
        """The heads of KW* (Table 17), which predict ODConv's attentions along the other dimensions.

        Their input is the hidden vector of `KWAttention`.
        """
        check_choice("attention of KW*", attentions, ("spatial", "channel", "filter"))
        taps, window = math.prod(self.kernel_size), math.prod(self._warehouse.cells.shape[3:])
        if "spatial" in attentions and window > 1:
            raise ValueError(f"layer '{self.layer}': the spatial attention needs spatial_partition, cells of one tap")
        sizes = self.attention.fc1.out_features, self.in_channels, self.out_channels, taps, self.groups, 1
        # the paper's 12.51 M parameters of MobileNetV2 include a filter attention of depth-wise kernels
        return ODHeads(*sizes, attentions=attentions, depthwise_filter=True, device=device, dtype=dtype)

    @property
    def warehouse(self) -> Warehouse:
        """The warehouse that this layer takes its cells from."""
        return self._warehouse

    # with every attention function the temperature is tau of equation 4: from 1 (each mixture is its own cell) to 0
    # (attention alone)
    schedule = "caf"

    @torch.no_grad()
    def keep_weight(self, weight: Tensor) -> None:
        """Write the static kernel [O, I, *k] into the cells that are assigned to this layer's mixtures.

        With a budget below 1 some mixtures have no cell of their own. Cells and attentions are then the closest to the
        static kernels of all layers of the warehouse, if the attention is "static" (see `Warehouse.approximate`).

        Raises:
            ValueError: the budget is below 1, and the attention is another.
        """
        cells, is_static = self._warehouse.cells, self.attention_init == "static"
        if self._warehouse.cell_num_ratio < 1 and not is_static:
            raise ValueError(
                f"warehouse '{self._warehouse.name}': with a cell_num_ratio of {self._warehouse.cell_num_ratio}, below "
                f"1, keep_weights needs attention_init 'static', not '{self.attention_init}'"
            )
        c_out, c_in, *window = cells.shape[1:]
        weight = weight.reshape(self.kernel_shape) * (self.heads.reset_to_constants() if self.heads else 1.0)
        g_out, g_in = weight.shape[0] // c_out, weight.shape[1] // c_in
        weight = weight.reshape(g_out, c_out, g_in, c_in, -1, *window)
        weight = weight.permute(4, 0, 2, 1, 3, *range(5, weight.ndim)).reshape(-1, *cells.shape[1:])
        if self._warehouse.cell_num_ratio < 1:
            self._warehouse.approximate(self.layer, weight, self.attention.hold)
        else:
            own = torch.tensor(self._warehouse.assignments[self.layer], device=cells.device)
            cells[own] = weight / STATIC if is_static else weight

    def constant_kernel(self) -> Tensor | None:
        """The kernel at temperature 1, where every attention is beta (equation 4)."""
        attention, cells = self.attention, self._warehouse.cells
        if self.heads or attention.beta is None or float(attention.temperature) != 1:
            return None
        (n, c_out, c_in, *window), (o, i) = cells.shape, self.kernel_shape[:2]
        kernel = attention.beta[:, :n].to(cells.dtype) @ cells.flatten(1)
        kernel = kernel.reshape(-1, o // c_out, i // c_in, c_out, c_in, *window)
        return kernel.permute(1, 3, 2, 4, 0, *range(5, kernel.ndim)).reshape(self.kernel_shape)

    def mixing_cost(self, positions: int) -> int:
        """m x n x the size of a cell (n = 1 without sharing of cells).

        KW* adds the product of its other attentions, and the product of that and the kernel.
        """
        cells = self._warehouse.cells
        cost = self.attention.m * (cells if self.attention.only is None else cells[0]).numel()
        if self.heads:
            cost += self.heads.product_cost(self.kernel_shape, self.groups) + math.prod(self.kernel_shape)
        return cost

    def convolve(self, x: Tensor) -> Tensor:
        # modules are called, not parts of them, so that hooks on them are, too
        pooled, hidden, heads = global_pool(x), None, {}
        if self.heads:
            hidden = self.attention.hidden(pooled)
            heads = self.heads(hidden)
        alpha = self.attention(pooled, hidden)
        if "spatial" in heads:
            # the mixtures of a position are next to each other
            spatial = heads["spatial"].transpose(1, 2).unsqueeze(3)
            alpha = (alpha.unflatten(1, (spatial.shape[1], -1)) * spatial).flatten(1, 2)
        if "channel" in heads:
            x = scaled(x, heads["channel"])
        bias = None if "filter" in heads else self.bias
        y = mixture_conv(x, alpha, self._warehouse.cells, self.kernel_size, bias, *self._geometry())
        return with_bias(scaled(y, heads["filter"]), self.bias) if "filter" in heads else y

    def method_repr(self) -> str:
        return f"warehouse={self._warehouse.name}"


class KWConv1d(_KWLayer, Conv1d):
    """`nn.Conv1d` whose kernel is mixed per sample from a warehouse: [B, C_in, L] -> [B, C_out, L'].

    Args:
        warehouse: a `Warehouse` that was made for a kernel [C_out, C_in / groups, *K] named `layer`. The caller
            registers it once, at the root of the model. None: the layer has a warehouse of its own.
        layer: the name of this layer in the warehouse.
        attention_init: see `Warehouse.initial_attention`.
        attentions: for KW*, any of ODConv's "spatial", "channel" and "filter".
        **attention: `reduction`, `norm`, `attention_function`, `nonlocal_basis_ratio` and `cell_sharing` of
            `KWAttention`.

    Raises:
        ValueError: for sizes and settings that do not fit.
    """


class KWConv2d(_KWLayer, Conv2d):
    """`nn.Conv2d` whose kernel is mixed per sample from a warehouse: [B, C_in, H, W] -> [B, C_out, H', W'].

    Arguments and errors as for `KWConv1d`.
    """


class KWConv3d(_KWLayer, Conv3d):
    """`nn.Conv3d` whose kernel is mixed per sample from a warehouse: [B, C_in, D, H, W] -> [B, C_out, D', H', W'].

    Arguments and errors as for `KWConv1d`.
    """


class KWLinear(_KWLayer, Linear):
    """`nn.Linear` whose matrix is mixed per sample from a warehouse: [B, ..., C_in] -> [B, ..., C_out].

    The attention pools over all dimensions between the first and the last. The kernel is [C_out, C_in, 1].
    The other arguments and errors are those of `KWConv1d`.
    """
