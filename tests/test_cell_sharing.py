"""Table 6, "without sharing": a mixture has no cell but its own."""

import pytest
import torch

from models import KWConv2d, Warehouse


@pytest.mark.parametrize("function", ["caf", "softmax", "sigmoid", "relu"])
def test_only_the_own_cell(function):
    torch.manual_seed(0)
    warehouse = Warehouse({"a": (8, 8, 3, 3), "b": (8, 8, 3, 3)})
    layer = KWConv2d(
        8, 8, 3, padding=1, warehouse=warehouse, layer="b", attention_function=function, cell_sharing=False
    )
    layer.set_temperature(0.5)
    alpha = layer.attention(torch.randn(4, 8))
    assert alpha.shape == (4, 9, 18)
    own = torch.zeros(9, 18, dtype=torch.bool)
    own[torch.arange(9), torch.arange(9, 18)] = True
    assert (alpha[:, own] != 0).all() and (alpha[:, ~own] == 0).all()

    layer(torch.randn(4, 8, 5, 5)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert warehouse.cells.grad[:9].abs().max() == 0 < warehouse.cells.grad[9:].abs().min()


def test_needs_a_cell_for_every_mixture():
    with pytest.raises(ValueError, match="cell_num_ratio 1"):
        KWConv2d(8, 8, 3, warehouse=Warehouse({"": (8, 8, 3, 3)}, cell_num_ratio=2), cell_sharing=False)
