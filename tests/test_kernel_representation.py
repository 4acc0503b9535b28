"""Kernel Representation: units and networks against the equations written out, and in every surrounding."""

import copy
import io
import itertools
import math
import socket
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from tolerance import RELATIVE, assert_same, difference
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from models import KRConv1d, KRConv2d, KRConv3d, KRLinear, build_model, convert, set_temperature, temperature_range
from models.config import ConfigError
from models.layers import KRClassifier
from models.layers.kernel_representation import Step, low_frequencies, unit_parts
from models.layers.relay import Relay

# --- the equations, sample by sample ------------------------------------------------------------


def affine(layer, vector):
    weight = layer.weight.flatten(1)
    return weight @ vector if layer.bias is None else weight @ vector + layer.bias


def naive_kernel(layer, attention):
    """Equation 1, and ODConv's equation 2: every entry of every kernel times its attentions, and their sum."""
    total = 0
    for k, kernel in enumerate(layer.weight):
        kernel = kernel * attention["kernel"][k] if "kernel" in attention else kernel
        rows = []
        for o, row in enumerate(kernel):
            group = o // (layer.out_channels // layer.groups)
            first = group * row.shape[0]
            if "channel" in attention:
                own = attention["channel"][first : first + row.shape[0]]
                row = row * own.reshape(-1, *[1] * (row.ndim - 1))
            if "spatial" in attention:
                row = row * attention["spatial"].reshape(row.shape[1:])
            if "filter" in attention:
                row = row * attention["filter"][o]
            rows.append(row)
        total = total + torch.stack(rows)
    return total


def naive_attentions(heads, hidden):
    result = {}
    for name in ("channel", "filter", "spatial", "kernel"):
        if hasattr(heads, f"{name}_fc"):
            z = affine(getattr(heads, f"{name}_fc"), hidden)
            result[name] = z.exp() / z.exp().sum() if name == "kernel" else 1 / (1 + (-z).exp())
    return result


