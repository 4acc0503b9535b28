"""Networks that no plan knows: what their conversion may cost, what it replaces, and that it says so."""

import copy
import math

import pytest
import timm
import torch
import torchvision
from conversion_table import METHODS, measure
from helpers import replaced
from layer_checks import take_statistics
from networks import NETWORKS
from tolerance import assert_same, difference
from torch import nn

from models import convert, set_temperature
from models.anatomy import blocks_of, family_name, main_layers
from models.counting import count_layers
from models.methods import METHODS as BY_NAME
from models.methods.kernel_warehouse.layer import KWAttention, attention_size

# these run in seconds
QUICK = """
    timm:mobilenetv3_small_050 timm:regnety_002 timm:hrnet_w18_small timm:lcnet_050 timm:convnext_atto
    timm:edgenext_xx_small torchvision:shufflenet_v2_x0_5 torchvision:mobilenet_v3_small unet detector signal
    torchvision:r3d_18 timm:skresnet18 timm:test_efficientnet timm:rexnet_100
""".split()
# 60 networks of timm, of which those that the issue of growing attentions is known from come first
GROWING = """
    fbnetc_100 res2net50_14w_8s resnext50_32x4d mobilenetv2_140 tf_efficientnet_lite0 efficientnet_b0 regnety_002
    mobilenetv3_large_100 densenet121 swin_tiny_patch4_window7_224
""".split()
SLOW_GROWING = """
    bat_resnext26ts botnet26t_256 cait_xxs24_224 coat_tiny coatnet_pico_rw_224 convit_tiny convmixer_768_32
    convnext_atto convnext_small convnextv2_atto crossvit_tiny_240 cs3darknet_m cspresnet50 darknet53 davit_tiny
    deit_tiny_distilled_patch16_224 dla34 dpn68 ecaresnet26t edgenext_xx_small efficientformer_l1 efficientvit_b0
    eva02_tiny_patch14_224 fastvit_t8 gernet_s ghostnet_100 hgnet_tiny hrnet_w18_small inception_v3 lcnet_100
    levit_128s maxvit_pico_rw_256 mixnet_s mnasnet_100 mobileone_s0 mobilevit_xxs nf_regnet_b0 pit_ti_224 poolformer_s12
    pvt_v2_b0 regnetx_002 regnetx_032 repvgg_a0 resnest14d rexnet_100 semnasnet_100 skresnet18 spnasnet_100
    tf_efficientnetv2_b0 tinynet_e
""".split()

LARGE = "resnet18 mobilenetv2_100 convnext_tiny vit_tiny_patch16_224 efficientnet_b0 regnety_016".split()


def slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [*GROWING, *slow(SLOW_GROWING)])
def test_one_budget_keeps_the_parameters(name):
    """KW 1x is about as large as the static network, as in the paper."""
    with torch.device("meta"):
        net = timm.create_model(name)
        before = sum(parameter.numel() for parameter in net.parameters())
        convert(net, "kw")
    after = sum(parameter.numel() for parameter in net.parameters())
    assert 0.9 < after / before < 1.3
    assert len(replaced(net)) >= 7


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv2_100", "test_resnet", "regnety_002"])
def test_the_plan_does_not_depend_on_the_classes(name):
    plans = []
    for classes in (1000, 3):
        with torch.device("meta"):
            net = convert(timm.create_model(name, num_classes=classes), "kw")
        plans.append((net.conversion, {key: house.cells.shape for key, house in net.warehouses.items()}))
    assert plans[0] == plans[1]


def test_an_own_plan_that_grows_is_refused():
    def network():
        with torch.device("meta"):
            return timm.create_model("fbnetc_100")

    all_of_them = {"few": {"layers": ["blocks.0.*"]}, "odd": {"layers": ["blocks.[1-5].*.conv_pw*"]}}
    with pytest.raises(ValueError, match=r"belong to warehouse 'odd', .* or set allow_growth"):
        convert(network(), "kw", warehouses=all_of_them)
    with pytest.raises(ValueError, match=r"attentions to the warehouses would have [\d,.]+ M parameters"):
        convert(network(), "kw", sharing_range=["layer", "pwconv"])
    grown = {"odd": {"layers": ["blocks.[45].[01].conv_pw"]}}
    with torch.device("meta"):
        net = convert(network(), "kw", warehouses=grown, cell_inplane_ratio=1 / 8, allow_growth=True)
    assert set(net.warehouses) == {"odd"}


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize(("basis", "sharing"), [(1.0, True), (0.3, True), (1.0, False)])
def test_size_of_an_attention(norm, basis, sharing):
    settings = {"norm": norm, "nonlocal_basis_ratio": basis, "cell_sharing": sharing, "reduction": 0.3}
    made = KWAttention(70, torch.zeros(6, 101), (20, 26), **settings)
    assert attention_size(70, 6, 100, own=6, **settings) == sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("name", ["kw", "odconv"])
