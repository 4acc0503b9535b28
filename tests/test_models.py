"""Converted models: what they replace, and that a warehouse stays one wherever the model goes."""

import copy
import io
import math
import warnings

import pytest
import timm
import torch
from helpers import METHODS, replaced
from layer_checks import counting_backend
from processes import in_processes
from timm.utils import ModelEmaV3
from tolerance import assert_same, difference
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from models import (
    ConfigError,
    build_model,
    convert,
    get_temperature,
    load_weights,
    set_temperature,
    temperature_range,
    warehouse_layers,
)
from models.methods.kernel_warehouse.plans import family, group, resnet_plan, share
from models.methods.layer import AttentionNorm

# every method once, KernelWarehouse on the backbones that it has a plan for
KW = {"reduction": 0.0625, "cell_num_ratio": 1, "cell_inplane_ratio": 1, "cell_outplane_ratio": 1}
SMALL = {
    "resnet18": {**KW, "model": "kw_resnet18", "sharing_range": "layer_conv"},
    "mobilenetv2_050": {**KW, "model": "kw_mobilenetv2_050", "sharing_range": ["layer", "pwconv"]},
    "half_mobilenetv2_050": {"model": "kw1d2x_mobilenetv2_050"},
    "convnext_atto": {**KW, "model": "kw_convnext_atto", "sharing_range": "layer_pwconv"},
    "vit": {"model": "kw_test_vit", "cell_inplane_ratio": 0.5, "cell_outplane_ratio": 0.5},
    **{prefix: METHODS[prefix] for prefix in METHODS if prefix not in ("kw", "kw1d2x")},
}


@pytest.fixture(params=SMALL)
def model(request):
    return build_model(SMALL[request.param], num_classes=10)


def small_model():
    return build_model(SMALL["resnet18"], num_classes=10)


def image(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(5))


def assert_shared(model, like):
    """The same network, whose layers take their cells from the warehouses at the root of their own model."""
    assert warehouse_layers(model) == warehouse_layers(like)
    assert all(users for users in warehouse_layers(model).values())
    assert model.state_dict().keys() == like.state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in like.parameters())
    for module in model.modules():
        if hasattr(module, "_warehouse"):
            assert module._warehouse is model.warehouses[module._warehouse.name]
    before = train_mode_logits(model)
    warehouses = getattr(model, "warehouses", {})
    kept = {name: warehouse.cells.clone() for name, warehouse in warehouses.items()}
    with torch.no_grad():
        for warehouse in warehouses.values():
            warehouse.cells += 0.5 * torch.randn_like(warehouse.cells)
        assert not kept or difference(train_mode_logits(model), before) > 0.05
        for name, warehouse in warehouses.items():
            warehouse.cells.copy_(kept[name])
    assert torch.equal(train_mode_logits(model), before)


@torch.no_grad()
def train_mode_logits(model):
    """With the statistics of the batch, since an untrained network's signal fades without."""
    torch.manual_seed(0)
    return copy.deepcopy(model).train()(image(4).to(next(model.parameters()).dtype))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "double": lambda model: copy.deepcopy(model).double(),
    "half": lambda model: copy.deepcopy(model).half(),
    "ema": lambda model: ModelEmaV3(model, decay=0.5).module,
    "to": lambda model: copy.deepcopy(model).to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole_and_apart(model, how):
    annealed = temperature_range(model) != (0, 0)
    set_temperature(model, 0.5)
    other = COPIES[how](model)
    assert other is not model
    ours, theirs = ({p.data_ptr() for p in m.parameters() if p.numel()} for m in (model, other))
    assert not ours & theirs, "the copy shares memory with the original"
    assert_shared(other, model)
    before = train_mode_logits(other)
    if how in ("deepcopy", "pickle", "ema"):
        assert torch.equal(before, train_mode_logits(model))
    assert get_temperature(other) == get_temperature(model) == 0.5 * annealed
    set_temperature(model, 0.25)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert get_temperature(other) == 0.5 * annealed
    assert torch.equal(train_mode_logits(other), before)


def test_ema_follows_the_warehouses():
    model = small_model()
    ema = ModelEmaV3(model, decay=0.75)
    before = {name: w.cells.clone() for name, w in model.warehouses.items()}
    with torch.no_grad():
        for warehouse in model.warehouses.values():
            warehouse.cells += 1.0
    ema.update(model)
    for name, warehouse in ema.module.warehouses.items():
        assert_same(warehouse.cells, before[name] + 0.25)


