"""Layers and networks of Kernel Representation against the paper's equations."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import replaced
from naive_representation import LAYERS, gradients, image, make_net, naive_frequencies, naive_net, naive_unit, randomize
from tolerance import assert_same, difference
from torch import nn

from models import KRConv1d, KRConv2d, KRConv3d, KRLinear
from models.methods.kernel_representation.layer import Step, low_frequencies, unit_parts
from models.methods.relay import Relay

# a coefficient of every kernel for every output channel, as in MetaFormers
PER_CHANNEL = {"attentions": ["filter"], "attention_sharing": False}
UNITS = {
    "conv1d": ([(KRConv1d, (6, 9, 5), {"padding": 2, "stride": 2})], [], (3, 6, 11), {"kernel_num": 2}),
    "conv2d": ([(KRConv2d, (6, 10, 3), {"padding": 1})], [], (3, 6, 7, 5), {"kernel_num": 3}),
    "conv2d-one": ([(KRConv2d, (6, 10, 3), {"padding": 1, "bias": False})], [], (2, 6, 5, 5), {}),
    "conv2d-groups": ([(KRConv2d, (6, 9, 3), {"groups": 3, "dilation": 2})], [], (3, 6, 6, 7), {"kernel_num": 2}),
    "depthwise": ([(KRConv2d, (8, 8, 3), {"padding": 1, "groups": 8})], [], (3, 8, 6, 6), {"kernel_num": 2}),
    "depthwise-one": ([(KRConv2d, (8, 8, 3), {"padding": 1, "groups": 8})], [], (3, 8, 6, 6), {}),
    "pointwise": ([(KRConv2d, (63, 7, 1), {})], [], (2, 63, 7, 7), {"kernel_num": 4}),
    "conv3d": ([(KRConv3d, (4, 6, 3), {"padding": 1})], [], (2, 4, 3, 5, 4), {"kernel_num": 2}),
    "equation-1": ([(KRConv2d, (6, 10, 3), {})], [], (3, 6, 5, 5), {"kernel_num": 4, "attentions": ["kernel"]}),
    "mlp": ([(KRLinear, (12, 20), {}), (KRLinear, (20, 12), {})], [F.gelu], (3, 7, 12), {"kernel_num": 2}),
    "mlp-one": ([(KRLinear, (12, 20), {}), (KRLinear, (20, 12), {"bias": False})], [F.gelu], (3, 2, 4, 12), {}),
    "mlp-conv": ([(KRConv2d, (12, 20, 1), {}), (KRConv2d, (20, 12, 1), {})], [F.gelu], (2, 12, 5, 5), {}),
    "channels-mlp": (
        [(KRLinear, (12, 20), {}), (KRLinear, (20, 12), {})],
        [F.gelu],
        (3, 7, 12),
        {"kernel_num": 3, **PER_CHANNEL},
    ),
    "channels-one": ([(KRLinear, (12, 20), {})], [], (3, 7, 12), PER_CHANNEL),
    "channels-depthwise": (
        [(KRConv2d, (8, 8, 3), {"padding": 1, "groups": 8})],
        [],
        (3, 8, 6, 6),
        {"kernel_num": 2, **PER_CHANNEL},
    ),
    "channels-groups": (
        [(KRConv2d, (6, 9, 3), {"groups": 3, "stride": 2})],
        [],
        (3, 6, 7, 7),
        {"kernel_num": 2, **PER_CHANNEL},
    ),
    "input-width": ([(KRConv2d, (16, 10, 3), {})], [], (3, 16, 5, 5), {"kernel_num": 2, "fusion_width": "input"}),
    "without-norm": ([(KRConv2d, (6, 10, 3), {})], [], (3, 6, 5, 5), {"kernel_num": 2, "norm": False}),
}
GIVEN, GENERATED = 5, 3


def make_unit(name, given=GIVEN, generated=GENERATED):
    """(layers, relay, x, d) in float64; the relay's last stop is "end"."""
    specs, _, shape, settings = UNITS[name]
    settings = {"kernel_num": 1, **settings}
    bare = [kind(*arguments, **options) for kind, arguments, options in specs]
    geometries = [(layer.in_channels, layer.out_channels, layer.taps, layer.groups) for layer in bare]
    parts = unit_parts(geometries, **settings, given=given, generated=generated)
    names = [str(i) for i in range(len(specs))]
    relay = Relay([*names, "end"])
    layers = [
        kind(*arguments, **options, kernel_num=settings["kernel_num"], parts=part, relay=relay, layer=layer)
        for (kind, arguments, options), part, layer in zip(specs, parts, names)
    ]
    layers = randomize(nn.ModuleList(layers).double())
    return layers, relay, torch.randn(*shape).double(), torch.randn(shape[0], GIVEN).double()