def test_a_dry_run_changes_nothing_and_counts_what_a_conversion_has(name):
    net = timm.create_model("mobilenetv3_small_050", num_classes=7).eval()
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    report = convert(net, name, dry_run=True)
    assert not hasattr(net, "conversion") and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    before = sum(row.multiply_adds for row in count_layers(net, 224))
    assert report.parameters[0] == sum(p.numel() for p in net.parameters()) and report.multiply_adds[0] == before
    convert(net, name)
    assert report.parameters[1] == sum(p.numel() for p in net.parameters())
    assert report.multiply_adds[1] == sum(row.multiply_adds for row in count_layers(net, 224))
    assert report.layers == {key: label for key, label in net.conversion.items() if not label.startswith("static: ")}
    assert all(net.conversion[key] == f"static: {reason}" for key, reason in report.static.items())
    assert {*report.layers, *report.static} == set(net.conversion) and report.input_shape == (3, 224, 224)
    text = str(report)
    assert f"{report.parameters[1] / 1e6:,.2f} M after" in text and "static, " in text
    if name == "kw":
        assert sum(len(house.layers) for house in report.warehouses) == len(report.layers)
        assert all(house.name in text for house in report.warehouses)
        houses = net.warehouses
        assert [house.cell_parameters for house in report.warehouses] == [h.cells.numel() for h in houses.values()]


def test_families_by_structure():
    with torch.device("meta"):
        nets = {
            name: timm.create_model(name)
            for name in (
                "resnet26d",
                "resnest14d",
                "skresnet18",
                "deit_tiny_distilled_patch16_224",
                "beit_base_patch16_224",
            )
        }
        nets |= {name: torchvision.models.get_model(name) for name in ("resnet18", "convnext_tiny", "vit_b_16")}
    families = {name: family_name(net) for name, net in nets.items()}
    assert families == {
        "resnet26d": "ResNet",
        "resnest14d": "other",
        "skresnet18": "other",
        "deit_tiny_distilled_patch16_224": "VisionTransformer",
        "beit_base_patch16_224": "other",
        "resnet18": "ResNet",
        "convnext_tiny": "other",
        "vit_b_16": "other",
    }


@pytest.mark.parametrize(
    ("name", "count", "one"),
    [
        ("regnety_002", 13, ("s1.b1.conv2.conv", "s1.b1")),
        ("densenet121", 58, ("features.denseblock2.denselayer3.conv1", "features.denseblock2.denselayer3")),
        ("dla34", 12, ("level2.tree1.conv1", "level2.tree1")),
        ("hrnet_w18_small", 23, ("stage2.0.branches.0.1.conv2", "stage2.0.branches.0.1")),
        ("inception_v3", 9, ("Mixed_5b.branch5x5_1.conv", "Mixed_5b")),
        ("vgg11", 0, None),
    ],
)
def test_blocks_by_structure(name, count, one):
    with torch.device("meta"):
        blocks = blocks_of(timm.create_model(name))
    assert len(set(blocks.values())) == count
    assert one is None or blocks[one[0]] == one[1]


def test_condconv_without_blocks_takes_the_last_third():
    with torch.device("meta"):
        net = timm.create_model("vgg11")
        names = main_layers(net)
        convert(net, "condconv")
    dynamic = [name for name, label in net.conversion.items() if label == "condconv"]
    assert dynamic == [*names[-math.ceil(len(names) / 3) :], "head.fc"]


def test_subclasses_that_compute_the_same_are_replaced():
    class Same(nn.Conv2d):
        pass

    class Other(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    layers = [kind(4, 4, 3, padding=1) for kind in (nn.Conv2d, Same, Other, Same, Same, nn.Conv2d)]
    nn.utils.parametrizations.weight_norm(layers[3])
    nn.utils.spectral_norm(layers[4])
    net = convert(nn.Sequential(*layers), "odconv")
    assert [name for name, label in net.conversion.items() if label == "odconv"] == ["1", "5"]


def test_kr_follows_the_order_in_which_layers_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 4)
            self.last, self.twice, self.first = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
            self.unused, self.stem = nn.Conv2d(8, 8, 1), nn.Conv2d(3, 8, 3)

        def get_classifier(self):
            return self.head

        def forward(self, x):
            x = self.first(self.stem(x))
            return self.head(self.last(self.twice(self.twice(x))).mean((2, 3)))

    layers = ["first", "tw*", "last", "unu*"]
    with pytest.warns(UserWarning) as caught:
        net = convert(Backwards(), "kr", layers=layers)
    assert any("it runs 2 times in a pass: twice" in str(warning.message) for warning in caught)
    assert any("it does not run in evaluation: unused" in str(warning.message) for warning in caught)
    assert [name for name, label in net.conversion.items() if label == "kr"] == ["first", "last", "head"]
    assert net(torch.randn(2, 3, 9, 9)).isfinite().all()
    with pytest.raises(ValueError, match="kr: layer 'twice' cannot be replaced, since it runs 2 times in a pass"):
        convert(Backwards(), "kr", layers=["first", "twice"])


