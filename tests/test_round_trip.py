"""Whatever network is saved is read back: own names come before those of other repositories, and old ones stay."""

import gzip
import json
from pathlib import Path

import fill
import pytest
import timm
import torch
import torchvision
from helpers import replaced
from tolerance import NETWORK, difference
from torch import nn

from models import build_model, convert, load_weights, set_temperature

# of an earlier version, for networks of all methods: keys and shapes of the state dict, which layers were replaced, and
# the logits for weights that `fill.py` makes from the keys
EARLIER = json.loads(gzip.decompress((Path(__file__).parent / "data/earlier_checkpoints.json.gz").read_bytes()))

# one of a family, as small as it comes; those that are quick first
QUICK = """
    rexnet_100 mobilenetv3_small_050 ghostnet_050 lcnet_035 tinynet_e test_resnet test_convnext test_vit
    test_efficientnet edgenext_xx_small mobileone_s0 hardcorenas_a
""".split()
SLOW = """
    bat_resnext26ts beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_tiny coatnet_pico_rw_224 convit_tiny
    convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240 cs3darknet_m cspresnet50 darknet53 davit_tiny
    deit_tiny_patch16_224 densenet121 dla34 dm_nfnet_f0 dpn68 efficientformer_l1 efficientnet_b0 efficientvit_b0
    eva02_tiny_patch14_224 fastvit_t8 fbnetc_100 focalnet_tiny_srf gmixer_24_224 hgnet_tiny hrnet_w18_small
    inception_v3 legacy_senet154 levit_128s maxvit_pico_rw_256 mixer_s32_224 mixnet_s mnasnet_050 mobilenetv2_050
    mobilevit_xxs mvitv2_tiny nextvit_small pit_ti_224 poolformer_s12 pvt_v2_b0 regnety_002 repvgg_a0
    res2net50_14w_8s resmlp_12_224 resnest14d resnext50_32x4d sebotnet33ts_256 selecsls42 semnasnet_075 skresnet18
    spnasnet_100 swin_tiny_patch4_window7_224 tf_efficientnetv2_b0 tiny_vit_5m_224 tresnet_m twins_svt_small vgg11
    visformer_tiny volo_d1_224 xception41 xcit_nano_12_p16_224
""".split()
TORCHVISION = """
    alexnet convnext_tiny densenet121 googlenet mobilenet_v3_small regnet_y_400mf shufflenet_v2_x0_5
    swin_t vgg11
""".split()


def assert_round_trip(make, x, path):
    """Two networks of different weights: the second must be the first once it has loaded its checkpoint."""
    first, second = make(), make()
    with torch.no_grad():
        for module in first.modules():
            # statistics that are not those of a fresh network
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    torch.save({"model": first.state_dict()}, path)
    load_weights(second, path)
    state = second.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
    with torch.no_grad():
        assert torch.equal(first.eval()(x), second.eval()(x))


def quick_and_slow(quick, slow):
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


@pytest.mark.parametrize("prefix", ["", "od_"], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", quick_and_slow(QUICK, SLOW))
def test_timm(name, prefix, tmp_path):
    size = timm.get_pretrained_cfg(name).input_size if name in SLOW else (3, 64, 64)
    size = (3, 160, 160) if name == "test_vit" else size
    assert_round_trip(
        lambda: build_model({"model": prefix + name}, num_classes=5), torch.randn(1, *size), tmp_path / "x.pth"
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "name",
    quick_and_slow(["squeezenet1_1", "mobilenet_v2", "mnasnet0_5"], TORCHVISION),
)
def test_torchvision(name, dynamic, tmp_path):
    def make():
        model = torchvision.models.get_model(name, weights=None, num_classes=5)
        return convert(model, "odconv") if dynamic else model

    assert_round_trip(make, torch.randn(1, 3, 224, 224), tmp_path / "x.pth")


@pytest.mark.parametrize("name", EARLIER)
def test_checkpoints_of_an_earlier_version(name, tmp_path):
    record = EARLIER[name]
    state = fill.fill_({key: torch.empty(shape) for key, shape in record["keys"].items()}, record["seed"])
    state = {key: value * record["scale"] if value.ndim > 1 else value for key, value in state.items()}
    for key in state:
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.int64)
    torch.save({"model": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    model = load_weights(build_model(record["config"], num_classes=7), tmp_path / "checkpoint.pth")
    assert list(model.state_dict()) == list(record["keys"])
    assert (replaced(model) if hasattr(model, "conversion") else {}) == record["conversion"]
    if record["temperature"]:
        set_temperature(model, record["temperature"])
    x = fill.make_input(record["input"], record["seed"]).double()
    assert difference(model.double().eval()(x), torch.tensor(record["logits"], dtype=torch.float64)) < NETWORK
