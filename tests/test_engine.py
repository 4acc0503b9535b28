"""The training step and the evaluation, against loops written out here."""

import argparse
import copy

import pytest
import torch
from helpers import KW
from processes import in_processes
from timm.utils import ModelEmaV3
from tolerance import difference
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from engine import NonFiniteLoss, amp_dtype, autocast, evaluate, temperature_at, train_one_epoch
from models import DCDConv2d, WEConv2d, build_model, get_temperature, set_temperature
from models.options import OPTIONS
from optim_factory import Schedule, create_optimizer
from utils import Process

CPU = torch.device("cpu")
CLASSES = 3


# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")


def options(**changes):
    quiet = {"log_interval": 1000, "epochs": 1, "warmup_epochs": 0, "min_lr": 0.0, "temp_epoch": 1}
    return argparse.Namespace(**{**{name: option.default for name, option in OPTIONS.items()}, **quiet, **changes})


def images(count=64, size=32):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    return torch.randn(count, 3, size, size, generator=generator) + labels[:, None, None, None], labels


def small_model(name, seed=0):
    torch.manual_seed(seed)
    return build_model({"model": name, **(KW if name.startswith("kw") else {})}, num_classes=CLASSES)


def train(model, args, data=None, ema=None, scaler=None):
    loader = DataLoader(TensorDataset(*(data or images())), batch_size=args.batch_size, drop_last=True)
    schedule = Schedule(args, len(loader) // args.update_freq)
    return train_one_epoch(
        model, loader, create_optimizer(args, model), schedule, torch.nn.CrossEntropyLoss(), args=args, epoch=0,
        process=Process(0, 1, 0, 1, CPU), scaler=scaler or torch.amp.GradScaler("cpu", enabled=False), ema=ema,
    )  # fmt: skip


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, DCDConv2d, WEConv2d], ids=lambda kind: kind.__name__)
def test_gradients_of_small_maps_in_mixed_precision(kind, compiled):
    """oneDNN leaves the gradient of a kernel's weights that see only padding as it found the memory."""
    dims = int(kind.__name__[-2])
    for kernel, stride, size, padding in ((3, 2, 1, 1), (5, 2, 1, 2), (5, 3, 2, 2), (3, 1, 1, 1), (3, 2, 5, 1)):
        layer = kind(16, 16, kernel, stride, padding).train()
        forward = torch.compile(layer, backend="aot_eager") if compiled else layer
        x = torch.randn(4, 16, *[size] * dims)
        with autocast(options(use_amp=True), CPU):
            y = forward(x)
        assert y.dtype == torch.bfloat16
        (gradient,) = torch.autograd.grad(y.float().sum(), layer.weight)
        (expected,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        assert difference(gradient, expected) < 0.05


def test_convolutions_in_mixed_precision_take_their_arguments_by_name():
    x, weight = torch.randn(4, 8, 1, 1), torch.randn(8, 8, 3, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(nn.functional.conv2d(x, weight, None, 2, 1).sum(), weight)
    calls = (
        lambda: nn.functional.conv2d(x, weight, stride=2, padding=1),
        lambda: nn.functional.conv2d(x, weight=weight, padding=(1, 1), stride=2),
        lambda: nn.functional.conv2d(input=x, weight=weight, bias=None, stride=(2, 2), padding=1, groups=1),
    )
    for call in calls:
        with autocast(options(use_amp=True), CPU):
            (gradient,) = torch.autograd.grad(call().float().sum(), weight)
        assert difference(gradient, expected) < 0.05


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["test_convnext", "kw_test_convnext"])
def test_accumulation_equals_the_large_batch(name, opt):
    """Batch 8 in 4 steps is batch 32 in one. These models have no BatchNorm, which sees batches."""
    results = []
    for batch_size, update_freq in ((32, 1), (8, 4)):
        model = small_model(name)
        start = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
        args = options(opt=opt, lr=0.01, batch_size=batch_size, update_freq=update_freq, clip_grad=1.0)
        metrics = train(model, args)
        moved = torch.nn.utils.parameters_to_vector(model.parameters()) - start
        results.append((moved.detach(), metrics))
    (once, first), (accumulated, second) = results
    # Adam divides by the gradient's own size, so rounding shows where a gradient is nearly 0; observed 3e-5 and 1e-6
    relative = (once - accumulated).norm() / once.norm()
    assert once.norm() > 0 and relative < (1e-3 if opt == "adamw" else 1e-5)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


def test_incomplete_update_is_dropped():
    """40 images are 5 batches of 8: one update of 4 batches, and one batch too few for another."""
    data = tuple(tensor[:40] for tensor in images())
    whole, cut = small_model("test_convnext"), small_model("test_convnext")
    args = options(opt="sgd", lr=0.01, batch_size=8, update_freq=4)
    train(whole, args, data)
    train(cut, args, tuple(tensor[:32] for tensor in data))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters()))


