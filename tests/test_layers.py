"""The layers, against the paper's equations written out, and in every surrounding that they live in."""

import pytest
import torch
import torch.nn.functional as F
from layer_checks import (
    assert_samples_are_independent,
    assert_single_sample_is_evaluated,
    gradients,
    kernel_of_cells,
    randomize,
)
from tolerance import RELATIVE, assert_same, difference
from torch import nn

from models import KWConv1d, KWConv2d, KWConv3d, KWLinear, Warehouse, set_temperature
from models.methods.kernel_warehouse.warehouse import partition

# name -> (layer, its arguments, shape of the input)
LAYERS = {
    "conv1d": (KWConv1d, (6, 9, 5), {"padding": 2, "stride": 2}, (3, 6, 11)),
    "conv2d": (KWConv2d, (6, 10, 3), {"padding": 1}, (3, 6, 7, 5)),
    "conv2d-odd": (KWConv2d, (7, 5, (3, 1)), {"padding": (1, 0), "stride": (2, 3), "bias": False}, (2, 7, 9, 7)),
    "conv2d-dilated": (KWConv2d, (4, 4, 3), {"padding": 2, "dilation": 2}, (2, 4, 8, 8)),
    "conv2d-groups": (KWConv2d, (6, 9, 3), {"padding": 1, "groups": 3}, (3, 6, 5, 5)),
    "depthwise": (KWConv2d, (8, 8, 3), {"padding": 1, "groups": 8}, (3, 8, 6, 6)),
    "pointwise": (KWConv2d, (63, 32, 1), {}, (2, 63, 7, 7)),
    "conv3d": (KWConv3d, (4, 6, 3), {"padding": 1, "stride": (1, 2, 2)}, (2, 4, 3, 5, 4)),
    "linear-2d": (KWLinear, (12, 5), {}, (4, 12)),
    "linear-3d": (KWLinear, (12, 8), {}, (3, 7, 12)),
    "linear-4d": (KWLinear, (12, 8), {"bias": False}, (2, 3, 5, 12)),
}


def naive_attention(layer, pooled):
    """Equation 4 for one sample and one mixture after the other."""
    attention, tau = layer.attention, float(layer.attention.temperature)
    norm = attention.norm1
    hidden = pooled @ attention.fc1.weight.T
    mean, variance = norm.running_mean, norm.running_var
    if layer.training and len(pooled) > 1:
        mean, variance = hidden.mean(0), hidden.var(0, unbiased=False)
    hidden = (hidden - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    z = hidden.clamp(min=0) @ attention.fc2.weight.T + attention.fc2.bias
    warehouse = layer.warehouse
    rows = []
    for sample in z.reshape(len(pooled), -1, warehouse.n + 1):
        for i, logits in enumerate(sample):
            mine = torch.tensor([float(j == warehouse.assignments[layer.layer][i]) for j in range(warehouse.n)]).to(
                z.dtype
            )
            rows.append(tau * mine + (1 - tau) * logits[: warehouse.n] / (logits.abs().sum() + 1e-3))
    return torch.stack(rows).reshape(len(pooled), -1, warehouse.n).to(pooled.dtype)


def naive_layer(layer, x):
    """Assemble every kernel block by block, and convolve sample by sample with PyTorch's own convolution."""
    linear = isinstance(layer, KWLinear)
    tokens = x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2) if linear else x
    alpha = naive_attention(layer, tokens.flatten(2).mean(2))
    cells = layer.warehouse.cells
    shape = layer.warehouse.kernels[layer.layer]
    samples = []
    for sample, weights in zip(tokens, alpha):
        kernel = kernel_of_cells(torch.einsum("mn,n...->m...", weights, cells), shape)
        if linear:
            samples.append(F.linear(sample.T, kernel[..., 0], layer.bias))
        else:
            conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)]
            args = layer.stride, layer.padding, layer.dilation, layer.groups
            samples.append(conv(sample[None], kernel, layer.bias, *args)[0])
    y = torch.stack(samples)
    return y.reshape(*x.shape[:-1], -1) if linear else y


