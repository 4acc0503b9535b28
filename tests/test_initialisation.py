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

from models import build_model, read_config, set_temperature
from models.weights import released_keys

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
    keys = released_keys(model, {key: key for key in START[paper][name]})
    parameters = dict(model.named_parameters())
    assert set(keys) == set(parameters)
    wrong = {}
    for ours, theirs in keys.items():
        found = deviations(parameters[ours], *START[paper][name][theirs])
        wrong.update({(theirs, what): float(value) for what, value in found.items() if not value <= 1})
    assert wrong == {}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("resnet18", "layer1.0.bn2.weight"),
        ("resnet50", "layer1.0.bn3.weight"),
        ("resnet18", "fc.weight"),
        ("mobilenetv2_100", "classifier.weight"),
        ("mobilenetv2_100", "blocks.1.0.conv_dw.weight"),
    ],
)
def test_timms_start_is_another_one_and_the_default(name, what):
    """So the comparison above can fail; and a model without the setting is timm's, number by number."""
    torch.manual_seed(3)
    ours = build_model({"model": name})
    torch.manual_seed(3)
    expected = timm.create_model(name).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    paper = "kernelwarehouse"
    keys = released_keys(ours, {key: key for key in START[paper][name]})
    found = deviations(ours.get_parameter(what), *START[paper][name][keys[what]])
    assert max(found.values()) > 1


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