@pytest.mark.parametrize("use_amp", [False, True])
@pytest.mark.parametrize("clip_grad", [None, 0.1])
def test_step_is_the_written_out_one(use_amp, clip_grad):
    """Clipping works with and without mixed precision."""
    data = images(32)
    ours, plain = small_model("test_convnext"), small_model("test_convnext")
    metrics = train(
        ours,
        options(opt="momentum", lr=0.1, batch_size=16, use_amp=use_amp, clip_grad=clip_grad, weight_decay=0.0),
        data,
    )

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    plain.train()
    for step in range(2):
        chosen = slice(16 * step, 16 * step + 16)
        optimizer.param_groups[0]["lr"] = 0.1 if step == 0 else 0.05
        with torch.autocast("cpu", torch.bfloat16, enabled=use_amp):
            logits = plain(data[0][chosen])
        loss = torch.nn.functional.cross_entropy(logits.float(), data[1][chosen])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_grad or 1e9)
        optimizer.step()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_ema_follows_the_weights():
    model = small_model("test_resnet")
    ema = ModelEmaV3(model, decay=0.8)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    step = torch.optim.AdamW.step
    states = []

    class Recorder(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            result = step(self, *args, **kwargs)
            states.append({key: value.clone() for key, value in model.state_dict().items()})
            return result

    original, torch.optim.AdamW = torch.optim.AdamW, Recorder
    try:
        train(model, options(lr=0.01, batch_size=16), ema=ema)
    finally:
        torch.optim.AdamW = original
    assert len(states) == 4
    for state in states:
        for key, value in state.items():
            expected[key] = 0.8 * expected[key] + 0.2 * value if value.is_floating_point() else value
    for key, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_temperature_schedule():
    values = [temperature_at(step, steps_per_epoch=5, temp_epoch=2, temp_init_value=1.0) for step in range(15)]
    assert values == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0, 0])
    assert temperature_at(0, 5, 0, 1.0) == 0.0


@pytest.mark.parametrize("temp_epoch, expected", [(1, 0.25), (0, 0.0)])
def test_temperature_reaches_the_layers(temp_epoch, expected):
    model = small_model("kw_test_resnet")
    set_temperature(model, 1.0)
    metrics = train(model, options(batch_size=16, temp_epoch=temp_epoch))
    assert get_temperature(model) == pytest.approx(expected) == metrics["temperature"]


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_loss_stops_before_the_step(bad, clip_grad):
    data = images()
    data[0][40] = bad
    model, reference = small_model("test_convnext"), small_model("test_convnext")
    args = options(opt="sgd", lr=0.01, batch_size=16, clip_grad=clip_grad)
    with pytest.raises(NonFiniteLoss, match=r"step 2 of epoch 0"):
        train(model, args, data)
    # the weights are those after the two good updates
    schedule_of_four = options(opt="sgd", lr=0.01, batch_size=16, clip_grad=clip_grad, epochs=2)
    train(reference, schedule_of_four, tuple(tensor[:32] for tensor in data))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters()))