def make_layer(name, dtype=torch.float64, temperature=0.3, **kwargs):
    kind, arguments, options, shape = LAYERS[name]
    layer = randomize(kind(*arguments, **options, **kwargs).to(dtype))
    set_temperature(layer, temperature)
    x = torch.randn(*shape, dtype=dtype)
    return layer, x


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_equations(name, training):
    layer, x = make_layer(name)
    layer.train(training)
    x.requires_grad_()
    expected = naive_layer(layer, x)
    y = layer(x)
    assert_same(y, expected)
    for value, reference in zip(gradients(y, layer, x), gradients(expected, layer, x), strict=True):
        assert difference(value, reference) <= 1e-9


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name):
    layer, x = make_layer(name)
    layer.eval()
    parameters = dict(layer.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values)), (x,))

    inputs = [x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in parameters.values())]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_float32_and_autocast(name):
    layer, x = make_layer(name)
    expected = naive_layer(layer.eval(), x).detach()
    layer, x = layer.float(), x.float()
    assert_same(layer(x), expected, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    # pooling, two matrix products and the convolution are rounded: a few units of the operator's tolerance
    assert difference(y, expected) <= 3 * RELATIVE[torch.bfloat16]


@pytest.mark.parametrize("name", LAYERS)
def test_samples_are_independent_in_eval_mode(name):
    assert_samples_are_independent(*make_layer(name))


@pytest.mark.parametrize("name", LAYERS)
def test_single_sample_in_train_mode(name):
    assert_single_sample_is_evaluated(*make_layer(name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_whole_layer_in_another_type(dtype):
    layer, x = make_layer("conv2d", torch.float32)
    expected = layer.eval()(x)
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert difference(y, expected) <= 3 * RELATIVE[min(dtype, torch.float32, key=lambda d: torch.finfo(d).bits)]


def attention_of(function, z):
    total = z.abs().sum(-1, keepdim=True) + 1e-3
    return {
        "caf": z / total,
        "softmax": z.exp() / z.exp().sum(-1, keepdim=True),
        "sigmoid": 1 / (1 + (-z).exp()),
        "relu": z.clamp(min=0) / total,
    }[function][..., :-1]


@pytest.mark.parametrize("function", ["caf", "softmax", "sigmoid", "relu"])
def test_attention_functions(function):
    """Table 8; the zero cell is part of every sum, and of no kernel."""
    layer, x = make_layer("conv2d", attention_function=function)
    pooled = x.mean((2, 3))
    attention = layer.eval().attention
    z = attention._logits(attention.hidden(pooled))
    tau, beta = 0.3, layer.warehouse.initial_attention("")[:, :-1].double()
    assert_same(attention(pooled), tau * beta + (1 - tau) * attention_of(function, z))


def test_no_temperature_without_initialisation():
    layer, x = make_layer("conv2d", temperature=1.0, attention_init="none")
    high = layer.eval()(x)
    set_temperature(layer, 0.0)
    assert torch.equal(layer(x), high)


@pytest.mark.parametrize(
    ("budget", "strategy", "expected"),
    [
        # figures 4 to 6, and the alternatives of section A.2; the zero cell is the last column
        (1.0, "one-to-one", [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]),
        (1.0, "all-to-one", [[1, 1, 1, 1, 0]] * 4),
        (1.0, "none", [[0] * 5] * 4),
        (2.0, "k-to-one", [[1, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0, 0],
                           [0, 0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 0]]),
        (0.5, "one-to-one", [[1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]]),
        (0.5, "one-to-k", [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]),
        (0.25, "one-to-one", [[1, 0], [0, 1], [0, 1], [0, 1]]),
        (0.75, "one-to-one", [[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]),
    ],
)  # fmt: skip
def test_initial_attention(budget, strategy, expected):
    warehouse = Warehouse({"a": (4, 2, 2)}, cell_num_ratio=budget, cell_outplane_ratio=0.5)
    assert warehouse.initial_attention("a", strategy).int().tolist() == expected


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.75, 1, 1.5, 2, 4])
def test_every_cell_has_one_mixture(budget):
    """Section 3.4: without repetition, over all layers; below 1 every cell is used, above 1 every mixture has one."""
    kernels = {"a": (8, 8, 3, 3), "b": (24, 8, 1, 1), "c": (8, 16, 3, 3)}
    warehouse = Warehouse(kernels, cell_num_ratio=budget, cell_inplane_ratio=0.5)
    used = [cell for layer in kernels for cell in warehouse.assignments[layer] if cell < warehouse.n]
    assert len(set(used)) == len(used) == min(warehouse.n, sum(warehouse.mixtures.values()))
    for layer in kernels:
        first, last = warehouse.own_cells(layer)
        assert all(first <= cell < last for cell in warehouse.assignments[layer] if cell < warehouse.n)


def test_partition_by_greatest_common_divisors():
    """Table 15, the first reassigned stage of ResNet18."""
    kernels = {"conv1": (64, 64, 3, 3), "conv2": (128, 64, 3, 3), "short": (128, 64, 1, 1)}
    assert partition(kernels, name="") == ((64, 64, 1, 1), {"conv1": 9, "conv2": 18, "short": 2})
    halves = partition(kernels, name="", cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)
    assert halves == ((32, 32, 1, 1), {"conv1": 36, "conv2": 72, "short": 8})
    same = {"a": (64, 64, 3, 3), "b": (128, 64, 3, 3)}
    assert partition(same, name="", spatial_partition=False) == ((64, 64, 3, 3), {"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"cell_outplane_ratio": 0.3}, ["stage", "first", "cell_outplane_ratio 0.3", "[9, 6, 3, 3]"]),
        ({"cell_inplane_ratio": 0.25}, ["stage", "first", "cell_inplane_ratio 0.25", "[9, 6, 3, 3]"]),
        ({"cell_outplane_ratio": 2}, ["stage", "cell_outplane_ratio 2"]),
        ({"cell_num_ratio": 0.35}, ["stage", "second", "cell_num_ratio 0.35"]),
        ({"cell_num_ratio": 0.01}, ["stage", "cell_num_ratio 0.01"]),
        ({"spatial_partition": False}, ["stage", "second", "spatial_partition"]),
    ],
)
def test_what_does_not_divide_is_an_error(settings, named):
    with pytest.raises(ValueError) as error:
        Warehouse({"first": (9, 6, 3, 3), "second": (9, 6, 1, 1)}, name="stage", **settings)
    assert all(word in str(error.value) for word in named), str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KWConv2d(6, 8, 3, groups=4), "groups 4 must divide"),
        (lambda: KWConv2d(6, 8, (3, 3, 3)), "needs 2 numbers"),
        (lambda: KWConv2d(6, 8, 2, padding="same"), "odd kernels"),
        (lambda: KWConv2d(6, 8, 3, attention_function="tanh"), "attention_function 'tanh'"),
        (lambda: KWConv2d(6, 8, 3, attention_init="zero"), "attention_init 'zero'"),
        (lambda: KWConv2d(6, 8, 3, attention_init="k-to-one"), "cell_num_ratio above 1"),
        (lambda: KWConv2d(6, 8, 3, norm="group"), "norm 'group'"),
        (lambda: KWConv2d(6, 8, 3, warehouse=Warehouse({"a": (8, 6, 1, 1)}), layer="a"), "kernel of"),
        (lambda: set_temperature(KWConv2d(6, 8, 3), 1.5), "not in"),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_padding_names():
    assert KWConv2d(4, 4, 3, padding="same").padding == (1, 1) and KWConv2d(4, 4, 3, padding="valid").padding == (0, 0)
    assert "padding=(1, 1)" in repr(KWConv2d(4, 4, 3, padding=1))


def test_one_warehouse_for_several_layers():
    warehouse = Warehouse({"a": (8, 4, 3, 3), "b": (8, 8, 1, 1)})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.warehouse = warehouse
            self.a = KWConv2d(4, 8, 3, padding=1, warehouse=warehouse, layer="a")
            self.b = KWConv2d(8, 8, 1, warehouse=warehouse, layer="b")

        def forward(self, x):
            return self.b(self.a(x).relu())

    net = Net()
    assert [key for key in net.state_dict() if "cells" in key] == ["warehouse.cells"]
    net(torch.randn(2, 4, 5, 5)).sum().backward()
    assert warehouse.cells.grad.abs().sum() > 0 and warehouse.cells.shape == (9 + 2, 8, 4, 1, 1)