def naive_norm(norm, values):
    if isinstance(norm, nn.Identity):
        return values
    mean, variance = norm.running_mean, norm.running_var
    if norm.training and len(values) > 1:
        mean, variance = values.mean(0), values.var(0, unbiased=False)
    return (values - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def naive_unit(layers, x, d, between=()):
    """Output [B, ...] and d_{i+1} of a unit; between: what comes after each of its layers but the last."""
    tokens = isinstance(layers[0], KRLinear)
    generator = layers[-1].generator
    outputs, news = [], []
    for index, sample in enumerate(x):
        pooled = sample.reshape(-1, sample.shape[-1]).mean(0) if tokens else sample.flatten(1).mean(1)
        # equation 4
        fused = affine(layers[0].fusion.fuse, pooled if d is None else torch.cat([d[index], pooled]))
        # equation 5
        hidden = affine(layers[0].fusion.hidden, fused).clamp(min=0)
        everything = []
        for layer, act in itertools.zip_longest(layers, between):
            attention = naive_attentions(layer.attention, hidden)
            everything += attention.values()
            kernel = naive_kernel(layer, attention)
            if tokens:
                sample = F.linear(sample, kernel[..., 0], layer.bias)
            else:
                conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[kernel.ndim]
                geometry = layer.stride, layer.padding, layer.dilation, layer.groups
                sample = conv(sample[None], kernel, layer.bias, *geometry)[0]
            sample = act(sample) if act else sample
        outputs.append(sample)
        if generator is not None:
            # equation 6
            encoded = generator.encode.weight @ torch.cat(everything)
            news.append(affine(generator.project, torch.cat([fused, encoded])))
    if generator is None:
        return torch.stack(outputs), None
    # equation 7
    return torch.stack(outputs), torch.cat([d, naive_norm(generator.norm, torch.stack(news))], dim=1)


def naive_frequencies(image):
    """Section 3.3, with PyTorch's FFT."""
    spectrum = torch.fft.fft2(image, norm="forward").abs()
    height, width = image.shape[-2:]
    picked = [spectrum[..., u % height, v % width] for u in range(-4, 4) for v in range(8)]
    return torch.stack(picked, dim=-1).flatten(1)


def randomize(module):
    """Parameters and statistics of a sane size, none of them at its initial value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(max(parameter[0].numel(), 4)))
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
                part.weight.add_(1.0)
    return module


def gradients(outputs, inputs):
    seeded = torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=seeded, dtype=torch.float64).to(y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, inputs, seeds)


# name -> (layers of the unit, what is between them, shape of the input, settings)
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
    assert layer.fusion.hidden.in_features == 8 and layer._relay.value is None
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


# --- a whole network ------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Net(nn.Module):
    """One unit of every kind, a short cut, and a classifier."""

    def __init__(self, channels=3, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, 2, 1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.mlp = Mlp(12)
        if classes:
            self.head = nn.Linear(12, classes)

    def forward(self, x):
        x = F.gelu(self.stem(x))
        x = x + F.gelu(self.conv(x))
        x = F.gelu(self.pointwise(self.depthwise(x)))
        x = x.flatten(2).transpose(1, 2)
        x = (x + self.mlp(x)).mean(1)
        return self.head(x) if hasattr(self, "head") else x


SETTINGS = {"kernel_num": 2, "representation_dim": 6}
LAYERS = ["conv", "depthwise", "pointwise", "mlp.fc1", "mlp.fc2"]


def make_net(training=False, dtype=torch.float64, channels=3, classes=5, **settings):
    net = randomize(convert(Net(channels, classes), "kr", **{**SETTINGS, **settings}))
    return net.to(dtype).train(training)


def image(batch=3, size=12, dtype=torch.float64, channels=3):
    seeded = torch.Generator().manual_seed(batch)
    return torch.randn(batch, channels, size, size, generator=seeded, dtype=torch.float64).to(dtype)


def naive_net(net, x):
    """The chain of section 3.3, from the image's frequencies to the classifier of feature and representation."""
    start = net.kernel_representation.start
    if isinstance(start, nn.Linear):
        d = torch.stack([affine(start, sample) for sample in naive_frequencies(x)])
    else:
        d = torch.stack([start.vector] * len(x))
    x = F.gelu(F.conv2d(x, net.stem.weight, net.stem.bias, 2, 1))
    y, d = naive_unit([net.conv], x, d)
    x = x + F.gelu(y)
    x, d = naive_unit([net.depthwise], x, d)
    x, d = naive_unit([net.pointwise], x, d)
    x = F.gelu(x).flatten(2).transpose(1, 2)
    y, d = naive_unit([net.mlp.fc1, net.mlp.fc2], x, d, [F.gelu])
    x = (x + y).mean(1)
    return x @ net.head.weight[:, :12].T + d @ net.head.weight[:, 12:].T + net.head.bias, d


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("start", ["frequency", "learned"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_network_equals_equations(training, start, norm):
    net = make_net(training, representation_start=start, representation_norm=norm)
    assert list(net.conversion) == [*LAYERS, "head"]
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


# --- forward passes beside and after each other ------------------------------------------------------------


def relay_of(net):
    return net.kernel_representation._relay


def assert_empty(net):
    assert relay_of(net).value is None and relay_of(net).position == 0


def test_nothing_outlives_a_forward_pass():
    for net in (make_net(), make_net(classes=0)):
        for batch in (2, 5, 1):
            assert torch.equal(net(image(batch)), net(image(batch)))
            assert_empty(net)


@pytest.mark.parametrize("name", ["conv", "mlp.fc1", "mlp.fc2", "head"])
def test_nothing_outlives_an_exception(name):
    net = make_net()
    expected = net(image())

    def fail(module, args):
        raise KeyError("stopped")

    handle = net.get_submodule(name).register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="stopped"):
        net(image(4))
    assert_empty(net)
    handle.remove()
    assert torch.equal(net(image()), expected)


def test_features_and_head_apart():
    """timm's two halves of a forward pass."""
    model = build_model({"model": "kr_vit_nano_cifar"}, num_classes=5).eval()
    x = image(2, 32, torch.float32)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    # features alone: the next pass starts anew
    model.forward_features(x[:1])
    assert torch.equal(model.forward_head(features := model.forward_features(x)), model(x))
    assert features.shape == (2, 65, 128)


def test_threads_do_not_meet():
    """Two passes of different batches that wait for each other before every layer."""
    net = make_net()
    inputs = [image(2), image(5)]
    expected = [net(x) for x in inputs]
    barrier, results, errors = threading.Barrier(2, timeout=60), [None, None], []

    def wait(module, args):
        barrier.wait()

    handles = [net.get_submodule(name).register_forward_pre_hook(wait) for name in LAYERS]

    def run(i):
        try:
            for _ in range(3):
                results[i] = net(inputs[i])
            assert_empty(net)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    assert not errors, errors
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (lambda net: net.conv(torch.randn(2, 8, 5, 5).double()), ["'conv'", "after the model's first layer"]),
        (lambda net: net.mlp(torch.randn(2, 4, 12).double()), ["'mlp.fc1'", "after 'pointwise'"]),
        (lambda net: net.head(torch.randn(2, 12).double()), ["'head'", "after 'mlp.fc2'"]),
        (lambda net: [net.stem(image()), net.conv(torch.randn(3, 8, 6, 6).double())] * 2 + [net.conv(
            torch.randn(3, 8, 6, 6).double())], ["'conv'", "once"]),
    ],
    ids=["alone", "mlp", "classifier", "twice"],
)  # fmt: skip
def test_out_of_order_is_an_error(run, named):
    net = make_net()
    with pytest.raises(RuntimeError) as error:
        run(net)
    assert all(word in str(error.value) for word in named) and "\n" not in str(error.value)
    assert torch.equal(net(image()), net(image()))


