"""Layers with kernels of their own (ODConv, DY-Conv, CondConv) and KW*, against their papers' equations written out."""

import pytest
import timm
import torch
import torch.nn.functional as F
from layer_checks import gradients, kernel_of_cells, randomize, take_statistics
from tolerance import assert_same, difference
from torch import nn

import models
from models import (
    CondConv2d,
    DYConv2d,
    KWConv2d,
    ODConv2d,
    ODLinear,
    convert,
    set_temperature,
    temperature_range,
)
from models.methods import METHODS
from models.methods.relay import Relay

# KW (1/2x) is for MobileNetV2 alone
ANYWHERE = [name for name in METHODS if name != "kw1d2x"]
# name -> (in, out, kernel, options, input): each is made for every method that can be of it
SHAPES = {
    "Conv1d": (6, 9, 5, {"padding": 2, "stride": 2}, (3, 6, 11)),
    "Conv2d": (6, 10, 3, {"padding": 1}, (3, 6, 7, 5)),
    "Conv2d-odd": (7, 5, (3, 1), {"padding": (1, 0), "stride": (2, 3), "bias": False}, (2, 7, 9, 7)),
    "Conv2d-dilated": (4, 4, 3, {"padding": 2, "dilation": 2}, (2, 4, 8, 8)),
    "Conv2d-groups": (6, 9, 3, {"padding": 1, "groups": 3}, (3, 6, 5, 5)),
    "Conv2d-depthwise": (8, 8, 3, {"padding": 1, "groups": 8}, (3, 8, 6, 6)),
    "Conv2d-pointwise": (12, 16, 1, {}, (2, 12, 7, 7)),
    "Conv3d": (4, 6, 3, {"padding": 1, "stride": (1, 2, 2)}, (2, 4, 3, 5, 4)),
    "Linear": (12, 8, 1, {}, (3, 7, 12)),
}
OD_SETTINGS = {
    "1x": {"kernel_num": 1},
    "4x": {"kernel_num": 4},
    "8x-caf": {"kernel_num": 8, "attention_function": "caf"},
    "softmax": {"kernel_num": 2, "spatial_function": "softmax"},
    "spatial": {"attentions": ["spatial"]},
    "channel-filter": {"attentions": ["channel", "filter"]},
    "kernel": {"attentions": ["kernel"], "kernel_num": 3},
    "separate": {"kernel_num": 3, "attention_sharing": False},
    "separate-spatial": {"kernel_num": 2, "attention_sharing": False, "attentions": ["spatial", "kernel"]},
}


def make(prefix, shape, **settings):
    kind = getattr(models, prefix + shape.split("-")[0])
    c_in, c_out, kernel, options, size = SHAPES[shape]
    arguments = (c_in, c_out) if kind.__name__.endswith("Linear") else (c_in, c_out, kernel)
    layer = randomize(kind(*arguments, **options, **settings).double())
    return layer, torch.randn(*size, dtype=torch.float64, requires_grad=True)


def compare(layer, naive, x):
    """Outputs and gradients of a layer and of its equation."""
    y, expected = layer(x), naive(layer, x)
    assert_same(y, expected)
    for value, reference in zip(gradients(y, layer, x), gradients(expected, layer, x), strict=True):
        assert difference(value, reference) <= 1e-9


def images(x, layer):
    """Tokens of a linear layer as an image one pixel high, and a function that turns results back."""
    if not hasattr(layer, "in_features"):
        return x, lambda y: y
    return x.transpose(1, 2), lambda y: y.transpose(1, 2)


def convolve(sample, kernel, layer):
    """One sample [C, *S] with its kernel, through PyTorch's own convolution."""
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[sample.ndim - 1]
    return conv(sample[None], kernel, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)[0]


def fc(linear, vector):
    weight = linear.weight.reshape(linear.weight.shape[0], -1)
    return weight @ vector + (0 if linear.bias is None else linear.bias)


