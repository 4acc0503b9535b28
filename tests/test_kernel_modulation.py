"""DCD, CGC, WeightNet and WE: the layers against the papers' equations written out, and the networks of the tables."""

import copy
import itertools
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import replaced
from layer_checks import assert_samples_are_independent, assert_single_sample_is_evaluated, gradients, randomize
from tolerance import RELATIVE, assert_same, difference
from torch import nn

import models
from models import ConfigError, build_model, convert, temperature_range
from models.methods import dcd, weight_excitation

# name -> (layer, its arguments, settings, shape of the input)
LAYERS = {
    "dcd-conv1d": ("DCDConv1d", (6, 9, 5), {"padding": 2, "stride": 2}, (3, 6, 11)),
    "dcd-conv2d": ("DCDConv2d", (8, 10, 3), {"padding": 1, "pool": 2}, (3, 8, 7, 5)),
    "dcd-stride": ("DCDConv2d", (8, 10, 3), {"padding": 1, "stride": 2, "bias": False}, (3, 8, 7, 6)),
    "dcd-patches": ("DCDConv2d", (5, 6, 2), {"stride": 2, "rank": 3}, (2, 5, 7, 6)),
    "dcd-odd": ("DCDConv2d", (7, 5, (3, 1)), {"padding": (0, 2), "stride": (2, 3)}, (2, 7, 9, 7)),
    "dcd-dilated": ("DCDConv2d", (4, 4, 3), {"padding": 2, "dilation": 2, "rank": 6}, (2, 4, 8, 8)),
    "dcd-pointwise": ("DCDConv2d", (63, 32, 1), {"reduction": 1 / 8}, (2, 63, 3, 3)),
    "dcd-conv3d": ("DCDConv3d", (4, 6, 3), {"padding": 1, "stride": (1, 2, 2)}, (2, 4, 3, 5, 4)),
    "dcd-linear-2d": ("DCDLinear", (12, 5), {"rank": 4, "hidden": 3}, (4, 12)),
    "dcd-linear-3d": ("DCDLinear", (12, 8), {}, (3, 7, 12)),
    "cgc-conv1d": ("CGCConv1d", (6, 9, 5), {"padding": 2, "stride": 2}, (3, 6, 11)),
    "cgc-conv2d": ("CGCConv2d", (64, 32, 3), {"padding": 1}, (3, 64, 7, 5)),
    "cgc-odd": ("CGCConv2d", (34, 5, (3, 1)), {"padding": (1, 0), "stride": (2, 3), "bias": False}, (2, 34, 9, 7)),
    "cgc-groups": ("CGCConv2d", (6, 9, 3), {"padding": 1, "groups": 3}, (3, 6, 5, 5)),
    "cgc-depthwise": ("CGCConv2d", (32, 32, 3), {"padding": 1, "groups": 32}, (3, 32, 6, 6)),
    "cgc-small-map": ("CGCConv2d", (3, 8, 7), {"padding": 3}, (2, 3, 2, 3)),
    "cgc-conv3d": ("CGCConv3d", (4, 6, 3), {"padding": 1, "stride": (1, 2, 2)}, (2, 4, 3, 5, 4)),
    "weightnet-conv1d": ("WeightNetConv1d", (6, 9, 4), {"padding": 2, "stride": 2}, (3, 6, 11)),
    "weightnet-conv2d": ("WeightNetConv2d", (6, 10, 3), {"padding": 1, "kernel_num": 3}, (3, 6, 7, 5)),
    "weightnet-slices": ("WeightNetConv2d", (4, 5, 3), {"kernel_num": 2, "slices": 12, "bias": False}, (2, 4, 5, 5)),
    "weightnet-groups": ("WeightNetConv2d", (6, 9, 3), {"groups": 3, "dilation": 2, "padding": 2}, (3, 6, 5, 5)),
    "weightnet-depthwise": ("WeightNetConv2d", (8, 8, 3), {"padding": 1, "groups": 8, "kernel_num": 2}, (3, 8, 6, 6)),
    "weightnet-conv3d": ("WeightNetConv3d", (4, 6, 3), {"padding": 1, "slices": 1}, (2, 4, 3, 5, 4)),
    "weightnet-linear-3d": ("WeightNetLinear", (12, 8), {"slices": 4}, (3, 7, 12)),
    "we-conv1d": ("WEConv1d", (6, 9, 5), {"padding": 2, "stride": 2}, (3, 6, 11)),
    "we-conv2d": ("WEConv2d", (63, 10, 3), {"padding": 1, "reduction": 1 / 2}, (3, 63, 7, 5)),
    "we-location": ("WEConv2d", (6, 9, 1), {"excitations": ["location"], "bias": False}, (3, 6, 5, 5)),
    "we-magnitude": ("WEConv2d", (6, 9, 3), {"excitations": ("magnitude",), "groups": 3}, (3, 6, 5, 5)),
    "we-as-it-is": ("WEConv2d", (6, 9, 3), {"standardise": False, "padding": 1}, (3, 6, 5, 5)),
    "we-depthwise": ("WEConv2d", (8, 8, 3), {"padding": 1, "groups": 8}, (3, 8, 6, 6)),
    "we-conv3d": ("WEConv3d", (4, 6, 3), {"padding": 1, "stride": (1, 2, 2)}, (2, 4, 3, 5, 4)),
    "we-linear-4d": ("WELinear", (12, 8), {}, (2, 3, 5, 12)),
}
NORMED = [name for name in LAYERS if name.startswith(("dcd", "cgc"))]
METHODS = ["dcd", "cgc", "weightnet", "we"]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def make_layer(name, dtype=torch.float64):
    kind, arguments, settings, shape = LAYERS[name]
    layer = randomize(getattr(models, kind)(*arguments, **settings).to(dtype))
    return layer, torch.randn(*shape, dtype=dtype)