def test_gradient_checkpointing_is_an_error():
    model = build_model({"model": "kr_vit_nano_cifar"}, num_classes=5).train()
    model.set_grad_checkpointing()
    loss = model(image(2, 32, torch.float32)).sum()
    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        loss.backward()


def test_samples_are_independent_in_eval_mode():
    net = make_net()
    together = net(image(4))
    for i in range(4):
        assert difference(net(image(4)[i : i + 1])[0], together[i]) < 1e-12


def test_single_sample_in_train_mode():
    net = make_net()
    expected, before = net(image(1)), copy.deepcopy(net.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        result = net.train()(image(1))
    assert len([w for w in caught if "running statistics" in str(w.message)]) == 1
    assert_same(result, expected)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


# --- copies and surroundings ------------------------------------------------------------


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "ema": lambda model: ModelEmaV3(model, decay=0.5).module}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole_and_apart(how):
    net = make_net()
    other = COPIES[how](net)
    expected = net(image())
    assert torch.equal(other(image()), expected)
    assert other.state_dict().keys() == net.state_dict().keys()
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in net.parameters()}
    relay = relay_of(other)
    assert relay is not relay_of(net)
    assert all(m._relay is relay for m in other.modules() if hasattr(m, "_relay"))
    # the hooks are the copy's own
    with torch.no_grad():
        other.kernel_representation.start.weight += 1
    assert difference(other(image()), expected) > 1e-3
    assert torch.equal(net(image()), expected)
    assert_empty(other)


def test_hooks_of_an_unpickled_model_are_not_overwritten(monkeypatch):
    """A new process counts its hooks from 0 again."""
    file = io.BytesIO()
    net = make_net()
    torch.save(net, file)
    file.seek(0)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    other = torch.load(file, weights_only=False)
    last = max(other.stem._forward_pre_hooks)
    for _ in range(last + 2):
        other.stem.register_forward_pre_hook(lambda *_: None)
        other.register_forward_hook(lambda *_: None)
    assert torch.equal(other(image()), net(image()))


def test_state_dict_round_trip():
    net, other = make_net(), make_net()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(image()), net(image()))
    assert not [key for key in net.state_dict() if "temperature" in key]