def test_gradients_of_all_layers_reach_the_warehouse():
    """A warehouse's gradient is the sum over its layers, each computed with all others detached."""
    model = small_model().double().eval()
    x = image().double()
    model(x).square().sum().backward()
    name = next(iter(model.warehouses))
    cells = model.warehouses[name].cells
    total = torch.zeros_like(cells)
    users = [m for m in model.modules() if getattr(m, "_warehouse", None) is model.warehouses[name]]
    assert len(users) == 6
    for user in users:
        own = copy.deepcopy(model.warehouses[name])
        object.__setattr__(user, "_warehouse", own)
        model(x).square().sum().backward()
        total += own.cells.grad
        object.__setattr__(user, "_warehouse", model.warehouses[name])
    assert difference(total, _first_gradient(model, x, cells)) < 1e-10


def _first_gradient(model, x, cells):
    return torch.autograd.grad(model(x).square().sum(), cells)[0]


# compiling takes seconds: with --slow layers that call one operator with one attention, and timm's attention modules
ONE_CALL = ("dyconv", "condconv", "weightnet", "we", "od", "se", "cbam", "eca")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ONE_CALL else name
        for name in SMALL
        if "mobilenet" not in name
    ],
)
def test_compile_without_graph_breaks(name):
    # compiled code is kept per function of timm's, and only so often
    torch.compiler.reset()
    model = build_model(SMALL[name], num_classes=10).eval()
    set_temperature(model, 0.5)
    graphs = []
    compiled = torch.compile(model, backend=counting_backend(graphs), fullgraph=True)
    for batch in range(1, 11):
        set_temperature(model, 1 / batch)
        assert_same(compiled(image(batch)), model(image(batch)))
    # one for the first batch size, one for all others
    assert len(graphs) <= 2
    compiled(image(2)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_value_leaves_the_device():
    """A step never waits for a GPU: nothing in it asks for the value of a tensor."""

    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            assert operator is not torch.ops.aten._local_scalar_dense.default, "a value was asked for"
            return operator(*args, **(kwargs or {}))

    for name in SMALL:
        model = build_model(SMALL[name], num_classes=10).train()
        with Refusing():
            model(image()).square().sum().backward()
            set_temperature(model, 0.5)
    with pytest.raises(AssertionError, match="asked for"), Refusing():
        image().sum().item()


@pytest.mark.slow
def test_inductor():
    model = small_model().eval()
    assert_same(torch.compile(model)(image()), model(image()), torch.float32)


def test_export():
    model = small_model().eval()
    program = torch.export.export(model, (image(),))
    assert_same(program.module()(image()), model(image()))


def _ddp_gradients(rank, config, state):
    model = build_model(config, num_classes=10)
    model.load_state_dict(state)
    set_temperature(model, 0.5)
    parallel = DistributedDataParallel(model.double().eval())
    half = image(4).double()[rank * 2 : rank * 2 + 2]
    parallel(half).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


# a process that imports torch takes seconds, and two are enough to show what goes for all
@pytest.mark.parametrize(
    "name",
    [name if name in ("resnet18", "half_mobilenetv2_050", "kr") else pytest.param(name, marks=pytest.mark.slow)
     for name in SMALL],
)  # fmt: skip
def test_two_processes_give_the_gradients_of_one(name):
    model = build_model(SMALL[name], num_classes=10)
    set_temperature(model, 0.5)
    gradients, _ = in_processes(_ddp_gradients, SMALL[name], model.state_dict())
    model.double().eval()(image(4).double()).square().mean().backward()
    for key, parameter in model.named_parameters():
        # timm interpolates position embeddings in float32
        limit = 1e-6 if key == "pos_embed" else 1e-10
        assert difference(gradients[key], parameter.grad) < limit, key


def test_samples_are_independent_in_eval_mode(model):
    model.double().eval()
    together = model(image(3).double())
    for i in range(3):
        assert difference(model(image(3).double()[i : i + 1])[0], together[i]) < 1e-9


def test_single_sample_in_train_mode(model):
    """Norms of attentions take their running statistics, with one warning; the backbone's see more than one value."""
    before = {name: value.clone() for name, value in model.named_buffers() if "attention" in name}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        logits = model.train()(image(1, 64))
        logits.sum().backward()
    assert torch.isfinite(logits).all()
    normed = any(isinstance(module, AttentionNorm) for module in model.modules())
    assert len([w for w in caught if "running statistics" in str(w.message)]) == normed
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers() if name in before)


