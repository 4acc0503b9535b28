"""How networks start: every parameter of the released ones, and that timm's stay timm's.

tests/data/initialisation.json.gz holds, for each of the 34 released networks, per parameter: number of values, mean,
standard deviation and largest absolute value over four seeds of the released code.
"""

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import timm
import torch

from models import KWConv2d, build_model, read_config, set_temperature
from models.released import own_keys

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def recorded(name):
    return json.loads(gzip.decompress((HERE / f"data/{name}.json.gz").read_bytes()))


START = recorded("initialisation")
ODCONV = recorded("odconv")
CONFIGS = sorted(path for path in ROOT.glob("configs/**/*.json") if path.parent.name not in ("recipes", "digits"))
NETWORKS = [pytest.param(paper, name, id=f"{paper}-{name}") for paper in START for name in START[paper]]
# of the paper and of this sample, in standard deviations of the difference; some 10,000 parameters are compared
SIGMAS = 5
SEEDS = 4
# what is recorded has six decimals
ROUNDED = 1e-6


def config_of(paper, name):
    """The project's own config of a released network; ODConv's are not all in its tables."""
    if name in ODCONV:
        return {
            **{key: ODCONV[name][key] for key in ("model", "kernel_num", "reduction")},
            "initialisation": "released",
        }
    (path,) = [path for path in CONFIGS if path.stem == name and path.parent.parent.name == "configs"]
    return path


def deviations(value, count, mean, std, largest):
    """How far mean and standard deviation are from those recorded, each over what it may be off by."""
    assert value.numel() == count
    value = value.detach().double().flatten()
    own_mean, own_std = value.mean(), value.std(correction=0)
    if std == 0:
        return {"mean": abs(own_mean - mean) / ROUNDED, "std": own_std / ROUNDED}
    # the spread of a sample's deviation follows from its fourth moment: 3 for a normal distribution
    fourth = max(float(((value - own_mean) / own_std).pow(4).mean()), 3.0)
    error = SIGMAS * std * math.sqrt((1 + 1 / SEEDS) / count)
    found = {
        "mean": abs(own_mean - mean) / (error + ROUNDED),
        "std": abs(own_std - std) / (error * math.sqrt((fourth - 1) / 4) + ROUNDED),
    }
    if count >= 1000:
        # a uniform distribution ends at 1.73 standard deviations; normal ones go beyond 2.9 in 1000 values
        found["kind"] = float((value.abs().max() > 2 * std) != (largest > 2 * std)) * 2
    return found


@pytest.mark.parametrize(("paper", "name"), NETWORKS)
def test_every_parameter_starts_as_released(paper, name):
    model = build_model(config_of(paper, name))
    keys = own_keys(model, {key: key for key in START[paper][name]})
    parameters = dict(model.named_parameters())
    assert set(keys) == set(parameters)
    wrong = {}
    for ours, theirs in keys.items():
        found = deviations(parameters[ours], *START[paper][name][theirs])
        wrong.update({(theirs, what): float(value) for what, value in found.items() if not value <= 1})
    assert wrong == {}


@pytest.mark.parametrize(
    ("name", "what", "timms", "released"),
    [
        # means of BatchNorm weights, standard deviations of the others
        ("resnet18", "layer1.0.bn2.weight", 0.0, 1.0),
        ("resnet50", "layer1.0.bn3.weight", 0.0, 1.0),
        ("resnet18", "fc.weight", 0.0255, 0.01),
        ("resnet50", "fc.weight", 0.0128, 0.01),
        ("mobilenetv2_100", "classifier.weight", 0.0183, 0.01),
        # 5.8 and 9.8 times
        ("mobilenetv2_100", "blocks.0.0.conv_dw.weight", 0.47, 0.083),
        ("mobilenetv2_100", "blocks.1.0.conv_dw.weight", 0.47, 0.048),
    ],
)
def test_timms_start_is_another_one_and_the_default(name, what, timms, released):
    """So the comparison above can fail; and a model without the setting is timm's, number by number."""
    torch.manual_seed(3)
    ours = build_model({"model": name})
    torch.manual_seed(3)
    expected = timm.create_model(name).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    paper = "kernelwarehouse"
    keys = own_keys(ours, {key: key for key in START[paper][name]})
    value, (_, mean, std, _) = ours.get_parameter(what).detach(), START[paper][name][keys[what]]
    assert max(deviations(value, *START[paper][name][keys[what]]).values()) > 1
    number, recorded = (value.mean(), mean) if "bn" in what else (value.std(), std)
    assert float(number) == pytest.approx(timms, rel=0.1) and recorded == pytest.approx(released, rel=0.02)


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if re.search("resnet|mobilenet|convnext", path.stem)], ids=lambda path: path.stem
)
def test_configs_of_the_papers_convolutional_networks_start_as_released(path):
    assert read_config(path)["initialisation"] == "released"


def test_other_families_stay_timms():
    torch.manual_seed(3)
    ours = build_model({"model": "test_vit", "initialisation": "released"})
    torch.manual_seed(3)
    expected = timm.create_model("test_vit").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())


def test_first_gradients_depend_on_the_start():
    """Zeros in the last BatchNorms let gradients skip the blocks: the last warehouse gets none, others a fraction."""
    norms = {}
    for start in ("released", "timm"):
        torch.manual_seed(0)
        model = build_model(
            ROOT / "configs/resnet18/kw1x_resnet18.json", num_classes=10, initialisation=start, drop_path=0.0
        )
        set_temperature(model, 1.0)
        logits = model.train()(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        torch.nn.functional.cross_entropy(logits, torch.arange(8)).backward()
        norms[start] = [float(warehouse.cells.grad.norm()) for warehouse in model.warehouses.values()]
    ratios = [a / b for a, b in zip(norms["released"][:-1], norms["timm"][:-1])]
    # 16.9, 11.9 and 9.6 times
    assert min(ratios) > 3 and norms["timm"][-1] == 0 < norms["released"][-1]


def test_outputs_shrink_as_the_temperature_leaves_1():
    """An untrained attention mixes cells of no relation: at 1/2 a layer's output is half as large, at 0 a fraction."""
    torch.manual_seed(0)
    model = build_model(ROOT / "configs/resnet18/kw1x_resnet18.json", num_classes=10, drop_path=0.0)
    x, sizes = torch.randn(4, 3, 64, 64), {}
    for layer in model.modules():
        if isinstance(layer, KWConv2d):
            layer.register_forward_hook(lambda layer, inputs, y: sizes[temperature].append(float(y.detach().std())))
    for temperature in (1.0, 0.5, 0.0):
        sizes[temperature] = []
        set_temperature(model, temperature)
        model.train()(x)
    half, none = (torch.tensor(sizes[t]) / torch.tensor(sizes[1.0]) for t in (0.5, 0.0))
    assert len(half) == 19 and 0.45 < half.median() < 0.6 and none.median() < 0.3