def normalised(norm, hidden, training):
    mean, variance = norm.running_mean, norm.running_var
    if training:
        mean, variance = hidden.mean(0), hidden.var(0, unbiased=False)
    return (hidden - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def naive_caf(z, tau):
    """Equation 4 of KernelWarehouse, whose first cell is the initial one."""
    first = torch.tensor([1.0] + [0.0] * (len(z) - 1), dtype=z.dtype)
    return tau * first + (1 - tau) * z / (z.abs().sum() + 1e-3)


def naive_odconv(layer, x):
    """Equation 2, kernel by kernel and weight by weight, for one sample after the other."""
    attention, weight, groups = layer.attention, layer.weight, layer.groups
    count, c_out, c_in, taps = len(weight), weight.shape[1], weight.shape[2], weight[0, 0, 0].numel()
    x, back = images(x, layer)
    if not attention.names:
        # the one kernel of one tap has no spatial attention
        return back(torch.stack([convolve(sample, weight[0], layer) for sample in x]))
    pooled = x.flatten(2).mean(2)
    if attention.side > 1:
        pooled = F.adaptive_avg_pool2d(x, attention.side).flatten(1)
    hidden = torch.stack([fc(attention.fc, vector) for vector in pooled])
    hidden = normalised(attention.bn, hidden, layer.training).clamp(min=0)
    temperature = float(attention.temperature)
    divisor = 1.0 if attention.attention_function == "caf" else temperature
    results = []
    for sample, vector in zip(x, hidden):
        values = {name: fc(getattr(attention, f"{name}_fc"), vector) for name in attention.names}
        alpha = [1.0] * count
        if "kernel" in values:
            caf = attention.attention_function == "caf"
            alpha = naive_caf(values["kernel"], temperature) if caf else (values["kernel"] / divisor).softmax(0)
        kernel = 0
        for i in range(count):
            own = {}
            for name, z in values.items():
                if name != "kernel":
                    z = z.reshape(attention.sets, -1)[i if attention.sets > 1 else 0] / divisor
                    softmax = name == "spatial" and attention.spatial_function == "softmax"
                    own[name] = z.softmax(0) if softmax else 1 / (1 + (-z).exp())
            part = weight[i].reshape(c_out, c_in, taps) * alpha[i]
            if "spatial" in own:
                part = part * own["spatial"][None, None, :]
            if "filter" in own:
                part = part * own["filter"][:, None, None]
            if "channel" in own:
                # filter o sees the channels of its group
                seen = [own["channel"][o // (c_out // groups) * c_in :][:c_in] for o in range(c_out)]
                part = part * torch.stack(seen)[:, :, None]
            kernel = kernel + part
        results.append(convolve(sample, kernel.reshape(weight.shape[1:]), layer))
    return back(torch.stack(results))


def naive_dyconv(layer, x):
    attention, temperature = layer.attention, float(layer.attention.temperature)
    x, back = images(x, layer)
    results = []
    for sample in x:
        z = fc(attention.fc2, fc(attention.fc1, sample.flatten(1).mean(1)).clamp(min=0))
        caf = attention.attention_function == "caf"
        alpha = naive_caf(z, temperature) if caf else (z / temperature).exp() / (z / temperature).exp().sum()
        results.append(convolve(sample, sum(a * kernel for a, kernel in zip(alpha, layer.weight)), layer))
    return back(torch.stack(results))


def naive_condconv(layer, x):
    x, back = images(x, layer)
    results = []
    for sample in x:
        alpha = 1 / (1 + (-fc(layer.routing, sample.flatten(1).mean(1))).exp())
        results.append(convolve(sample, sum(a * kernel for a, kernel in zip(alpha, layer.weight)), layer))
    return back(torch.stack(results))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("settings", OD_SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_odconv_is_equation_2(shape, settings, training):
    layer, x = make("OD", shape, **OD_SETTINGS[settings])
    layer.train(training).set_temperature(0.3 if "caf" in settings else 2.5)
    compare(layer, naive_odconv, x)


@pytest.mark.parametrize("side", [2, 3])
def test_odconv_with_spatial_pooling(side):
    layer, x = make("OD", "Conv2d", spatial_pool=side, reduction=0.25)
    compare(layer, naive_odconv, x)
    assert layer.attention.fc.weight.shape == (16, 6, side, side)


@pytest.mark.parametrize("function, temperature", [("softmax", 4.0), ("caf", 0.3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_dyconv_is_equation_1(shape, function, temperature):
    layer, x = make("DY", shape, kernel_num=3, attention_function=function)
    layer.set_temperature(temperature)
    compare(layer, naive_dyconv, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_condconv_is_equation_1(shape):
    layer, x = make("Cond", shape, kernel_num=3)
    compare(layer, naive_condconv, x)


@pytest.mark.parametrize("attentions", [["spatial"], ["channel"], ["filter"], ["spatial", "channel", "filter"]])
@pytest.mark.parametrize("shape", SHAPES)
def test_kw_star_multiplies_kernels_by_odconvs_attentions(shape, attentions):
    """The kernel of KW, assembled cell by cell, times the other attentions."""
    layer, x = make("KW", shape, attentions=attentions)
    layer.set_temperature(0.3)

    def naive(layer, x):
        x, back = images(x, layer)
        shape = layer.kernel_shape
        results = []
        for sample, pooled in zip(x, x.flatten(2).mean(2)):
            norm, attention = layer.attention.norm1, layer.attention
            hidden = normalised(norm, fc(attention.fc1, pooled), False).clamp(min=0)
            mixtures = torch.einsum("mn,n...->m...", attention(pooled[None])[0], layer.warehouse.cells)
            kernel = kernel_of_cells(mixtures, shape).flatten(2)
            for name in layer.heads.names:
                values = 1 / (1 + (-fc(getattr(layer.heads, f"{name}_fc"), hidden)).exp())
                if name == "spatial":
                    kernel = kernel * values
                elif name == "filter":
                    kernel = kernel * values[:, None, None]
                else:
                    group = shape[0] // layer.groups
                    seen = [values[o // group * shape[1] :][: shape[1]] for o in range(shape[0])]
                    kernel = kernel * torch.stack(seen)[:, :, None]
            results.append(convolve(sample, kernel.reshape(shape), layer))
        return back(torch.stack(results))

    layer.eval()
    if shape in ("Conv2d-pointwise", "Linear") and attentions == ["spatial"]:
        assert layer.heads.names == []
    compare(layer, naive, x)


def test_condconv_shares_the_routing_of_a_block():
    """The last blocks but their short cuts, and the classifier; a block has one routing, of its input."""
    model = convert(timm.create_model("resnet18", num_classes=7), "condconv", kernel_num=2).double().eval()
    routings = [name for name, module in model.named_modules() if name.endswith(".routing")]
    blocks = ["layer3.1", "layer4.0", "layer4.1"]
    assert routings == [*(f"{block}.conv1.routing" for block in blocks), "fc.routing"]
    assert type(model.layer4[0].downsample[0]) is nn.Conv2d and type(model.layer3[0].conv1) is nn.Conv2d
    seen = {}
    block = model.layer4[1]
    block.register_forward_pre_hook(lambda module, args: seen.update(input=args[0]))
    block.conv2.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    model(torch.randn(2, 3, 40, 40, dtype=torch.float64))
    for i in range(2):
        alpha = 1 / (1 + (-fc(block.conv1.routing, seen["input"][i].flatten(1).mean(1))).exp())
        kernel = sum(a * kernel for a, kernel in zip(alpha, block.conv2.weight))
        assert_same(seen["y"][i], convolve(seen["x"][i], kernel, block.conv2))


def test_a_layer_out_of_order_is_refused():
    model = convert(timm.create_model("resnet18", num_classes=7), "condconv", kernel_num=2).eval()
    with pytest.raises(RuntimeError, match=r"'layer4\.1\.conv2' ran out of order.*after 'layer4\.1\.conv1'"):
        model.layer4[1].conv2(torch.randn(2, 512, 3, 3))
    model(torch.randn(2, 3, 32, 32))


def test_relay_is_empty_after_the_last_layer():
    relay = Relay(["a", "b"])
    relay.start(1)
    assert relay.take("a") == 1
    relay.hand_on(2)
    assert relay.take("b") == 2
    relay.hand_on(3)
    assert relay.value is None
    with pytest.raises(RuntimeError, match="'a' ran out of order"):
        relay.take("a")


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (ODConv2d, {"kernel_num": 0}, "kernel_num 0 is below 1"),
        (ODConv2d, {"reduction": 0.0}, r"reduction 0\.0 is not in \(0, 1\]"),
        (ODConv2d, {"attentions": []}, "attentions is empty"),
        (ODConv2d, {"attentions": ["space"]}, "unknown attention 'space', choose from spatial"),
        (ODConv2d, {"spatial_function": "relu"}, "unknown spatial_function 'relu'"),
        (ODConv2d, {"attention_function": "relu"}, "unknown attention_function 'relu'"),
        (ODConv2d, {"kernel_num": 4, "attentions": ["filter"]}, "adds up to one kernel"),
        (ODConv2d, {"groups": 3}, "groups 3 must divide"),
        (DYConv2d, {"kernel_num": 1}, "kernel_num 1 is below 2"),
        (DYConv2d, {"reduction": 2.0}, r"reduction 2\.0"),
        (CondConv2d, {"kernel_num": 0}, "kernel_num 0 is below 1"),
        (KWConv2d, {"attentions": ["kernel"]}, r"unknown attention of KW\* 'kernel'"),
    ],
)
def test_bad_settings_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(4, 8, 3, **settings)


@pytest.mark.parametrize("layer, bad", [(ODConv2d(4, 8, 3), 0.0), (DYConv2d(4, 8, 3, attention_function="caf"), 1.5)])
def test_temperatures_out_of_range_are_refused(layer, bad):
    with pytest.raises(ValueError, match=f"temperature {bad}"):
        set_temperature(layer, bad)


def test_one_linear_layer_of_tokens_is_a_1x1_convolution():
    linear, x = make("OD", "Linear", kernel_num=2)
    conv = ODConv2d(12, 8, 1, kernel_num=2).double()
    state = {key: value.reshape(conv.state_dict()[key].shape) for key, value in linear.state_dict().items()}
    conv.load_state_dict(state)
    assert_same(conv(x.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2), linear(x))
    assert isinstance(linear, ODLinear)


KEPT = {
    **{method: {} for method in ANYWHERE},
    "we": {"standardise": False},
    "odconv": {"kernel_num": 4},
    "odconv-softmax": {"spatial_function": "softmax"},
    "odconv-separate": {"kernel_num": 4, "attention_sharing": False, "attentions": ["spatial"]},
    "odconv-caf": {"kernel_num": 2, "attention_function": "caf"},
}


@pytest.mark.parametrize("backbone", ["test_resnet", "mobilenetv2_035", "test_vit"])
@pytest.mark.parametrize("name", KEPT)
def test_keep_weights_keeps_the_function(name, backbone):
    """From the first temperature of a training on, for all methods."""
    static = timm.create_model(backbone, num_classes=5).double()
    x = torch.randn(8, 3, 64, 64, dtype=torch.float64)
    take_statistics(static, x)
    with torch.no_grad():
        expected = static.eval()(x[:2])
        model = convert(static, name.split("-")[0], keep_weights=True, **KEPT[name])
        set_temperature(model, temperature_range(model)[0])
        assert difference(model(x[:2]), expected) < 1e-9


@pytest.mark.parametrize("first", ["kw", "odconv", "dyconv", "dcd", "kr", "we", "weightnet", "condconv", "cgc"])
@pytest.mark.parametrize("second", ANYWHERE)
def test_two_methods_on_one_layer_are_refused(first, second):
    """In one line that says so, and the parts of a dynamic layer are none of the second method's."""
    with torch.device("meta"):
        model = convert(timm.create_model("resnet18"), first)
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=r"is dynamic already; a layer has one method|has warehouses already"):
            convert(model, second)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_refused_conversion_leaves_a_vision_transformer_as_it_was():
    model = timm.create_model("test_vit")
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="does not divide"):
        convert(model, cell_inplane_ratio=0.3)
    assert list(model.state_dict()) == before
    convert(model)
    assert "blocks.0.attn.qkv.query_key.weight" in model.state_dict()


@pytest.mark.parametrize("method", ANYWHERE)
def test_an_empty_batch(method):
    model = convert(timm.create_model("test_resnet", num_classes=5), method).eval()
    assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 5)


def test_temperatures_are_set_everywhere_or_nowhere():
    model = convert(timm.create_model("test_resnet"), "dyconv", layers=["layer1.*"])
    convert(model, "odconv", layers=["layer2.*"], attention_function="caf")
    set_temperature(model, 0.5)
    with pytest.raises(ValueError, match="30"):
        set_temperature(model, 30.0)
    assert {float(m.attention.temperature) for m in model.modules() if hasattr(m, "temperatures")} == {0.5}
    with pytest.raises(ValueError, match="disagree"):
        temperature_range(model)