def test_ema_follows():
    net = make_net()
    ema = ModelEmaV3(net, decay=0.75)
    before = net.kernel_representation.start.weight.clone()
    with torch.no_grad():
        net.kernel_representation.start.weight += 1
    ema.update(net)
    assert_same(ema.module.kernel_representation.start.weight, before + 0.25)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _ddp_worker(rank, world, port, state, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    net = convert(Net(), "kr", **SETTINGS).double().eval()
    net.load_state_dict(state)
    parallel = DistributedDataParallel(net)
    for _ in range(2):
        # the second pass would complain of parameters without a gradient
        net.zero_grad()
        parallel(image(4)[rank * 2 : rank * 2 + 2]).square().mean().backward()
    if rank == 0:
        results.put({name: p.grad.numpy() for name, p in net.named_parameters()})
        results.close()
        results.join_thread()
    dist.barrier()
    dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    net = make_net(training=True)
    other = copy.deepcopy(net)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(net)
        for _ in range(2):
            # the second pass would complain of parameters without a gradient
            for model in (parallel, other):
                model.zero_grad()
                model(image(4)).square().mean().backward()
            assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), other.parameters()))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one():
    net = make_net()
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = mp.spawn(_ddp_worker, (2, _free_port(), net.state_dict(), results), nprocs=2, join=False)
    gradient = results.get(timeout=120)
    assert any(workers.join(timeout=60) for _ in range(2))
    net(image(4)).square().mean().backward()
    for key, parameter in net.named_parameters():
        assert difference(torch.from_numpy(gradient[key]), parameter.grad) < 1e-10, key


@pytest.mark.parametrize("settings", [{}, {"representation": False}, {"representation_start": "learned"}], ids=str)
def test_compile_without_graph_breaks(settings):
    net = make_net(dtype=torch.float32, **settings)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, backend=counting, fullgraph=True)
    for batch in range(1, 5):
        assert_same(compiled(image(batch, 12, torch.float32)), net(image(batch, 12, torch.float32)))
    # one for the first batch size, one for all others
    assert len(graphs) <= 2


def test_compiled_gradients():
    net = make_net(training=True, dtype=torch.float32)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = image(4, 12, torch.float32)
    values = torch.autograd.grad(compiled(x).square().sum(), list(net.parameters()))
    assert_empty(net)
    references = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    # observed at most 4e-6
    assert max(difference(v, r) for v, r in zip(values, references)) < 1e-4