def run_unit(name, layers, relay, x, d):
    relay.start(Step(d))
    for layer, act in itertools.zip_longest(layers, UNITS[name][1]):
        x = act(layer(x)) if act else layer(x)
    new = relay.take("end").representation()
    relay.hand_on(None)
    return x, new


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", UNITS)
def test_unit_equals_equations(name, training):
    layers, relay, x, d = make_unit(name)
    layers.train(training)
    inputs = [x.requires_grad_(), d.requires_grad_(), *layers.parameters()]
    expected = naive_unit(list(layers), x, d, UNITS[name][1])
    result = run_unit(name, layers, relay, x, d)
    assert expected[1].shape == (len(x), GIVEN + GENERATED)
    for value, reference in zip(result, expected, strict=True):
        assert_same(value, reference)
    for value, reference in zip(gradients(result, inputs), gradients(expected, inputs), strict=True):
        assert difference(value, reference) <= 1e-9


@pytest.mark.parametrize("name", ["conv2d", "depthwise", "mlp"])
def test_gradcheck(name):
    layers, relay, x, d = make_unit(name)
    layers.eval()

    def function(x, d, *_):
        return run_unit(name, layers, relay, x, d)

    inputs = [x.requires_grad_(), d.requires_grad_(), *layers.parameters()]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["conv2d", "depthwise", "mlp-conv"])
def test_a_unit_sees_the_representation(name):
    """The columns of F that see d decide whether another d gives other kernels."""
    layers, relay, x, d = make_unit(name)
    layers.eval()
    here, other = run_unit(name, layers, relay, x, d)[0], run_unit(name, layers, relay, x, d + 1)[0]
    assert difference(other, here) > 1e-3
    with torch.no_grad():
        layers[0].fusion.fuse.weight[:, :GIVEN] = 0
    blind = run_unit(name, layers, relay, x, d)[0]
    assert difference(blind, here) > 1e-3
    assert torch.equal(run_unit(name, layers, relay, x, d + 1)[0], blind)


@pytest.mark.parametrize("kind", [KRConv1d, KRConv2d, KRConv3d, KRLinear])
def test_a_layer_alone_sees_its_input(kind):
    """Equations 2, 3 and 1, without a representation."""
    dims = {KRConv1d: 1, KRConv2d: 2, KRConv3d: 3}.get(kind)
    x = torch.randn(3, 5, 6) if dims is None else torch.randn(3, 6, *[5] * dims)
    layer = kind(6, 4, **({"kernel_size": 3} if dims else {}), kernel_num=2)
    layer = randomize(layer.double())
    assert_same(layer(x.double()), naive_unit([layer], x.double(), None)[0])
    assert layer.fusion.fuse.out_features == 8 and layer._relay.value is None
    assert "kernel_num=2" in repr(layer)


# --- the first representation ------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (224, 160), (17, 9), (8, 8), (5, 3), (1, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_low_frequencies_are_those_of_the_fft(size, dtype):
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    values = low_frequencies(image.to(dtype))
    assert values.shape == (2, 192) and values.dtype == dtype
    # observed at most 4e-16 and 2e-7
    assert_same(values, naive_frequencies(image))


