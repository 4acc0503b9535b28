"""Splits the value from the projection of self-attention, so that query and key can stay static."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class QueryKeyValue(nn.Module):
    """A linear layer [B, N, C] -> [B, N, 3 C] in two parts: `query_key` (2 C) and `value` (C).

    It is made from timm's `qkv`, which computes all three with one matrix, and gives the same output.
    """

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        parts = qkv.weight.detach().split([2 * qkv.out_features // 3, qkv.out_features // 3])
        biases = [None, None] if qkv.bias is None else qkv.bias.detach().split([len(part) for part in parts])
        self.query_key, self.value = (self._linear(*part) for part in zip(parts, biases))

    @staticmethod
    def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        if bias is not None:
            layer.bias.data.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.query_key(x), self.value(x)], dim=-1)


@contextmanager
def split_projections(model: nn.Module) -> Iterator[None]:
    """Replace every `qkv` of a model by a `QueryKeyValue` that computes the same.

    If the body of the `with` statement raises, the original `qkv` are put back; otherwise the replacements stay.
    """
    whole = [(module, module.qkv) for module in model.modules() if isinstance(getattr(module, "qkv", None), nn.Linear)]
    for module, qkv in whole:
        module.qkv = QueryKeyValue(qkv).train(module.training)
    try:
        yield
    except BaseException:
        for module, qkv in whole:
            module.qkv = qkv
        raise
