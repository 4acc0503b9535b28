"""Layers whose weight the network reads itself: found by a trial run, and left static."""

import contextlib
import warnings

import pytest
import timm
import torch
from tolerance import assert_same
from torch import nn

from models import KWConv2d, convert, set_temperature
from models.anatomy import replaceable
from models.methods import METHODS
from models.trial import Trial, try_out

# KW (1/2x) is for MobileNetV2 alone
ANYWHERE = [name for name in METHODS if name != "kw1d2x"]


class Reading(nn.Module):
    """The weight of `read` is a number of the network's own; that of `plain` only its layer's."""

    def __init__(self):
        super().__init__()
        self.stem, self.plain, self.read = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.plain(self.stem(x))
        return self.head(nn.functional.conv2d(x, self.read.weight * 2, self.read.bias).mean((2, 3)))


class Encoder(nn.Module):
    """PyTorch's encoder hands the weights of its MLP to one operator, in evaluation only."""

    def __init__(self):
        super().__init__()
        self.embed, self.encode = nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encode(self.embed(x)))


@pytest.mark.parametrize("method", ANYWHERE)
def test_such_layers_stay_static_by_default(method):
    net = Reading().double().eval()
    layers = {} if method.startswith("kw") else {"layers": ["plain", "re*"]}
    with contextlib.nullcontext() if not layers else pytest.warns(UserWarning, match="left static, .*weight: read$"):
        convert(net, method, **layers)
    assert net.conversion["read"] == "static: another module of the network reads its weight"
    assert type(net.read) is nn.Conv2d and type(net.plain) is not nn.Conv2d
    assert net(torch.randn(2, 3, 9, 9, dtype=torch.float64)).isfinite().all()


def test_one_that_is_named_is_refused():
    for method, settings in (
        ("odconv", {"layers": ["plain", "read"]}),
        ("kw", {"warehouses": {"all": {"layers": ["plain", "read"], "cell_inplane_ratio": 1}}}),
    ):
        net = Reading()
        with pytest.raises(ValueError, match=f"{method}: layer 'read' cannot be replaced, since .* reads its weight"):
            convert(net, method, **settings)
        assert type(net.plain) is nn.Conv2d
    with pytest.raises(ValueError, match="must stay static"), pytest.warns(UserWarning, match="left static"):
        convert(Reading(), "odconv", layers=["rea*"])


def test_an_encoder_of_pytorch():
    net, x = Encoder().eval(), torch.randn(2, 5, 8)
    assert try_out(net, list(replaceable(net))).read == {"encode.linear1", "encode.linear2"}
    before = net(x)
    with pytest.warns(UserWarning, match="left static"):
        convert(net, "odconv", layers="*", keep_weights=True, kernel_num=1, attentions=["kernel"])
    set_temperature(net, 1)
    assert_same(net(x), before)


@pytest.mark.parametrize("name", ["edgenext_xx_small", "levit_128s"])
def test_networks_of_timm(name):
    """EdgeNeXt reads a weight for its type; LeViT keeps tensors of a forward pass in evaluation."""
    net = timm.create_model(name, num_classes=5).eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    read = try_out(net, list(replaceable(net))).read
    assert read == ({"stages.1.blocks.1.pos_embd.token_projection"} if name.startswith("edgenext") else set())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items()) and not net.training
    x = torch.randn(1, 3, 224, 224)
    before = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(net, "kw", keep_weights=True)
    set_temperature(net, 1)
    assert any(isinstance(module, KWConv2d) for module in net.modules())
    # as float32 rounds in twenty layers and more
    torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_tried_is_taken_as_it_is():
    class Unlike(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    assert try_out(Unlike(), ["a", "b"]) == Trial()


class Elsewhere(nn.Module):
    """Samples in the second dimension, as in PyTorch's own transformers, and windows in the place of samples."""

    def __init__(self):
        super().__init__()
        self.stem, self.plain, self.tokens, self.windows = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.plain(self.stem(x))
        x = self.tokens(x.transpose(0, 1)).transpose(0, 1)
        x = self.windows(x.reshape(-1, 4, 8)).reshape(x.shape)
        return self.head(x.mean(1))


@pytest.mark.parametrize("method", ["odconv", "kw", "kr"])
def test_samples_in_another_dimension_are_never_mixed(method):
    net, x = Elsewhere().double().eval(), torch.randn(3, 16, 8, dtype=torch.float64)
    layers = ["plain", "to*", "win*"]
    given = {"layers": layers}
    if method == "kw":
        given = {"warehouses": {"all": {"layers": layers, "cell_inplane_ratio": 0.5}}}
    with pytest.warns(UserWarning, match="left static, since the first dimension of its input is not"):
        convert(net, method, **given)
    assert type(net.tokens) is nn.Linear and type(net.plain) is not nn.Linear
    assert (type(net.windows) is nn.Linear) == (method == "kr")
    assert_same(net(x)[1:2], net(x[1:2]))


@pytest.mark.parametrize("method", [name for name in ANYWHERE if name != "cgc"])
def test_outputs_can_be_viewed(method):
    """As those of nn.Linear, which are contiguous; CGC replaces no linear layers."""

    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.layer(self.stem(x)).view(len(x), -1, 6).mean(1))

    given = {"layers": ["lay*"]}
    if method.startswith("kw"):
        given = {"warehouses": {"one": {**given, "cell_inplane_ratio": 0.5}}}
    net = convert(Viewing(), method, **given)
    assert type(net.layer) is not nn.Linear
    assert net(torch.randn(3, 4, 5, 8)).shape == (3, 4) and net.eval()(torch.randn(3, 7, 8)).isfinite().all()