def test_every_parameter_is_used(model):
    """DistributedDataParallel waits for the gradients of all of them."""
    model.train()(image(4, 64)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_channels_last_is_the_same_function(model):
    expected = model.double().eval()(image().double())
    model.to(memory_format=torch.channels_last)
    got = model(image().double().contiguous(memory_format=torch.channels_last))
    assert difference(got, expected) < 1e-9


def test_mixed_precision(model):
    """bfloat16 on the CPU: close to float32, and gradients of every parameter, in its own type."""
    model.train()
    expected = train_mode_logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        logits = model(image(4))
    # MobileNetV2 with random weights amplifies any rounding, without autocast as well
    assert type(model).__name__ == "EfficientNet" or difference(logits.float(), expected) < 0.3
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_state_has_no_temperature(model):
    """Released files have none."""
    assert not [key for key in model.state_dict() if "temperature" in key or "beta" in key]


def test_static_models_have_no_temperature():
    model = build_model({"model": "resnet18"}, num_classes=3)
    assert not hasattr(model, "warehouses") and warehouse_layers(model) == {}
    set_temperature(model, 0.5)
    assert get_temperature(model) == 0.0


# --- plans ------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "sharing", "counts"),
    [
        # m of table 14, in its order; the warehouses of ConvNeXt and MobileNetV2 are listed by kind there
        ("resnet18", "layer_conv", [56, 47, 47, 27]),
        ("resnet50", "layer_conv", [87, 104, 138, 47]),
        ("mobilenetv2_100", ["layer", "pwconv"], [9, 36, 34, 78, 18, 42, 27, 102, 36, 120, 27, 58, 27]),
        ("convnext_tiny", "layer_pwconv", [16, 4, 4, 4, 147, 24, 147, 24, 441, 72, 147, 24]),
    ],
)
def test_mixtures_of_table_14(backbone, sharing, counts):
    model = build_model({**KW, "model": f"kw_{backbone}", "sharing_range": sharing})
    assert [sum(w.mixtures.values()) for w in model.warehouses.values()] == counts


def test_reassigned_layers_of_table_15():
    model = timm.create_model("resnet18")
    groups = group(share(resnet_plan(model), "layer_conv"))
    assert groups["stage0_layer_conv"][-2:] == ["layer2.0.conv1", "layer2.0.downsample.0"]
    assert groups["stage3_layer_conv"] == ["layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenetv2_050", "convnext_atto"])
def test_without_sharing_range_every_layer_stands_alone(backbone):
    with torch.device("meta"):
        model = build_model({**KW, "model": f"kw_{backbone}", "sharing_range": []})
    assert all(len(layers) == 1 for layers in warehouse_layers(model).values())


@pytest.mark.parametrize(
    ("name", "like"),
    [("resnet18", "resnet18"), ("mobilenetv2_050", "mobilenetv2_050"), ("convnext_tiny", "convnext_atto")],
)
def test_a_family_shares_as_in_the_paper(name, like):
    """In its networks; in a smaller one, such as ConvNeXt-Atto, the plan's attentions outgrow the kernels."""
    with torch.device("meta"):
        explicit = build_model({**SMALL[like], "model": f"kw_{name}"})
        default = convert(timm.create_model(name))
    assert default.conversion == explicit.conversion
    assert default.state_dict().keys() == explicit.state_dict().keys()
    assert family(nn.Linear(2, 2))[1:] == ([], "batch")


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("layer_conv", ["layer", "conv"]),
        ("layer_pwconv", ["layer", "conv", "pwconv"]),
        (["layer", "pwconv"], ["layer", "pwconv"]),
        ([], []),
    ],
)
def test_sharing_range(given, parts):
    plan = [("x", "stage1_layer2_dwconv0"), ("y", "stage1_layer2_pwconv1"), ("z", "stage1_layer0_conv3")]
    joined = {name for _, name in share(plan, given)}
    expected = set()
    for _, name in plan:
        for part in parts:
            name = "_".join(w.rstrip("0123456789") if w.rstrip("0123456789") == part else w for w in name.split("_"))
        expected.add(name)
    assert joined == expected


