"""The released models, computed by the released implementation, against ours: every number of them.

tests/data/*.json.gz hold, for each of the 20 released configs of KernelWarehouse and 10 released models of ODConv, the
keys and shapes of its state dict, and loss, logits and gradient norms in float64 for weights that `fill.py` makes from
the keys.
"""

import functools
import gzip
import json
from pathlib import Path

import fill
import pytest
import torch
import torch.nn.functional as F
from tolerance import NETWORK

from models import build_model, load_weights, set_temperature
from models.ops import registry
from models.ops.control import forced_order
from models.released import own_keys

# those in Triton do not compute in float64
ORDERS = [order for order in registry.ORDERS if not order.startswith("triton")]


def recorded(name):
    return json.loads(gzip.decompress((Path(__file__).parent / f"data/{name}.json.gz").read_bytes()))


KW, OD = recorded("kernelwarehouse"), recorded("odconv")
for record in OD.values():
    record["config"] = {key: record[key] for key in ("model", "kernel_num", "reduction")}
DATA = {**KW, **OD}
# the largest one last
DYNAMIC = sorted((name for name in KW if name.startswith("kw")), key=lambda name: KW[name]["params"])
SMALL = ["kw1x_resnet18", "kw1d2x_mobilenetv2_050", "kw1x_mobilenetv2_050", "kw1x_convnext_tiny"]


def released_state(record):
    shapes = {
        key: torch.empty(shape, dtype=torch.int64 if key.endswith("num_batches_tracked") else torch.float32)
        for key, shape in record["keys"].items()
    }
    return fill.fill_(shapes, record["seed"])


@functools.lru_cache(maxsize=1)
def loaded_model(name):
    record = DATA[name]
    model = build_model({**record["config"], "drop_path": 0.0, "dropout": 0.0})
    assert sum(p.numel() for p in model.parameters()) == record["params"]
    load_weights(model, {"model": released_state(record)})
    model.double()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    return model, {key: value.clone() for key, value in model.state_dict().items()}


def run(model, state, x, targets, order=None):
    """A pass in train mode, its gradient, and a pass in eval mode with the statistics of the first: name -> values."""
    model.load_state_dict(state)
    model.train().zero_grad()
    with forced_order(order):
        logits = model(x)
        loss = F.cross_entropy(logits, torch.tensor(targets))
        loss.backward()
        with torch.no_grad():
            evaluated = model.eval()(x)
    norms = {key: p.grad.norm() for key, p in model.named_parameters()}
    total = torch.stack(list(norms.values())).norm()
    return {"train": logits.detach(), "loss": loss.detach(), "eval": evaluated, "norm": total, "norms": norms}


def difference(ours, expected):
    """How far a run is from what was expected, each number in units of what it may differ by."""
    spread = ours["train"].std()
    found = {
        "train": (ours["train"][:, :8] - expected["train"]).abs().max() / spread,
        "loss": (ours["loss"] - expected["loss"]).abs() / spread,
    }
    if "eval" in expected:
        found["eval"] = (ours["eval"][:, :8] - expected["eval"]).abs().max() / ours["eval"].std()
    if "norms" in expected:
        largest = max(expected["norms"].values())
        for key, norm in expected["norms"].items():
            found[key] = (ours["norms"][key] - norm).abs() / max(ours["norms"][key], 1e-3 * largest)
    else:
        found["norm"] = (ours["norm"] - expected["norm"]).abs() / expected["norm"]
    return {what: float(value) / NETWORK for what, value in found.items()}


def compare(name, temperature, order=None, strict=True):
    """All numbers of a released model at a temperature, to 1e-6.

    strict False is for the temperatures at which some of these networks, on a few images of noise, amplify rounding by
    1e9 and more: there they have to agree as far as the network agrees with itself when its input is rounded
    differently.
    """
    record = DATA[name]
    model, state = loaded_model(name)
    set_temperature(model, float(temperature))
    x = fill.make_input(record["input"], record["seed"]).double()
    ours = run(model, state, x, record["targets"], order)

    released = record["train"][temperature]
    expected = {"train": torch.tensor(released["logits"]), "loss": released["loss"]}
    if temperature in record["eval"]:
        expected["eval"] = torch.tensor(record["eval"][temperature]["logits"])
    if isinstance(released["grad_norm"], dict):
        keys = own_keys(model, {key: key for key in record["keys"]})
        norms = released["grad_norm"]
        expected["norms"] = {key: norms[old] for key, old in keys.items() if old in norms}
        assert len(expected["norms"]) > 10
    else:
        expected["norm"] = released["grad_norm"]
    found = difference(ours, expected)
    allowed = dict.fromkeys(found, 1.0)
    if not strict and max(found.values()) > 1:
        again, *rounded = (run(model, state, x * f, record["targets"], order) for f in (1, 1 + 1e-15, 1 - 1e-15))
        assert torch.equal(again["train"], ours["train"]), "the same input gives the same numbers"
        here = {**ours, "train": ours["train"][:, :8], "eval": ours["eval"][:, :8]}
        own = [difference(other, {key: here[key] for key in expected}) for other in rounded]
        allowed = {what: 1 + 4 * max(other[what] for other in own) for what in found}
    assert {what: value for what, value in found.items() if not value <= allowed[what]} == {}


def last_temperature(name):
    """The one whose gradient norms are recorded per parameter."""
    return list(DATA[name]["train"])[-1]


@pytest.mark.parametrize("name", DATA)
def test_released_model(name):
    compare(name, last_temperature(name))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ("od_resnet50_4x", "od_resnet101_1x") else n for n in OD],
)
def test_last_temperature_of_odconv(name):
    """The one that released models are evaluated at."""
    compare(name, "1.0", strict=False)


@pytest.mark.parametrize("name", [name for name in OD if "resnet" in name])
def test_keys_and_shapes_of_odconv(name):
    """timm names the layers of ResNets as the released code does; MobileNetV2's are renamed."""
    state = build_model(DATA[name]["config"]).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == DATA[name]["keys"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("temperature", ["0.0", "1.0"])
def test_temperature(name, temperature):
    compare(name, temperature, strict=False)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in DYNAMIC if name not in SMALL)]
)
def test_order(order, name):
    compare(name, last_temperature(name), order)


@pytest.mark.slow
@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("order", [None, *ORDERS])
def test_every_temperature(order, name):
    for temperature in DATA[name]["train"]:
        compare(name, temperature, order, strict=False)


@pytest.mark.parametrize(
    "name", ["kw1x_resnet18", "kw1d2x_mobilenetv2_050", "kw1x_convnext_tiny", "od_mobilenetv2_050_1x"]
)
@pytest.mark.parametrize("wrapper", ["module", "state_dict", "bare", "parallel", "file"])
def test_forms_of_a_checkpoint(name, wrapper, tmp_path):
    state = released_state(DATA[name])
    checkpoint = {
        "module": {"module": state},
        "state_dict": {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3},
        "bare": state,
        "parallel": {"model": {f"module.{key}": value for key, value in state.items()}},
        "file": tmp_path / "model.pth",
    }[wrapper]
    if wrapper == "file":
        torch.save({"model": state}, checkpoint)
    model, expected = build_model(DATA[name]["config"]), build_model(DATA[name]["config"])
    load_weights(expected, {"model": state})
    load_weights(model, checkpoint)
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())
    sums = sorted(float(value.double().sum()) for value in state.values())
    assert sums == sorted(float(value.double().sum()) for value in model.state_dict().values())
