"""The settings of Kernel Representation, and the backbones that the paper has it on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import replaced
from naive_representation import LAYERS, Net, assert_empty, image, make_net, naive_unit
from tolerance import assert_same, difference
from torch import nn

from models import KRConv2d, KRLinear, build_model, convert, set_temperature, temperature_range
from models.config import ConfigError
from models.methods.kernel_representation import KRClassifier
from models.methods.kernel_representation.layer import Step
from models.methods.relay import Relay


def test_without_representation():
    """Table 6, dynamic kernels without kernel representation: units that see their input only, and nothing else."""
    net = make_net(representation=False)
    assert type(net.head) is nn.Linear and not hasattr(net, "kernel_representation")
    assert list(replaced(net)) == LAYERS
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
    for kernel_num, reduction, size in ((1, 1 / 4, 16), (4, 1.0, 64)):
        for width in ("both", "input"):
            settings = {"kernel_num": kernel_num, "reduction": reduction, "representation_dim": size}
            net = convert(Net(), "kr", fusion_width=width, **settings)
            assert net.conv.weight.shape == (kernel_num, 8, 8, 3, 3)
            seen = 64 + 3 * size + 12
            hidden = max(8, int(reduction * (seen if width == "both" else 12)))
            assert net.mlp.fc1.fusion.fuse.weight.shape == (hidden, seen)
            assert net.head.in_features == 12 + 64 + 4 * size


@pytest.mark.parametrize(("backbone", "per_channel", "reduction"), [
    ("vit_nano_cifar", True, 1 / 8), ("poolformer_s12", True, 1 / 8), ("resnet18", False, 1 / 16),
    ("mobilenetv2_050", False, 1 / 16),
])  # fmt: skip
def test_coefficients_by_the_kind_of_network(backbone, per_channel, reduction):
    """What the costs in the paper's tables say: see the module's docstring."""
    with torch.device("meta"):
        model = build_model({"model": f"kr_{backbone}", "kernel_num": 4})
        scalars = build_model({"model": f"kr_{backbone}", "kernel_num": 4, "attentions": ["kernel"]})
    layers = [m for m in model.modules() if isinstance(m, (KRConv2d, KRLinear))]
    for layer in layers:
        heads = layer.attention
        if per_channel:
            assert heads.names == ["filter"] and heads.filter_fc.out_features == 4 * layer.out_channels
        else:
            assert {"kernel", "channel"} <= set(heads.names) and heads.sets == 1
        if layer.fusion is not None:
            width = max(8, int(reduction * (layer.fusion.given + layer.in_channels)))
            assert layer.fusion.fuse.out_features == width
    equation_1 = [m.attention for m in scalars.modules() if isinstance(m, (KRConv2d, KRLinear))]
    assert all(heads.names == ["kernel"] and heads.kernel_fc.out_features == 4 for heads in equation_1)


def test_units_of_transformers():
    """Sections 4.1 and 4.2: self-attention and MLP are a unit each, of two linear layers."""
    with torch.device("meta"):
        model = build_model({"model": "kr_vit_nano"})
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert list(replaced(model)) == [f"blocks.{i}.{part}" for i in range(12) for part in parts] + ["head"]
    for block in model.blocks:
        for first, last in ((block.attn.qkv, block.attn.proj), (block.mlp.fc1, block.mlp.fc2)):
            assert first.fusion is not None and first.generator is None
            assert last.fusion is None and last.generator is not None and last.generator.project.out_features == 32


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
        ("vit_nano", 32, 24),
        ("vit_small", 32, 24),
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
    units = {"all": 24, "blocks.*.mlp.fc2": 12, "last_2_blocks": 4}[words[0]]
    assert model.head.in_features == 128 + 64 + 8 * units
    assert model(image(2, 32, torch.float32)).shape == (2, 5)


def test_first_layer_can_be_dynamic():
    net = convert(Net(), "kr", layers=["stem", "conv"]).eval()
    assert isinstance(net.stem, KRConv2d) and net(image(2, 12, torch.float32)).shape == (2, 5)


def test_networks_without_convolutions():
    make = lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))  # noqa: E731
    net = convert(make(), "kr")
    assert net(torch.randn(3, 6)).shape == (3, 4) and isinstance(net[4], KRClassifier)
    with pytest.raises(ValueError, match=r"the first layer, '0', is a Linear; use 'learned'"):
        convert(make(), "kr", representation_start="frequency")


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
        (lambda: convert(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3)), "kr", representation_start="frequency"),
            ["'0'", "Conv1d", "learned"]),
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


QUICK = [("resnet18_slim", 1), ("vit_nano_cifar", 1), ("mobilenetv2_100", 1)]
SIZES = {
    "resnet18": 32, "resnet18_slim": 32, "resnet50": 32, "vit_nano": 224, "vit_small": 224, "vit_nano_cifar": 32,
    "vit_tiny_cifar": 32, "poolformer_s12": 64, "mobilenetv2_100": 32, "mobilenetv2_050": 32, "convnext_atto": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "kernel_num"),
    [pytest.param(name, k, marks=() if (name, k) in QUICK else pytest.mark.slow) for name in SIZES for k in (1, 4)],
)
def test_backbones_train(backbone, kernel_num):
    size = SIZES[backbone]
    model = build_model({"model": f"kr_{backbone}", "kernel_num": kernel_num}, num_classes=10)
    y = model(image(2, size, torch.float32))
    y.square().sum().backward()
    assert y.shape == (2, 10) and y.isfinite().all()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert_empty(model)
    model.eval()
    with torch.no_grad():
        assert model(image(1, size, torch.float32)).isfinite().all()