def test_loss_scaling_changes_nothing_but_skips_overflows():
    """Scaling by a power of two is exact, also with clipping; an overflow of the scale skips updates and lowers it."""
    args = options(opt="sgd", lr=0.01, batch_size=16, clip_grad=1.0)
    plain, scaled, overflowing = (small_model("test_convnext") for _ in range(3))
    with torch.no_grad():
        overflowing.head.fc.weight.mul_(1e4)
    start = [parameter.clone() for parameter in overflowing.parameters()]
    train(plain, args)
    train(scaled, args, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-20)
    train(overflowing, options(opt="sgd", lr=0.01, batch_size=64), scaler=scaler)
    assert scaler.get_scale() == 2.0**107
    assert all(torch.equal(a, b) for a, b in zip(overflowing.parameters(), start))


def _train_rank(rank):
    """One of two processes, each with half of the images; in the second epoch one image of process 1 is NaN.

    Returns the state dict and the error of both epochs.
    """
    model = small_model("kw_test_convnext")
    net = DistributedDataParallel(model)
    args = options(opt="sgd", lr=0.01, batch_size=8, update_freq=2, epochs=2)
    mine = tuple(tensor[rank::2] for tensor in images())
    loaders = [DataLoader(TensorDataset(*mine), batch_size=8)]
    bad = mine[0].clone()
    if rank == 1:
        bad[20] = float("nan")
    loaders.append(DataLoader(TensorDataset(bad, mine[1]), batch_size=8))
    optimizer, schedule = create_optimizer(args, model), Schedule(args, 2)
    scaler, epochs = torch.amp.GradScaler("cpu", enabled=False), []
    for epoch, loader in enumerate(loaders):
        error = None
        try:
            train_one_epoch(
                net, loader, optimizer, schedule, torch.nn.CrossEntropyLoss(), args=args, epoch=epoch,
                process=Process(rank, 2, rank, 2, CPU), scaler=scaler,
            )  # fmt: skip
        except NonFiniteLoss as caught:
            error = str(caught)
        epochs.append((copy.deepcopy(model.state_dict()), error))
    return epochs


def test_two_processes_train_as_one_and_stop_as_one(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (trained, _), ((first, error), (second, other_error)) = zip(*in_processes(_train_rank), strict=True)
    # two processes with batches of 8 and 2 steps are one with 32
    single = small_model("kw_test_convnext")
    train(single, options(opt="sgd", lr=0.01, batch_size=32, epochs=2))
    for name, value in single.state_dict().items():
        torch.testing.assert_close(trained[0][name], value, rtol=1e-4, atol=1e-6)
    # NaN in one process stops both at the same step, with the same finite weights
    assert error == other_error and "step 1 of epoch 1" in error
    for name, value in first.items():
        assert torch.isfinite(value).all() and torch.equal(value, second[name])


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("use_amp", [False, True])
def test_evaluation_is_the_naive_one(classes, use_amp, capsys):
    torch.manual_seed(0)
    model = build_model({"model": "test_resnet"}, num_classes=classes).eval()
    data = images(37)[0], torch.arange(37) % classes
    args = options(use_amp=use_amp)
    result = evaluate(model, DataLoader(TensorDataset(*data), batch_size=8), args=args, device=CPU)
    first = top = loss = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=use_amp):
        logits = torch.cat([model(part) for part in data[0].split(8)]).float()
    for row, label in zip(logits, data[1].tolist()):
        ranks = row.argsort(descending=True).tolist()
        first += ranks[0] == label
        top += label in ranks[:5]
        loss -= row.log_softmax(0)[label].item() / 37
    assert (result["correct1"], result["correct5"], result["count"]) == (first, top, 37)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    line = f"* Acc@1 {100 * first / 37:.3f} Acc@5 {100 * top / 37:.3f} loss {loss:.3f}"
    assert line in capsys.readouterr().out


def test_mixed_precision_type():
    assert amp_dtype(options(), CPU) is torch.bfloat16
    assert amp_dtype(options(amp_dtype="float16"), CPU) is torch.float16