@pytest.mark.parametrize("wrong", ["odkonv", "condkonv"])
def test_the_nearest_method_is_offered(wrong):
    with pytest.raises(ValueError, match=f"did you mean '{wrong.replace('k', 'c')}'"):
        convert(nn.Sequential(nn.Conv2d(3, 3, 1)), wrong)
    net = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)))
    assert set(convert(net, "od").conversion.values()) == {
        "odconv",
        "static: not among the layers that the method replaces",
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*QUICK, *slow(name for name in NETWORKS if name not in QUICK)])
def test_networks(name, method):
    """A warm start computes what the static network does, a step has finite gradients, and a file is read back."""
    row = measure(name, method)
    assert row.dynamic > 0 and row.error <= 1e-5 and row.finite and row.round_trip


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("budget", [1, 2, 4])
@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_050", "test_convnext", "test_vit", "regnety_002"])
def test_a_warm_start_is_static_at_every_temperature(name, budget, temperature):
    net = timm.create_model(name, num_classes=5).eval().double()
    x = torch.randn(2, 3, *[160 if name == "test_vit" else 64] * 2, dtype=torch.float64)
    expected = net(x)
    convert(net, "kw", keep_weights=True, cell_num_ratio=budget)
    set_temperature(net, temperature)
    assert difference(net(x), expected) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in BY_NAME if name != "kw1d2x"])
@pytest.mark.parametrize("name", LARGE)
def test_a_warm_start_of_a_large_network_is_static(name, method):
    """In float32, too: a rounding error that all layers have in common would add up."""
    net = timm.create_model(name).eval()
    take_statistics(net, torch.randn(4, 3, 224, 224))
    x = torch.randn(2, 3, 224, 224)
    settings = [{"cell_num_ratio": ratio} for ratio in (1, 2, 4)] if "kw" in method else [{}]
    with torch.no_grad():
        expected = net.eval()(x)
        for own in [{"standardise": False}] if method == "we" else settings:
            converted = convert(copy.deepcopy(net), method, keep_weights=True, **own)
            for temperature in (1.0, 0.5, 0.0):
                if "kw" in method:
                    set_temperature(converted, temperature)
                assert_same(converted(x), expected)


def test_a_static_attention_learns():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)), nn.Conv2d(8, 2, 1))
    convert(net, "kw", attention_init="static")
    x = torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    alphas = []
    for _ in range(3):
        net(x).square().mean().backward()
        optimizer.step()
        alphas.append(net[1].attention(x.new_tensor(range(16)).view(2, 8) / 16).detach())
    assert not torch.equal(alphas[0][0], alphas[-1][0])
    # and comes to depend on the input
    assert not torch.equal(alphas[-1][0], alphas[-1][1])


def test_fewer_cells_keep_the_closest_kernels():
    """The best that n cells can do for m kernels of any sizes (Eckart and Young), from numpy."""
    import numpy

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 2, 1))
    kernels = [net[i].weight.detach().double().numpy() for i in (1, 2)]
    cells = [kernels[0][:, :, i, j].ravel() for i in range(3) for j in range(3)]
    cells += [kernels[1][8 * i : 8 * i + 8, :, 0, 0].ravel() for i in range(2)]
    u, s, v = numpy.linalg.svd(numpy.stack(cells), full_matrices=False)
    n = 5
    best = (u[:, :n] * s[:n]) @ v[:n]
    both = {"both": {"layers": ["1", "2"]}}
    with pytest.warns(UserWarning, match=r"largest relative errors have . \(0\.\d\d\)"):
        convert(net, "kw", warehouses=both, cell_num_ratio=n / 11, keep_weights=True)
    house = net.warehouses["both"]
    alpha = torch.cat([net[i].attention(torch.randn(2, 8))[0] for i in (1, 2)]).double()
    assert alpha.abs().sum(1).max() < 1
    mixed = alpha @ house.cells.detach().flatten(1).double()
    assert_same(mixed.float(), torch.from_numpy(best).float())
    for layer, rows in (("1", slice(0, 9)), ("2", slice(9, 11))):
        target = numpy.stack(cells)[rows]
        relative = numpy.linalg.norm(target - best[rows]) / numpy.linalg.norm(target)
        assert abs(house.errors[layer] - relative) < 1e-6