@pytest.mark.slow
def test_inductor():
    net = make_net(dtype=torch.float32)
    x = image(4, 12, torch.float32)
    compiled = torch.compile(net, fullgraph=True)
    assert_same(compiled(x), net(x))
    compiled(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_export():
    net = make_net(dtype=torch.float32)
    x = image(2, 12, torch.float32)
    program = torch.export.export(net, (x,))
    assert_same(program.module()(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_network_in_another_type(dtype):
    net = make_net()
    expected = net(image())
    y = net.to(dtype)(image(dtype=dtype))
    assert y.dtype == dtype
    # a dozen layers of rounding; observed 6e-7 and 2e-2
    assert difference(y, expected) <= 5 * RELATIVE[dtype]


def test_autocast():
    net = make_net(dtype=torch.float32)
    x = image(3, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = net.train()(x)
        y.float().sum().backward()
        result = net.eval()(x)
    assert y.dtype == torch.bfloat16 and all(p.grad.isfinite().all() for p in net.parameters())
    assert difference(result, net(x)) <= 5 * RELATIVE[torch.bfloat16]


def test_channels_last():
    net = make_net(dtype=torch.float32, kernel_num=4)
    x = image(2, 12, torch.float32)
    expected = net(x)
    net.to(memory_format=torch.channels_last)
    assert net.conv.weight.is_contiguous()
    assert_same(net(x.to(memory_format=torch.channels_last)), expected)


# --- settings ------------------------------------------------------------


def test_without_representation():
    """Table 6, dynamic kernels without kernel representation: units that see their input only, and nothing else."""
    net = make_net(representation=False)
    assert type(net.head) is nn.Linear and not hasattr(net, "kernel_representation")
    assert list(net.conversion) == LAYERS
    assert not [key for key in net.state_dict() if "generator" in key]
    x = image()
    y = F.gelu(F.conv2d(x, net.stem.weight, net.stem.bias, 2, 1))
    y = y + F.gelu(naive_unit([net.conv], y, None)[0])
    y = naive_unit([net.pointwise], naive_unit([net.depthwise], y, None)[0], None)[0]
    y = F.gelu(y).flatten(2).transpose(1, 2)
    y = (y + naive_unit([net.mlp.fc1, net.mlp.fc2], y, None, [F.gelu])[0]).mean(1)
    assert_same(net(x), net.head(y))
    # units can run on their own, in any order
    net.mlp(torch.randn(2, 4, 12).double())
    with pytest.raises(RuntimeError, match=r"'mlp.fc2' ran out of order.* after 'mlp.fc1'"):
        net.mlp.fc2(torch.randn(2, 4, 24).double())


def test_learned_start_is_the_same_for_all_images():
    net = make_net(representation_start="learned")
    start = net.kernel_representation.start
    assert [tuple(p.shape) for p in start.parameters()] == [(64,)]
    assert torch.equal(start(image(2)), start.vector.expand(2, -1))


def test_without_norm():
    net = make_net(representation_norm=False)
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
    assert net.conv.generator.project.bias is not None


@pytest.mark.parametrize("settings", [
    {"kernel_num": 1}, {"kernel_num": 8}, {"reduction": 1.0}, {"representation_dim": 1}, {"classes": 0},
    {"representation": False}, {"representation_start": "learned"}, {"representation_norm": False},
    {"attentions": ["kernel"]}, {"attentions": ["channel", "kernel"]}, {"channels": 5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_parameter_matters(settings, training):
    net = make_net(training, **settings)
    x = image(4, channels=settings.get("channels", 3))
    net(x).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_sizes_follow_from_the_settings():
    """Table 7."""
    for kernel_num, reduction, size, hidden in ((1, 1 / 4, 16, 8), (4, 1.0, 64, 12)):
        net = convert(Net(), "kr", kernel_num=kernel_num, reduction=reduction, representation_dim=size)
        assert net.conv.weight.shape == (kernel_num, 8, 8, 3, 3)
        assert net.mlp.fc1.fusion.fuse.weight.shape == (hidden, 64 + 3 * size + 12)
        assert net.head.in_features == 12 + 64 + 4 * size
    wide = convert(nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1)), "kr", reduction=0.5)
    assert wide[1].fusion.hidden.in_features == 32


@pytest.mark.parametrize(
    ("backbone", "size", "units"),
    [
        # section 4.1
        ("resnet18", 32, 16),
        ("resnet34", 32, 32),
        ("resnet18_slim", 32, 16),
        ("resnet50", 16, 48),
        ("resnet101", 16, 99),
        ("mobilenetv2_100", 16, 51),
        ("mobilenetv2_050", 16, 51),
        ("vit_nano", 32, 12),
        ("vit_small", 32, 12),
        # 12 MLPs and 3 patch embeddings
        ("poolformer_s12", 32, 15),
        ("convnext_atto", 32, 2 * 12 + 3),
    ],
)
def test_sizes_of_section_4(backbone, size, units):
    with torch.device("meta"):
        model = build_model({"model": f"kr_{backbone}", "kernel_num": 4})
    assert isinstance(model.get_classifier(), KRClassifier)
    assert model.get_classifier().in_features == model.num_features + 64 + size * units
    assert model.kernel_representation.start.weight.shape == (64, 192)


def test_kernel_representation_costs_little():
    """Table 5: 4 M more multiplications than ODConv (1x) in MobileNetV2, all of them in linear layers of vectors."""
    with torch.device("meta"):
        ours, odconv = (build_model({"model": f"{name}_mobilenetv2_100"}) for name in ("kr", "od"))
    more = sum(p.numel() for p in ours.parameters()) - sum(p.numel() for p in odconv.parameters())
    assert 3.5e6 < more < 4.5e6


@pytest.mark.parametrize("words", [["all", "*.attn.*"], ["blocks.*.mlp.fc2"], ["last_2_blocks"]], ids=str)
def test_layers_by_name(words):
    model = build_model({"model": "kr_vit_nano_cifar", "layers": words, "representation_dim": 8}, num_classes=5).eval()
    units = {"all": 24, "blocks.*.mlp.fc2": 12, "last_2_blocks": 2}[words[0]]
    assert model.head.in_features == 128 + 64 + 8 * units
    assert model(image(2, 32, torch.float32)).shape == (2, 5)


def test_first_layer_can_be_dynamic():
    net = convert(Net(), "kr", layers=["stem", "conv"]).eval()
    assert isinstance(net.stem, KRConv2d) and net(image(2, 12, torch.float32)).shape == (2, 5)


def test_networks_without_convolutions():
    make = lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))  # noqa: E731
    net = convert(make(), "kr", representation_start="learned")
    assert net(torch.randn(3, 6)).shape == (3, 4) and isinstance(net[4], KRClassifier)
    with pytest.raises(ValueError, match=r"the first layer, '0', is a Linear; use 'learned'"):
        convert(make(), "kr")


def test_dense_classifier():
    """Of tokens [B, N, C]: every one sees the representation."""
    relay = Relay(["head"])
    head = KRClassifier(4, 3, representation=2, relay=relay, layer="head")
    x, d = torch.randn(2, 5, 4), torch.randn(2, 2)
    relay.start(Step(d))
    expected = torch.stack([head.weight @ torch.cat([v, d[b]]) + head.bias for b in range(2) for v in x[b]])
    assert_same(head(x), expected.view(2, 5, 3))


@pytest.mark.parametrize("backbone", ["deit_tiny_distilled_patch16_224", "vit_nano_cifar"])
def test_model_without_a_classifier(backbone):
    model = build_model({"model": f"kr_{backbone}"}, 0)
    assert not [m for m in model.modules() if isinstance(m, KRClassifier)]
    assert model.blocks[-1].mlp.fc2.generator is None


def test_distilled_model_has_two_classifiers():
    with torch.device("meta"):
        model = build_model({"model": "kr_deit_tiny_distilled_patch16_224"}, 10)
    assert [type(head) for head in model.get_classifier()] == [KRClassifier] * 2


@pytest.mark.parametrize("kernel_num", [1, 4])
def test_kept_weights(kernel_num):
    """Where attentions are those of zero logits, the network computes what it did before."""
    static = Net().double().eval()
    net = convert(copy.deepcopy(static), "kr", keep_weights=True, kernel_num=kernel_num)
    assert torch.equal(net.head.weight[:, :12], static.head.weight) and not net.head.weight[:, 12:].any()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if ".attention." in name:
                parameter.zero_()
    assert difference(net(image()), static(image())) < 1e-12
    # the new columns learn
    net(image()).sum().backward()
    assert net.head.weight.grad[:, 12:].abs().max() > 0


def test_initial_classifier_is_the_model_s():
    """So that head_init_scale counts."""
    model = build_model({"model": "kr_convnext_atto", "head_init_scale": 1e-3}, 10)
    head = model.get_classifier()
    columns = model.num_features
    assert head.weight[:, :columns].abs().max() < 1e-3 < head.weight[:, columns:].abs().max()


def test_no_temperature():
    net = make_net()
    before = net(image())
    assert temperature_range(net) == (0.0, 0.0)
    set_temperature(net, 7.0)
    assert torch.equal(net(image()), before)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: convert(Net(), "kr", representation_dim=0), ["kr", "representation_dim 0 is below 1"]),
        (lambda: convert(Net(), "kr", reduction=0.0), ["kr: layer 'conv'", "reduction 0.0 is not in (0, 1]"]),
        (lambda: convert(Net(), "kr", reduction=1.5), ["reduction 1.5"]),
        (lambda: convert(Net(), "kr", kernel_num=0), ["kernel_num 0 is below 1"]),
        (lambda: convert(Net(), "kr", representation_start="fourier"), ["'fourier'", "frequency, learned"]),
        (lambda: convert(Net(), "kr", attentions=["channels"]), ["'channels'", "channel"]),
        (lambda: convert(Net(), "kr", attentions=["kernel"]), ["'conv'", "kernel_num 1", "no attention"]),
        (lambda: convert(Net(), "kr", attentions=["channel"], kernel_num=2), ["kernel_num 2 without the kernel"]),
        (lambda: convert(Net(), "kr", kernel_number=2), ["'kernel_number'", "kernel_num"]),
        (lambda: convert(Net(), "kr", layers=["body.*"]), ["'body.*'", "conv"]),
        (lambda: build_model({"model": "kr_vit_nano_cifar", "layers": ["all", "classifier"]}),
            ["'head'", "leave it out", "representation"]),
        (lambda: convert(convert(Net(), "kr"), "odconv", layers=["conv"]), ["dynamic already"]),
        (lambda: convert(convert(Net(), "kr"), "kr", layers=["stem"]), ["already", "at once"]),
        (lambda: convert(convert(Net(), "condconv", layers=["head"]), "kr"), ["'head'", "dynamic already"]),
        (lambda: convert(nn.Sequential(nn.ReLU()), "kr"), ["kr: this model has no layer"]),
        (lambda: convert(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3)), "kr"), ["'0'", "Conv1d", "learned"]),
        (lambda: build_model({"model": "kr_resnet18", "representation_dim": 0}), ["representation_dim"]),
        (lambda: build_model({"model": "kr_resnet18", "representation_start": "dct"}), ["representation_start"]),
        (lambda: build_model({"model": "od_resnet18", "representation": True}), ["odconv", "'representation'"]),
        (lambda: build_model({"model": "kr_resnet18", "sharing_range": ["conv"]}), ["kr", "'sharing_range'"]),
        (lambda: KRConv2d(4, 4, 3, reduction=2), ["reduction 2"]),
    ],
)  # fmt: skip
def test_mistakes_are_explained(make, named):
    with pytest.raises((ValueError, ConfigError)) as error:
        make()
    assert all(word in str(error.value) for word in named), str(error.value)
    assert "\n" not in str(error.value)