def test_low_frequencies_of_waves():
    """A wave of amplitude 1 is 1/2 in its own component and nothing elsewhere, at every size."""
    for size in (32, 50):
        y = (torch.arange(size).double() / size * 2 * math.pi).view(-1, 1)
        x = y.view(1, -1)
        image = torch.cos(2 * x - 3 * y + 0.4)[None, None]
        expected = torch.zeros(8, 8).double()
        # vertical frequencies start at -4
        expected[-3 + 4, 2] = 0.5
        assert difference(low_frequencies(image).view(8, 8), expected) < 1e-12


def test_low_frequencies_have_a_finite_gradient():
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    low_frequencies(image).sum().backward()
    assert torch.equal(image.grad, torch.zeros_like(image))
    image = torch.randn(1, 1, 9, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(low_frequencies, image, fast_mode=True)


def test_low_frequencies_stay_precise_under_autocast():
    image = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        values = low_frequencies(image)
        rounded = low_frequencies(image.bfloat16())
    assert values.dtype == rounded.dtype == torch.float32
    assert torch.equal(values, low_frequencies(image))
    assert_same(rounded, low_frequencies(image.bfloat16().float()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("start", ["frequency", "learned"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_network_equals_equations(training, start, norm):
    net = make_net(training, representation_start=start, representation_norm=norm)
    assert list(replaced(net)) == [*LAYERS, "head"]
    # 4 units
    assert net.head.in_features == 12 + 64 + 4 * 6
    x = image().requires_grad_()
    expected, last = naive_net(net, x)
    assert last.shape == (3, 64 + 4 * 6)
    result = net(x)
    assert_same(result, expected)
    # the stem's bias and the like: all parameters
    inputs = [x, *net.parameters()]
    for value, reference in zip(gradients([result], inputs), gradients([expected], inputs), strict=True):
        assert reference.abs().max() > 0
        assert difference(value, reference) <= 1e-9


@pytest.mark.parametrize("direct", [True, False], ids=["all", "without the classifier's columns"])
def test_gradients_reach_the_first_generator(direct):
    """Through the classifier, and through later layers alone."""
    net = make_net(training=True)
    with torch.no_grad():
        net.head.weight[:, 12:] *= float(direct)
    net(image()).square().sum().backward()
    generator = net.conv.generator
    for parameter in [*generator.parameters(), *net.kernel_representation.parameters()]:
        assert parameter.grad.abs().max() > 1e-6
    with torch.no_grad():
        net.head.weight[:, 12:] = 0
        for layer in (net.conv, net.depthwise, net.pointwise, net.mlp.fc1):
            layer.fusion.fuse.weight[:, : layer.fusion.given] = 0
    net.zero_grad()
    net(image()).square().sum().backward()
    assert not generator.project.weight.grad.any() and not net.kernel_representation.start.weight.grad.any()


def test_classifier_sees_the_representation():
    net = make_net()
    before = net(image())
    with torch.no_grad():
        net.head.weight[:, 12:] = 0
    assert difference(net(image()), before) > 1e-3


def test_kernels_depend_on_the_layers_before():
    """Another kernel generation in the first layer, with the same features, gives other kernels in the later ones."""
    net = make_net()
    seen = []
    for name in LAYERS:
        net.get_submodule(name).attention.register_forward_hook(lambda module, args, output: seen.append(output))
    net(image())
    with torch.no_grad():
        net.conv.generator.norm.bias += 1
    net(image())
    before, after = seen[: len(LAYERS)], seen[len(LAYERS) :]
    assert all(torch.equal(after[0][key], before[0][key]) for key in before[0])
    for i in range(1, len(LAYERS)):
        assert all(difference(after[i][key], before[i][key]) > 1e-4 for key in before[i])