DEIT = {"value": "attn.qkv.value", "output": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


@pytest.mark.parametrize(
    ("groups", "kinds", "ratio", "tiny", "small"),
    [
        # the text's, and the others that the configs' notes name
        (2, {"value": "v", "fc1": "m", "fc2": "m"}, 1, 6.393, 24.336),
        (2, {"value": "v", "output": "o", "fc1": "1", "fc2": "2"}, 0.5, 6.394, 24.364),
        (3, {"value": "v", "output": "o", "fc1": "m", "fc2": "m"}, 1, 6.380, 24.354),
        (3, {"value": "v", "output": "v", "fc1": "m", "fc2": "m"}, 1, 6.382, 24.357),
        (3, {"value": "v", "output": "v", "fc1": "1", "fc2": "2"}, 0.5, 6.382, 24.337),
    ],
)
def test_plans_of_vision_transformers(groups, kinds, ratio, tiny, small):
    """Table 11 has 6.39 and 24.36 M; the paper gives neither groups nor cells."""
    for name, expected in (("deit_tiny", tiny), ("deit_small", small)):
        warehouses = {}
        for block in range(12):
            for kind, warehouse in kinds.items():
                own = warehouses.setdefault(f"{warehouse}{block * groups // 12}", {"layers": []})
                own["layers"].append(f"blocks.{block}.{DEIT[kind]}")
        ratios = {"cell_inplane_ratio": ratio, "cell_outplane_ratio": ratio}
        with torch.device("meta"):
            model = build_model({"model": f"kw_{name}", "warehouses": warehouses, "reduction": 1 / 16, **ratios})
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    "backbone",
    ["resnet34", "resnet101", "resnet10t", "resnet26d", "mobilenetv2_075", "convnext_nano", "deit_tiny_patch16_224"],
)
def test_any_timm_model_can_be_converted(backbone):
    with torch.device("meta"):
        model = convert(timm.create_model(backbone, num_classes=10))
    assert len(replaced(model)) >= 8
    assert set(replaced(model)) == {layer for users in warehouse_layers(model).values() for layer in users}


class OwnNet(nn.Module):
    """A person's own network."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=4))
        self.mid = nn.Linear(16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.mid(self.body(self.stem(x)).mean((2, 3))).relu())


@pytest.mark.parametrize("budget", [1, 2])
def test_own_network_keeps_its_weights(budget):
    """Every mixture is its own cell, at every temperature: the network computes what it did before."""
    net = OwnNet().double().eval()
    expected = net(image().double())
    assert convert(net, keep_weights=True, cell_num_ratio=budget) is net
    assert list(replaced(net)) == ["body.0", "body.2", "mid"]
    for temperature in (1.0, 0.3, 0.0):
        set_temperature(net, temperature)
        assert difference(net(image().double()), expected) < 1e-12


def test_explicit_warehouses():
    net = convert(OwnNet(), warehouses={"all": {"layers": ["body.*", "stem"], "cell_num_ratio": 2}})
    assert replaced(net) == {"stem": "all", "body.0": "all", "body.2": "all"}
    assert list(net.warehouses["all"].kernels) == ["stem", "body.0", "body.2"]
    assert type(net.head) is nn.Linear
    assert net(image()).shape == (2, 5)


def circular(_):
    return nn.Conv2d(4, 4, 3, padding_mode="circular")


def test_a_module_in_two_places_is_replaced_in_both():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), conv, nn.ReLU(), conv, nn.Flatten(), nn.Linear(4 * 32 * 32, 5))
    convert(net)
    assert net[1] is net[3] is not conv and list(replaced(net)) == ["1"]
    assert net(image()).shape == (2, 5)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: convert(OwnNet(), warehouses={"w": {"layers": ["trunk.*"]}}), ["'w'", "trunk.*", "stem"]),
        (lambda: convert(OwnNet(), warehouses={"a": {"layers": ["stem"]}, "b": {"layers": ["st*"]}}), ["stem", "'b'"]),
        (lambda: convert(OwnNet(), warehouses={"w": {"layers": ["stem", "mid"]}}), ["'w'", "1d, 2d"]),
        (lambda: convert(OwnNet(), warehouses={"w": {"layers": ["stem"], "x": 1}}), ["'w'", "'x'", "layers"]),
        (lambda: convert(OwnNet(), warehouses={"w": {"cell_num_ratio": 1}}), ["'w'", "no layers"]),
        (lambda: convert(OwnNet(), keep_weights=True, cell_num_ratio=0.5), ["'body_0'", "0.5"]),
        (lambda: convert(OwnNet(), cell_number=2), ["cell_number", "cell_num_ratio"]),
        (lambda: convert(OwnNet(), reduction=[0.1, 0.2]), ["reduction has 2 values for 3 warehouses", "body_0"]),
        (lambda: convert(nn.ReLU()), ["no convolution"]),
        (lambda: convert(convert(OwnNet())), ["already"]),
        (lambda: convert(OwnNet(), sharing_range=["layers"]), ["layers", "pwconv"]),
        (lambda: convert(nn.Sequential(*map(circular, range(3)))), ["'1'", "circular"]),
        (lambda: build_model({"model": "kw_resnet8"}), ["kw_resnet8", "kw_resnet18"]),
        *(
            (lambda name=name: build_model({"model": f"kw1d2x_{name}"}), ["MobileNetV2", f"kw_{name}"])
            for name in ("resnet18", "efficientnet_b0", "efficientnet_lite0", "mnasnet_050")
        ),
        *(
            (lambda own=own: build_model({"model": "resnet18", **own}), [*own, "static", "kw_resnet18"])
            for own in ({"cell_num_ratio": 4}, {"sharing_range": ["layer"]}, {"reduction": 0.1}, {"kernel_num": 1})
        ),
        (lambda: build_model({**SMALL["resnet18"], "cell_inplane_ratio": 0.3}), ["stage0", "layer1.0.conv1", "0.3"]),
        (lambda: build_model({"model": "kw_resnet18", "cell_num_ration": 1}), ["cell_num_ration", "cell_num_ratio"]),
    ],
)  # fmt: skip
def test_mistakes_are_explained(make, named):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in named), str(error.value)
    assert "\n" not in str(error.value)


def test_failed_conversion_changes_nothing():
    net = OwnNet()
    before = list(net.state_dict())
    with pytest.raises(ValueError):
        convert(net, cell_outplane_ratio=0.3)
    assert list(net.state_dict()) == before


def test_drop_path_of_resnets_is_the_same_in_every_block():
    model = build_model({**SMALL["resnet18"], "drop_path": 0.2})
    assert [block.drop_path.drop_prob for block in model.layer1] == [0.2, 0.2]
    linear = build_model({**SMALL["resnet18"], "drop_path": 0.2, "block_drop_path": "linear"})
    assert math.isclose(linear.layer4[-1].drop_path.drop_prob, 0.2)
    assert build_model({"model": "convnext_atto", "drop_path": 0.2}).stages[0].blocks[1].drop_path.drop_prob < 0.2


def test_settings_of_the_half_mobilenet_come_from_the_model():
    model = build_model("configs/mobilenetv2_050/kw1d2x_mobilenetv2_050.json")
    # the released command line's 0 beats the 0.1 of the released model
    assert model.drop_rate == 0.0
    assert list(model.warehouses)[-1] == "classifier" and model.warehouses["classifier"].cells.shape == (
        20,
        1000,
        32,
        1,
    )


# --- weights ------------------------------------------------------------


def test_weights_of_another_model_are_refused():
    model, before = small_model(), small_model().state_dict()
    model.load_state_dict(before)
    other = build_model(SMALL["mobilenetv2_050"], num_classes=10)
    with pytest.raises(ValueError) as error:
        load_weights(model, other.state_dict())
    assert "missing" in str(error.value) and "conv1.weight" in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    wider = build_model({**SMALL["resnet18"], "cell_num_ratio": 2}, num_classes=10)
    with pytest.raises(
        ValueError, match=r"another shape \(layer1.0.conv1.attention.fc2.weight \[1017, 16\] for \[513, 16\]"
    ):
        load_weights(model, wider.state_dict())


def test_own_weights_load_from_every_form(tmp_path):
    source = small_model()
    for checkpoint in ({"model": source.state_dict()}, source.state_dict()):
        path = tmp_path / "weights.pth"
        torch.save(checkpoint, path)
        for given in (checkpoint, path, str(path)):
            model = load_weights(small_model(), given)
            assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


class Evil:
    """Pickles as a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("environment", [None, "1"], ids=["plain", "forced"])