def average_bins(sample, sizes):
    """[C, prod(sizes)]: means over the bins of a grid on a sample [C, *S]."""
    spans = []
    for n, k in zip(sample.shape[1:], sizes, strict=True):
        spans.append([slice(i * n // k, -(-(i + 1) * n // k)) for i in range(k)])
    bins = [sample[(slice(None), *bin)].flatten(1).mean(1) for bin in itertools.product(*spans)]
    return torch.stack(bins, dim=1)


def normalised(norm, z, training):
    """z [B, C, N] with the statistics of the channels over batch and positions."""
    mean, variance = norm.running_mean, norm.running_var
    if training:
        mean, variance = z.mean((0, 2)), z.var((0, 2), unbiased=False)
    scaled = (z - mean[:, None]) / (variance + norm.eps).sqrt()[:, None]
    return scaled * norm.weight[:, None] + norm.bias[:, None]


def hard_sigmoid(z):
    return (z + 3).clamp(0, 6) / 3


def naive_dcd(layer, x):
    """y = Lambda(x) (W0 x + b) + P (z + norm(Phi(x) z)), where z = norm(Q^T x)."""
    dims, branch = x.ndim - 2, layer.attention
    geometry = layer.stride, layer.padding, layer.dilation
    # Q^T acts on what the central tap of the kernel sees
    q = torch.zeros(layer.rank, *layer.weight.shape[1:], dtype=x.dtype)
    q[(..., *[(k - 1) // 2 for k in layer.kernel_size])] = layer.q
    maps = torch.stack([CONV[dims](sample[None], q, None, *geometry)[0] for sample in x])
    z = normalised(layer.bn1, maps.flatten(2), layer.training)
    fused, scales = [], []
    for i, sample in enumerate(x):
        hidden = branch.fc.weight @ average_bins(sample, [layer.pool] * dims).flatten()
        hidden = hidden * hard_sigmoid(branch.gate_fc.weight @ hidden)
        fused.append((branch.phi_fc.weight @ hidden).reshape(layer.rank, layer.rank) @ z[i])
        scales.append(hard_sigmoid(branch.scale_fc.weight @ hidden))
    z = normalised(layer.bn2, torch.stack(fused), layer.training) + z
    samples = []
    for i, sample in enumerate(x):
        static = CONV[dims](sample[None], layer.weight, layer.bias, *geometry)[0]
        samples.append(static * scales[i].reshape(-1, *[1] * dims) + (layer.p @ z[i]).reshape(static.shape))
    return torch.stack(samples)


def naive_cgc(layer, x):
    """W sigmoid(G_in + G_out), weight by weight."""
    gate = layer.attention
    contexts = torch.stack([average_bins(sample, layer.kernel_size) @ gate.encode.weight.T for sample in x])
    into = normalised(gate.in_norm, contexts, layer.training).clamp(min=0) @ gate.in_decode.weight.T
    between = normalised(gate.context_norm, contexts, layer.training).clamp(min=0)
    c_out, c_in = gate.interact.weight.shape
    mixed = [gate.interact.weight @ group for group in between.split(c_in, dim=1)]
    out = normalised(gate.out_norm, torch.cat(mixed, dim=1), layer.training).clamp(min=0) @ gate.out_decode.weight.T
    samples = []
    for i, sample in enumerate(x):
        kernel = []
        for o in range(layer.out_channels):
            first = o // (layer.out_channels // layer.groups) * layer.weight.shape[1]
            logits = torch.stack([into[i, first + j] + out[i, o] for j in range(layer.weight.shape[1])])
            kernel.append(layer.weight[o] / (1 + (-logits.reshape(layer.weight.shape[1:])).exp()))
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        samples.append(CONV[x.ndim - 2](sample[None], torch.stack(kernel), layer.bias, *geometry)[0])
    return torch.stack(samples)


def naive_weightnet(layer, x):
    """alpha = sigmoid(FC2(FC1(GAP x))), and a linear layer for every slice of the kernel of every output channel."""
    k, samples = layer.kernel_num, []
    for sample in x:
        hidden = layer.reduce.weight @ sample.flatten(1).mean(1) + layer.reduce.bias
        alpha = 1 / (1 + (-(layer.attend.weight @ hidden + layer.attend.bias)).exp())
        entries, pieces = iter(alpha.split(k)), []
        for o in range(layer.out_channels):
            flat = layer.weight[:, o].flatten(1)
            for piece in flat.chunk(layer.slices, dim=1):
                pieces.append(next(entries) @ piece)
        kernel = torch.cat(pieces).reshape(layer.weight.shape[1:])
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        samples.append(CONV[x.ndim - 2](sample[None], kernel, layer.bias, *geometry)[0])
    return torch.stack(samples)


def naive_we(layer, x):
    """Standardise, excite by location, excite by magnitude, output channel by output channel."""
    kernel, size = [], layer.weight[0].numel()
    for weight in layer.weight:
        if layer.standardise:
            deviation = ((weight - weight.mean()).square().sum() / (size - 1)).sqrt()
            weight = (weight - weight.mean()) / (deviation + 1e-5)
        if "location" in layer.excitations:
            fc1, fc2 = layer.attention.fc1, layer.attention.fc2
            hidden = (fc1.weight @ weight.flatten(1).mean(1) + fc1.bias).clamp(min=0)
            attention = 1 / (1 + (-(fc2.weight @ hidden + fc2.bias)).exp())
            weight = weight * attention.reshape(-1, *[1] * len(layer.kernel_size))
        kernel.append(weight)
    kernel = torch.stack(kernel)
    if "magnitude" in layer.excitations:
        limit = 1.1 * kernel.detach().abs().max()
        kernel = limit * 0.5 * ((1 + kernel / limit) / (1 - kernel / limit)).log()
    if layer.standardise:
        kernel = kernel / size**0.5
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    return torch.stack([CONV[x.ndim - 2](sample[None], kernel, layer.bias, *geometry)[0] for sample in x])


NAIVE = {"dcd": naive_dcd, "cgc": naive_cgc, "weightnet": naive_weightnet, "we": naive_we}


def naive_layer(name, layer, x):
    naive = NAIVE[name.split("-")[0]]
    if "linear" not in name:
        return naive(layer, x)
    y = naive(layer, x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2))
    return y.transpose(1, 2).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_equations(name, training):
    layer, x = make_layer(name)
    layer.train(training)
    x.requires_grad_()
    expected = naive_layer(name, layer, x)
    y = layer(x)
    assert_same(y, expected)
    for value, reference in zip(gradients(y, layer, x), gradients(expected, layer, x), strict=True):
        assert reference.abs().sum() > 0
        assert difference(value, reference) <= 1e-9


@pytest.mark.parametrize("name", LAYERS)
def test_float32_and_autocast(name):
    layer, x = make_layer(name)
    expected = naive_layer(name, layer.eval(), x).detach()
    layer, x = layer.float(), x.float()
    assert_same(layer(x), expected, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    # several matrix products follow each other, each rounded
    assert difference(y, expected) <= 4 * RELATIVE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dcd-conv2d", "cgc-conv2d", "weightnet-conv2d", "we-conv2d"])
def test_whole_layer_in_another_type(name, dtype):
    layer, x = make_layer(name, torch.float32)
    expected = layer.eval()(x)
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert difference(y, expected) <= 4 * RELATIVE[dtype]


@pytest.mark.parametrize("name", LAYERS)
def test_samples_are_independent_in_eval_mode(name):
    assert_samples_are_independent(*make_layer(name))


@pytest.mark.parametrize("name", [name for name in NORMED if name.startswith("cgc")] + ["dcd-linear-2d"])
def test_single_sample_in_train_mode(name):
    """The running statistics stand in for those of a single sample, and stay."""
    assert_single_sample_is_evaluated(*make_layer(name))


@pytest.mark.parametrize("name", ["dcd-conv2d", "dcd-stride", "weightnet-conv2d", "we-conv2d"])
def test_single_map_in_train_mode(name):
    """The statistics of the positions of one map are those of any BatchNorm, and need no other sample."""
    layer, x = make_layer(name)
    layer.train()
    expected = naive_layer(name, layer, x[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(layer(x[:1]), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_surroundings(name):
    """Copies, channels-last memory, and tracing without graph breaks change nothing."""
    layer, x = make_layer(name)
    expected = layer.eval()(x)
    copied = copy.deepcopy(layer)
    copied.load_state_dict(layer.state_dict())
    assert torch.equal(copied(x), expected)
    if x.ndim == 4 and "linear" not in name:
        last = copied.to(memory_format=torch.channels_last)
        assert_same(last(x.to(memory_format=torch.channels_last)), expected)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_same(compiled(x), expected)
    assert layer.method_repr() in repr(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_kept_weights(name):
    kind, arguments, settings, shape = LAYERS[name]
    if name.startswith("we-"):
        settings = {**settings, "standardise": False}
    layer = getattr(models, kind)(*arguments, **settings).double().eval()
    static = torch.randn(layer.kernel_shape, dtype=torch.float64)
    layer.keep_weight(static[..., 0] if "linear" in name else static)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(*shape, dtype=torch.float64)
    if "linear" in name:
        expected = F.linear(x, static[..., 0], layer.bias)
    else:
        expected = CONV[x.ndim - 2](x, static, layer.bias, *layer._geometry())
    assert_same(layer(x), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.DCDConv2d(4, 4, 3, groups=2), "groups 2"),
        (lambda: models.DCDConv2d(4, 4, 3, rank=0), "rank 0 is below 1"),
        (lambda: models.DCDConv2d(4, 4, 3, pool=0), "pool 0 is below 1"),
        (lambda: models.DCDConv2d(4, 4, 3, hidden=0), "hidden 0 is below 1"),
        (lambda: models.DCDConv2d(4, 4, 3, reduction=0), r"reduction 0 is not in \(0, 1\]"),
        (lambda: models.CGCConv2d(4, 4, 1), "kernel_size 1"),
        (lambda: models.WeightNetConv2d(4, 4, 3, kernel_num=0), "kernel_num 0 is below 1"),
        (lambda: models.WeightNetConv2d(4, 4, 3, slices=0), "slices 0 is below 1"),
        (lambda: models.WeightNetConv2d(4, 4, 3, reduction=2), "reduction 2 is not in"),
        (lambda: models.WEConv2d(4, 4, 3, excitations=["size"]), "unknown excitation 'size', choose from location"),
        (lambda: models.WEConv2d(4, 4, 3, excitations=[]), "excitations is empty"),
        (lambda: models.WEConv2d(4, 4, 3, reduction=-1), "reduction -1 is not in"),
        (lambda: models.WEConv2d(4, 4, 3).keep_weight(torch.zeros(4, 4, 3, 3)), "standardise false"),
        (lambda: build_model({"model": "cgc_resnet50", "layers": ["1x1"]}), "layer 'layer1.0.conv1': kernel_size 1"),
        (lambda: build_model({"model": "cgc_resnet18", "kernel_num": 4}), "cgc has no setting 'kernel_num'"),
        (lambda: build_model({"model": "dcd_resnet18", "layers": ["3x3"], "reduction": 2}), "reduction"),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# model -> (parameters in M of the papers' tables, allowed difference in M); WeightNet's and WE's settings there are
# unknown, and these the nearest
TABLES = {
    "dcd_resnet18": (14.703, 5e-4),
    "dcd_resnet50": (29.835, 5e-4),
    "dcd_mobilenetv2_100": (5.720, 5e-4),
    "dcd_mobilenetv2_075": (4.082, 5e-4),
    "dcd_mobilenetv2_050": (3.057, 5e-4),
    "cgc_resnet18": (11.69, 0.035),
    "cgc_resnet50": (25.59, 5e-3),
    "weightnet_resnet18": (11.93, 0.02),
    "weightnet_resnet50": (30.38, 0.17),
    "we_resnet18": (11.90, 0.04),
    "we_resnet50": (28.10, 0.02),
}


@pytest.mark.parametrize("name", TABLES)
def test_parameters_of_the_tables(name):
    with torch.device("meta"):
        model = build_model({"model": name})
    expected, allowed = TABLES[name]
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - expected) <= allowed


def test_what_is_replaced():
    with torch.device("meta"):
        names = {name: list(replaced(build_model({"model": name}))) for name in TABLES}
        other = list(replaced(build_model({"model": "dcd_convnext_atto"})))
    static = {"conv1", "layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"}
    assert len(names["dcd_resnet18"]) == 17 and "fc" in names["dcd_resnet18"]
    assert not static & set(names["dcd_resnet18"])
    assert len(names["cgc_resnet50"]) == 17 and "conv1" in names["cgc_resnet50"]
    assert len(names["dcd_mobilenetv2_050"]) == 33 and "conv_head" not in names["dcd_mobilenetv2_050"]
    assert static & set(names["we_resnet18"]) == static - {"conv1"}
    assert "head.fc" in other and not any("dw" in name for name in other)


def test_activation_by_magnitude():
    """The larger a weight, the larger its gradient: 1 / (1 - (w / M)^2)."""
    weight = torch.tensor([-2.0, -0.5, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    weight_excitation.activate(weight).sum().backward()
    assert_same(weight.grad, 1 / (1 - (weight / 2.2) ** 2))
    assert_same(weight_excitation.deactivate(weight_excitation.activate(weight)), weight)
    assert weight_excitation.activate(torch.zeros(3)).abs().sum() == 0


def test_inverted_bottleneck_sizes():
    """The rule of the tables, for layers of MobileNetV2."""
    assert dcd.inverted_bottleneck_sizes(16, 96) == {"pool": 2, "rank": 8}
    assert dcd.inverted_bottleneck_sizes(96, 24) == {"pool": 1, "rank": 12}
    assert dcd.inverted_bottleneck_sizes(960, 320) == {"pool": 1, "rank": 40}
    assert dcd.inverted_bottleneck_sizes(8, 8) == {"pool": 1, "rank": 4}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("method", METHODS)
def test_any_network(method, backbone):
    """Every parameter is used, evaluation sees one sample at a time, and float64 works."""
    try:
        model = convert(timm.create_model(backbone, num_classes=4), method).double()
    except ValueError as error:
        assert method == "cgc" and "no layer" in str(error)
        return
    assert set(replaced(model).values()) == {method} and temperature_range(model) == (0.0, 0.0)
    size = model.default_cfg["input_size"][-1] if "vit" in backbone else 32
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        together = model.eval()(x)
        assert_same(model(x[1:]), together[1:], torch.float32)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), together)


@pytest.mark.parametrize("method", METHODS)
def test_convert_keeps_weights(method):
    static = timm.create_model("test_resnet", num_classes=4).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    settings = {"standardise": False} if method == "we" else {}
    model = convert(copy.deepcopy(static), method, keep_weights=True, **settings)
    assert_same(model(x), static(x), torch.float32)
    if method == "we":
        model = copy.deepcopy(static)
        with pytest.raises(ValueError, match="standardise false"):
            convert(model, "we", keep_weights=True)
        assert torch.equal(model(x), static(x))


@pytest.mark.parametrize("method", METHODS)
def test_one_optimizer_step(method):
    """A step against the gradient lowers the loss."""
    model = build_model({"model": f"{method}_test_resnet"}, num_classes=4)
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]


def test_layers_of_a_block_share_their_reduced_input():
    model = build_model({"model": "weightnet_resnet18"}, num_classes=4).eval()
    block = model.layer2[0]
    assert block.conv1.reduce is not None and block.conv2.reduce is None and block.downsample[0].reduce is None
    assert len({id(layer._relay) for layer in (block.conv1, block.conv2, block.downsample[0])}) == 1
    seen = []
    for layer in (block.conv1, block.conv2, block.downsample[0]):
        layer.attend.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 64, 8, 8)
    block(x)
    assert_same(seen[0], F.linear(x.mean((2, 3)), block.conv1.reduce.weight, block.conv1.reduce.bias))
    assert seen[0] is seen[1] is seen[2]


def test_unknown_model_names_the_methods():
    with pytest.raises(ConfigError, match="weightnet_resnet18"):
        build_model({"model": "weightnett_resnet18"})
