"""Parameter groups, optimizers and schedules, against rules and formulas written out here."""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import KW

from command_line import parse_command_line
from models import build_model, warehouse_layers
from models.options import OPTIONS
from models.released import own_keys
from optim_factory import Schedule, create_optimizer, parameter_groups

ROOT = Path(__file__).resolve().parent.parent
# what the released code's optimizers are given for six networks, by the rules of that code from its names and shapes:
# KernelWarehouse: no decay of one-dimensional parameters and of names in .bias; ODConv: decay of all
RELEASED = json.loads(gzip.decompress((ROOT / "tests/data/released_groups.json.gz").read_bytes()))


def options(**changes):
    return argparse.Namespace(**{**{name: option.default for name, option in OPTIONS.items()}, **changes})


def cosine_schedule(base, final, epochs, steps, warmup_epochs=0, warmup_steps=-1):
    """The released schedule, as an array over all updates."""
    warmup = warmup_steps if warmup_steps > 0 else warmup_epochs * steps
    ramp = np.linspace(0, base, warmup)
    iterations = np.arange(epochs * steps - warmup)
    return np.concatenate([ramp, final + 0.5 * (base - final) * (1 + np.cos(np.pi * iterations / len(iterations)))])


@pytest.mark.parametrize("name", RELEASED)
def test_configs_group_parameters_as_the_released_code(name):
    released = RELEASED[name]
    args, given = parse_command_line(["--kw_config", str(ROOT / released["config"])])
    model = build_model(ROOT / released["config"])
    optimizer = create_optimizer(args, model)
    ours = {n: (group["weight_decay"], group["lr"]) for group in optimizer.param_groups for n in group["names"]}
    theirs = {n: (group["weight_decay"], group["lr"]) for group in released["groups"] for n in group["names"]}
    names = own_keys(model, {n: n for n in theirs})
    assert {names[n]: values for n, values in ours.items()} == theirs
    assert type(optimizer).__name__ == released["optimizer"]
    for setting, value in released["settings"].items():
        value = tuple(value) if isinstance(value, list) else value
        assert all(group[setting] == value for group in optimizer.param_groups), setting


def test_layer_scales_are_decayed_where_the_released_code_does():
    model = build_model(ROOT / "configs/convnext/kw1x_convnext_tiny.json")
    undecayed, decayed = (
        {
            n
            for group in parameter_groups(model, 0.05, decay_layer_scale=flag)
            for n in group["names"]
            if group["decayed"]
        }
        for flag in (False, True)
    )
    assert len(decayed - undecayed) == 18 and all(n.endswith(".gamma") for n in decayed - undecayed)


@pytest.mark.parametrize(
    ("opt", "nesterov", "momentum"),
    [("sgd", True, 0.9), ("nesterov", True, 0.9), ("momentum", False, 0.9), ("sgd", False, 0)],
)
def test_words_for_sgd(opt, nesterov, momentum):
    optimizer = create_optimizer(options(opt=opt, momentum=momentum), timm.create_model("test_resnet"))
    assert all(group["nesterov"] == nesterov for group in optimizer.param_groups)


def test_cosine_once_an_epoch():
    """ODConv's: 0.5 lr (1 + cos(pi epoch / epochs)), the same for all updates of an epoch."""
    schedule = Schedule(options(epochs=7, lr=0.3, min_lr=0, warmup_epochs=0, schedule_by="epoch"), steps_per_epoch=11)
    expected = 0.15 * (1 + np.cos(np.pi * np.arange(7) / 7))
    np.testing.assert_allclose([schedule.lr(step) for step in range(77)], expected.repeat(11), rtol=1e-12, atol=1e-15)


def test_cosine_once_an_epoch_after_a_warmup_that_ends_within_one():
    schedule = Schedule(options(epochs=4, lr=0.3, min_lr=0, warmup_steps=5, schedule_by="epoch"), steps_per_epoch=4)
    values = [schedule.lr(step) for step in range(16)]
    np.testing.assert_allclose(values[:5], np.linspace(0, 0.3, 5))
    starts = [5, 5, 5, *[8] * 4, *[12] * 4]
    np.testing.assert_allclose(values[5:], [0.15 * (1 + np.cos(np.pi * (start - 5) / 11)) for start in starts])


@pytest.mark.parametrize(
    "warmup", [{"warmup_epochs": 0}, {"warmup_epochs": 2}, {"warmup_epochs": 2, "warmup_steps": 5}]
)
def test_cosine_schedule(warmup):
    schedule = Schedule(options(epochs=7, lr=0.3, min_lr=0.01, **warmup), steps_per_epoch=11)
    expected = cosine_schedule(0.3, 0.01, 7, 11, **warmup)
    np.testing.assert_allclose([schedule.lr(step) for step in range(77)], expected, rtol=1e-12, atol=1e-15)


def test_warmup_longer_than_the_run():
    schedule = Schedule(options(epochs=1, warmup_epochs=20, lr=1.0), steps_per_epoch=3)
    np.testing.assert_allclose([schedule.lr(step) for step in range(3)], np.linspace(0, 1, 60)[:3])


