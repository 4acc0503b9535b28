"""Networks that are unusual in one respect: they are converted all the same, or refused before anything changes."""

import math

import pytest
import torch
import torchvision
from helpers import replaced
from torch import nn

from models import convert


def stack(width, count, channels=3, classes=5):
    layers = [nn.Conv2d(channels, width, 3)]
    for _ in range(count):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


@pytest.mark.parametrize("budget", [0.25, 0.375, 0.5, 0.75, 1.125, 1.25, 2.0])
@pytest.mark.parametrize("width", [32, 64])
def test_any_budget_finds_cells(width, budget):
    net = convert(stack(width, 8), cell_num_ratio=budget)
    cells = sum(house.cells.numel() for house in net.warehouses.values())
    kernels = sum(math.prod(shape) for house in net.warehouses.values() for shape in house.kernels.values())
    assert cells == pytest.approx(budget * kernels, rel=1e-6)


def test_large_layers_that_fit_late_do_not_let_the_attentions_grow():
    """Most kernels of this detector fit at the largest shares only, at which it would have 1.8 times the parameters."""
    with torch.device("meta"):
        detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
        before, after = convert(detector(weights=None, weights_backbone=None), dry_run=True).parameters
    assert 0.9 < after / before < 1.3


def test_a_budget_without_cells_is_refused():
    with pytest.raises(ValueError, match=r"cell_num_ratio 0\.001 of 9 mixtures .* is not a whole number of cells"):
        convert(stack(64, 4), cell_num_ratio=0.001)


class Sides(nn.Module):
    """Layers that no dynamic one can replace, between others."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 1)
        self.plain = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(2))
        self.around = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")
        self.even = nn.Conv1d(8, 8, 4, padding="same")
        self.tied, self.twin = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1)
        self.twin.weight = self.tied.weight

    def forward(self, x):
        x = self.plain[1](self.plain[0](self.stem(x)))
        return self.last(self.twin(self.tied(self.even(self.around(x)))))


@pytest.mark.parametrize("method", ["kw", "odconv", "dcd", "kr"])
def test_layers_that_cannot_be_replaced_stay_static(method):
    with pytest.warns(UserWarning, match="left static, since another module has the same weight: tied"):
        net = convert(Sides(), method)
    assert set(replaced(net)) - {"last"} == {"plain.0", "plain.1"}
    assert "circular" in net.conversion["around"] and "same weight" in net.conversion["tied"]
    if method != "kw":
        with pytest.raises(ValueError, match="layer 'even' cannot be replaced, since its padding 'same' is not the"):
            convert(Sides(), method, layers=["plain.0", "even"])


class Named(nn.Module):
    """Its layers have names of attributes of PyTorch's dicts, and become one name without dots."""

    def __init__(self):
        super().__init__()
        self.stem, self.keys, self.values, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.b, self.b_c = nn.ModuleDict({"c": nn.Linear(16, 16)}), nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.b_c(self.b["c"](self.values(self.keys(self.stem(x))))))


def test_warehouses_have_names_of_their_own():
    net = convert(Named())
    labels = list(replaced(net).values())
    assert len(labels) == len(set(labels)) == len(net.warehouses) and net(torch.randn(2, 16)).isfinite().all()
    with pytest.raises(ValueError, match="a warehouse cannot have the name 'keys'"):
        convert(Named(), warehouses={"keys": {"layers": ["b_c"]}})


def test_a_conversion_that_fails_changes_nothing():
    net = Named()
    net.conversion = nn.Identity()
    with pytest.raises(ValueError, match="attribute 'conversion' of its own"):
        convert(net)
    assert type(net.b_c) is nn.Linear and not hasattr(net, "warehouses")
    with pytest.raises(ValueError, match="the model is a Conv2d itself"):
        convert(nn.Conv2d(8, 8, 3), "odconv", layers="*")


@pytest.mark.parametrize("method", ["kw", "odconv", "dcd", "condconv", "kr"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_networks_without_layers_are_refused(method, dry_run):
    with pytest.raises(ValueError, match=r"no (convolution or linear )?layer"):
        convert(nn.Sequential(nn.ConvTranspose2d(3, 3, 1)), method, dry_run=dry_run)


class Shifted(nn.Module):
    """It holds a tensor that is neither a parameter nor a buffer, and one that was computed."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(stack(64, 3)[:-3], nn.MaxPool2d(2), stack(64, 3, 64)[1:-3], nn.MaxPool2d(2))
        self.end = nn.Sequential(*stack(64, 4, 64))
        self.mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
        self.kept = self.end[0](torch.zeros(1, 64, 9, 9))

    def forward(self, x):
        return self.end(self.body(x - self.mean))


def test_a_dry_run_plans_as_a_conversion_does(capfd):
    net, seen = Shifted(), []
    net.end[0].register_forward_hook(lambda module, inputs, y: seen.append(type(y)))
    report = convert(net, dry_run=True)
    net.kept = None
    convert(net)
    assert report.parameters[1] == sum(p.numel() for p in net.parameters()) and report.multiply_adds
    assert report.layers == replaced(net) and seen == [] and capfd.readouterr() == ("", "")
    # the hook moved to the dynamic layer
    net.eval()(torch.randn(1, 3, 64, 64))
    assert seen == [torch.Tensor]
    with pytest.raises(ValueError, match="keep_weights needs attention_init 'static'"):
        convert(Shifted(), keep_weights=True, attention_init="all-to-one", dry_run=True)
