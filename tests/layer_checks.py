"""What tests of single layers share: random values, gradients, naive kernels, and what all layers promise."""

import copy
import math

import pytest
import torch
from tolerance import assert_same
from torch import nn


def randomize(module):
    """Gives parameters and statistics a sane size, and none of them its initial value; returns the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(max(parameter[0].numel(), 4)))
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
    return module


def gradients(y, layer, x):
    """Gradients of the input and of all parameters, for a random gradient of the output."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, [x, *layer.parameters()], dy)


def kernel_of_cells(mixtures, shape):
    """A kernel of a shape [O, C, *K] from mixed cells [m, co, ci, ...], block by block: positions, outputs, inputs."""
    c_out, c_in = mixtures.shape[1:3]
    kernel, cells = torch.zeros(shape, dtype=mixtures.dtype), iter(mixtures)
    for position in torch.cartesian_prod(*[torch.arange(k) for k in shape[2:]]).reshape(-1, len(shape) - 2):
        for o in range(0, shape[0], c_out):
            for i in range(0, shape[1], c_in):
                where = (slice(o, o + c_out), slice(i, i + c_in), *position.tolist())
                kernel[where] = next(cells).reshape(c_out, c_in)
    return kernel


def assert_samples_are_independent(layer, x):
    """In evaluation a sample's output is the same alone and beside others."""
    together = layer.eval()(x)
    for i in range(len(x)):
        assert_same(layer(x[i : i + 1])[0], together[i])


def assert_single_sample_is_evaluated(layer, x):
    """In train mode the running statistics take the place of those of a single sample, and are left unchanged."""
    before = copy.deepcopy(layer.state_dict())
    with pytest.warns(UserWarning, match="a batch of one sample in train mode"):
        y = layer.train()(x[:1])
    assert_same(y, layer.eval()(x[:1]))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def counting_backend(graphs):
    """A backend of torch.compile that runs graphs as they are, and appends them to a list."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    return backend


@torch.no_grad()
def take_statistics(model, x):
    """Give every BatchNorm the statistics of `x`, as a training would: fresh ones do not fit the weights."""
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.momentum = 1.0
    model.train()(x)
