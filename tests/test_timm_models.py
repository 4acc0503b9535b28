"""Dynamic networks where timm's are used: created by name, as feature extractors, with another classifier."""

import copy
import functools
import pickle

import pytest
import timm.models
import timm.optim
import torch
from tolerance import assert_same

import models.timm_models
from models import KWLinear, build_model, convert, get_temperature, load_weights, set_temperature

IMAGE = torch.randn(2, 3, 64, 64)


def without_gradient(net):
    return [name for name, parameter in net.named_parameters() if parameter.grad is None]


def test_names():
    assert {"kw_resnet18", "kw_resnet50", "kw_resnet18_slim"} <= set(timm.list_models("kw_resnet*"))
    assert "kw1d2x_mobilenetv2_100" in timm.list_models() and "kw1d2x_resnet18" not in timm.list_models()
    # the names of configs mean what they meant before
    assert build_model({"model": "kw_test_resnet"}, num_classes=5).warehouses
    with pytest.raises(ValueError, match="unknown model 'kw_test_resnat', did you mean 'test_resnet'"):
        build_model({"model": "kw_test_resnat"})


@pytest.mark.parametrize("name", ["kw_test_resnet", "od_test_resnet", "kr_mobilenetv2_035", "dcd_test_convnext"])
def test_created_as_timms(name, tmp_path):
    """As timm's own training script does it: create by name, train a step, save, load."""
    net = timm.create_model(name, pretrained=False, num_classes=4, in_chans=1, drop_path_rate=0.1)
    x = torch.randn(4, 1, 64, 64)
    optimizer = timm.optim.create_optimizer_v2(net, "sgd", lr=0.01)
    net(x).square().mean().backward()
    assert not without_gradient(net)
    optimizer.step()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    file = {"file": str(tmp_path / "net.pth")}
    again = timm.create_model(name, pretrained=True, num_classes=4, in_chans=1, pretrained_cfg_overlay=file)
    assert torch.equal(net.eval()(x), again.eval()(x))
    other = timm.create_model(name, pretrained=True, num_classes=6, in_chans=1, pretrained_cfg_overlay=file)
    assert other(x).shape == (4, 6)
    timm.models.load_checkpoint(again, str(tmp_path / "net.pth"))
    with pytest.raises(ValueError, match=f"{name} has no pretrained weights; give the path"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("features_only", [False, True])
def test_the_temperature_of_a_checkpoint(features_only, tmp_path):
    net = timm.create_model("kw_test_resnet", num_classes=4)
    file = {"file": str(tmp_path / "net.pth")}
    for temperature in (0.5, 30.0, "hot"):
        torch.save({"model": net.state_dict(), "temperature": temperature}, tmp_path / "net.pth")
        create = functools.partial(
            timm.create_model,
            "kw_test_resnet",
            pretrained=True,
            pretrained_cfg_overlay=file,
            features_only=features_only,
        )
        if temperature == 0.5:
            assert get_temperature(create()) == 0.5
        else:
            with pytest.raises(ValueError, match=r"net\.pth: its temperature"):
                create()


def test_settings_of_the_method():
    net = timm.create_model("od_test_resnet", num_classes=4, kernel_num=2)
    assert net.layer1[0].conv1.kernel_num == 2
    with pytest.raises(ValueError, match="odconv has no setting 'cell_num_ratio'"):
        timm.create_model("od_test_resnet", cell_num_ratio=2)


@pytest.mark.parametrize("name", ["kw_resnet18", "kr_mobilenetv2_035", "od_convnext_atto", "condconv_test_resnet"])
@pytest.mark.parametrize("indices", [(1, 2), (3,)])
def test_features(name, indices, tmp_path):
    """The maps of the whole network, without the layers and warehouses behind them."""
    net = timm.create_model(name, num_classes=4).eval()
    torch.save({"model": net.state_dict()}, tmp_path / "net.pth")
    features = timm.create_model(
        name, pretrained=True, features_only=True, out_indices=indices,
        pretrained_cfg_overlay={"file": str(tmp_path / "net.pth")},
    )  # fmt: skip
    with torch.no_grad():
        expected = net.forward_intermediates(IMAGE, indices=list(indices), intermediates_only=True)
        found = features.eval()(IMAGE)
    assert [y.shape[1] for y in found] == features.feature_info.channels()
    assert len(found) == len(expected) and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    sum(y.square().mean() for y in features.train()(IMAGE)).backward()
    assert not without_gradient(features)


@pytest.mark.parametrize(
    "config",
    [
        {"model": "kr_test_resnet"},
        {"model": "condconv_test_resnet"},
        {"model": "dcd_test_resnet"},
        {"model": "od_test_resnet", "layers": ["all", "classifier"]},
        {"model": "kw_test_resnet"},
        {"model": "kw1d2x_mobilenetv2_050"},
    ],
    ids=lambda config: config["model"],
)
def test_reset_classifier(config):
    """The new classifier belongs to the same method, and nothing is left without a gradient."""
    net = build_model(config, num_classes=64)
    kind = type(net.get_classifier())
    for classes in (8, 0, 16):
        net.reset_classifier(classes)
        net.zero_grad()
        y = net.train()(IMAGE)
        assert y.shape == (2, classes or net.num_features)
        y.square().mean().backward()
        # without a classifier, nothing reads the last representation
        last = [name for name in without_gradient(net) if ".generator." not in name or classes]
        assert not last
        assert type(net.get_classifier()) is (kind if classes else torch.nn.Identity)
    other = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    other.reset_classifier(4)
    assert other(IMAGE).shape == (2, 4) and net(IMAGE).shape == (2, 16)
    again = build_model(config, num_classes=16)
    load_weights(again, net.state_dict())
    assert_same(again.eval()(IMAGE), net.eval()(IMAGE))


def test_the_new_classifier_has_the_temperature_of_the_others():
    net = build_model({"model": "kw1d2x_mobilenetv2_050"}, num_classes=64)
    set_temperature(net, 0.5)
    net.reset_classifier(8)
    assert isinstance(net.classifier, KWLinear) and float(net.classifier.attention.temperature) == 0.5
    assert get_temperature(net) == 0.5


def test_a_classifier_in_a_shared_warehouse_stays_static():
    net = timm.create_model("test_vit", num_classes=64)
    convert(net, "kw", warehouses={"both": {"layers": ["blocks.5.mlp.fc2", "head"]}})
    net.reset_classifier(8)
    assert type(net.head) is torch.nn.Linear and "another size" in net.conversion["head"]
    net(torch.randn(2, 3, 160, 160)).square().mean().backward()
    assert not without_gradient(net)


def test_a_star_import_gives_what_the_module_has():
    names = {}
    exec("from models.timm_models import *", names)
    assert names["create"] is models.timm_models.create
