"""Kernel Representation written from its equations, sample by sample, and a small network for its tests."""

import itertools

import layer_checks
import torch
import torch.nn.functional as F
from torch import nn

from models import KRLinear, convert


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
                # [O], or [K, O] where every kernel has its own
                row = row * attention["filter"].reshape(-1, layer.out_channels)[k % layer.attention.sets, o]
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


def naive_encoded(heads, attention):
    """What of the attentions is encoded: one number for all channels, of every kernel where each has its own."""
    parts = []
    for name, values in attention.items():
        if name in ("channel", "filter"):
            values = torch.stack([part.sum() / len(part) for part in values.chunk(heads.sets)])
        parts.append(values)
    return parts


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
        hidden = fused.clamp(min=0)
        everything = []
        for layer, act in itertools.zip_longest(layers, between):
            attention = naive_attentions(layer.attention, hidden)
            everything += naive_encoded(layer.attention, attention)
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
    """`layer_checks.randomize` with the weights of norms around 1."""
    for part in layer_checks.randomize(module).modules():
        if isinstance(part, nn.BatchNorm1d):
            part.weight.data.add_(1.0)
    return module


def gradients(outputs, inputs):
    seeded = torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=seeded, dtype=torch.float64).to(y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, inputs, seeds)


# name -> (layers of the unit, what is between them, shape of the input, settings)


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


def relay_of(net):
    return net.kernel_representation._relay


def assert_empty(net):
    relay = relay_of(net)
    assert relay.value is None and relay.position == 0 and not relay.outer