def test_step_schedule():
    """The papers' traditional recipe: 0.1, divided by 10 every 30 epochs."""
    schedule = Schedule(options(epochs=100, lr=0.1, lr_schedule="step", warmup_epochs=0), steps_per_epoch=2)
    values = [schedule.lr(2 * epoch + 1) for epoch in (0, 29, 30, 59, 60, 89, 90, 99)]
    np.testing.assert_allclose(values, [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])


def test_weight_decay_schedule():
    args = options(epochs=5, weight_decay=0.05, weight_decay_end=0.2)
    schedule = Schedule(args, steps_per_epoch=4)
    expected = cosine_schedule(0.05, 0.2, 5, 4)
    np.testing.assert_allclose([schedule.weight_decay(step) for step in range(20)], expected)
    optimizer = create_optimizer(args, timm.create_model("test_resnet"))
    schedule.apply(optimizer, 13)
    decays = {group["decayed"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {True: pytest.approx(expected[13]), False: 0.0}
    assert Schedule(options(epochs=5), 4).weight_decay(13) == 0.05


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "kw_resnet18", "vit_tiny_patch16_224"])
def test_every_parameter_is_in_one_group(name):
    model = build_model({"model": name, **(KW if name.startswith("kw") else {})}, num_classes=7)
    groups = parameter_groups(model, 0.05)
    decay = {n: group["weight_decay"] for group in groups for n in group["names"]}
    assert sorted(decay) == sorted(n for n, _ in model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    own = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    for n, parameter in model.named_parameters():
        plain = len(parameter.shape) == 1 or n.endswith(".bias") or n in own
        assert decay[n] == (0.0 if plain else 0.05), n
    assert all(decay[cells] == 0.05 for cells in warehouse_layers(model))
    if name.startswith("vit"):
        assert decay["pos_embed"] == 0.0


def test_frozen_parameters_are_left_out():
    model = timm.create_model("test_resnet")
    frozen = [n for n, _ in model.named_parameters()][:5]
    for n in frozen:
        model.get_parameter(n).requires_grad_(False)
    names = [n for group in parameter_groups(model, 0.1) for n in group["names"]]
    assert sorted(names + frozen) == sorted(n for n, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["resnet18", "kw_resnet18"])
def test_layer_decay_by_stage(name):
    model = build_model({"model": name, **(KW if name.startswith("kw") else {})}, num_classes=7)
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    scale = {n: group["lr_scale"] for group in groups for n in group["names"]}
    assert sorted(scale) == sorted(n for n, _ in model.named_parameters())
    stages = {"conv1": 0, "bn1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4, "fc": 5}
    for n in scale:
        if not n.startswith("warehouses"):
            assert scale[n] == 0.5 ** (5 - stages[n.split(".")[0]]), n
    for cells, layers in warehouse_layers(model).items():
        homes = [stages[layer.split(".")[0]] for layer in layers]
        assert scale[cells] == 0.5 ** (5 - max(set(homes), key=lambda home: (homes.count(home), home))), (cells, homes)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "convnext_tiny", "kw_convnext_tiny"])
def test_layer_decay_knows_other_families(name):
    model = build_model({"model": name, **(KW if name.startswith("kw") else {})}, num_classes=7)
    scale = {n: group["lr_scale"] for group in parameter_groups(model, 0.05, 0.5) for n in group["names"]}
    head = next(n for n in scale if n.startswith(("classifier", "head")) and n.endswith("bias"))
    stem = next(n for n in scale if n.startswith(("conv_stem", "stem")))
    assert scale[head] == 1.0 and scale[stem] == min(scale.values()) and len(set(scale.values())) >= 5


@pytest.mark.parametrize("opt", ["adamw", "adam", "sgd", "momentum"])
def test_optimizer_is_torch_s_plain_one(opt):
    """The fused optimizer over groups does what the plain one does."""
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = create_optimizer(options(opt=opt, lr=0.1, momentum=0.8, opt_betas=[0.8, 0.9]), models[0])
    plain = [
        {"params": [models[1][0].weight], "weight_decay": 0.05},
        {"params": [models[1][0].bias, models[1][1].weight, models[1][1].bias], "weight_decay": 0.0},
    ]
    if opt in ("sgd", "momentum"):
        theirs = torch.optim.SGD(plain, lr=0.1, momentum=0.8, nesterov=opt == "sgd")
    else:
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[opt]
        theirs = kind(plain, lr=0.1, betas=(0.8, 0.9), eps=1e-8)
    for step in range(4):
        inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).double()
        for model, optimizer in zip(models, (ours, theirs)):
            model.zero_grad()
            model(inputs).pow(2).sum().backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("opt", ["adamw", "adam", "sgd", "momentum"])
def test_update_is_skipped_by_a_flag(opt):
    """What lets a GPU skip a bad update without the host knowing; also the very first one."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(5, 4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [create_optimizer(options(opt=opt, lr=0.1), model) for model in models]
    for bad in (1.0, 0.0, 1.0, 0.0):
        for parameter in models[0].parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if bad else 0.5)
        optimizers[0].found_inf = torch.tensor(bad)
        optimizers[0].step()
        if not bad:
            for parameter in models[1].parameters():
                parameter.grad = torch.full_like(parameter, 0.5)
            optimizers[1].step()
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))