def test_two_methods_on_layers_of_their_own():
    net = convert(convert(Net(), "odconv", layers=["conv", "mlp.*"]), "kr", layers=["depthwise", "pointwise"])
    assert net.head.in_features == 12 + 64 + 2 * 32
    assert net(image(2, 12, torch.float32)).shape == (2, 5)


def test_failed_conversion_changes_nothing():
    net = Net()
    before = list(net.state_dict())
    for settings in ({"reduction": 2}, {"kernel_num": 0}, {"representation_dim": 0}):
        with pytest.raises(ValueError):
            convert(net, "kr", **settings)
    assert list(net.state_dict()) == before and not net._forward_hooks and not net.stem._forward_pre_hooks


# --- backbones ------------------------------------------------------------


def train_step(backbone, size, **config):
    model = build_model({"model": f"kr_{backbone}", **config}, num_classes=10)
    y = model(image(2, size, torch.float32))
    y.square().sum().backward()
    assert y.shape == (2, 10) and y.isfinite().all()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert_empty(model)
    model.eval()
    with torch.no_grad():
        assert model(image(1, size, torch.float32)).isfinite().all()


@pytest.mark.parametrize(("backbone", "size"), [("resnet18_slim", 32), ("vit_nano_cifar", 32), ("mobilenetv2_100", 32)])
def test_backbones_train(backbone, size):
    train_step(backbone, size)


@pytest.mark.slow
@pytest.mark.parametrize("kernel_num", [1, 4])
@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("resnet18", 32),
        ("resnet18_slim", 32),
        ("resnet50", 32),
        ("vit_nano", 224),
        ("vit_small", 224),
        ("vit_nano_cifar", 32),
        ("vit_tiny_cifar", 32),
        ("poolformer_s12", 64),
        ("mobilenetv2_100", 32),
        ("mobilenetv2_050", 32),
        ("convnext_atto", 64),
    ],
)
def test_all_backbones_train(backbone, size, kernel_num):
    train_step(backbone, size, kernel_num=kernel_num)