def test_a_checkpoint_never_runs_code(tmp_path, monkeypatch, zipped, environment):
    if environment:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", environment)
    trace = tmp_path / "code_ran"
    state = small_model().state_dict()
    torch.save({"model": state, "args": Evil(trace)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"x\.pth"):
        load_weights(small_model(), tmp_path / "x.pth")
    assert not trace.exists()


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": small_model().state_dict()}, path)
    good = path.read_bytes()
    contents = {"empty": b"", "text": b"<html>not found</html>" * 9, "half": good[: len(good) // 2]}
    flipped = bytearray(good)
    flipped[len(good) // 3] ^= 16
    contents["flipped"] = bytes(flipped)
    for content in contents.values():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.pth"):
            load_weights(small_model(), path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_weights(small_model(), tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"no weights found"):
        load_weights(small_model(), {"epoch": 3})
    with pytest.raises(ConfigError):
        build_model({"model": "kw_resnet18", "epochs": "many"})


def test_a_model_can_be_channels_last():
    """With one call, as any other: the warehouses have five dimensions and are left as they are."""
    model = build_model({"model": "kw_resnet18", "reduction": 0.0625}).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    cells = next(iter(model.warehouses.values())).cells
    model.to(memory_format=torch.channels_last)
    assert cells is next(iter(model.warehouses.values())).cells and cells.is_contiguous()
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(model(x.to(memory_format=torch.channels_last)), expected)
