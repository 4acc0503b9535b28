"""What TensorBoard and Weights & Biases are given, read by the viewer's own reader and by stand-ins."""

import io
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import KW, METHODS, launch, quick, read_log
from PIL import Image

import main
import run_logs
from attention_log import LAYERS, NUMBERS, Attentions, picture
from models import build_model

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")


def board(folder):
    """The logs of a folder, as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "histograms": 0})
    return reader.Reload()


def test_tensorboard(tmp_path):
    options = {"model": "kw_test_resnet", **KW, "epochs": 2, "log_dir": tmp_path / "tb", "output_dir": tmp_path / "out"}
    assert main.main(quick(**options, temp_epoch=0)) == 0
    seen, log = board(tmp_path / "tb"), read_log(tmp_path / "out")
    losses = [(event.step, event.value) for event in seen.Scalars("epoch/test_loss")]
    assert losses == [(22 * (row["epoch"] + 1), pytest.approx(row["test_loss"])) for row in log]
    text = seen.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '    model: "kw_test_resnet"\n' in text and "    lr: 0.002\n" in text
    # the attentions of every epoch, to the first batch of the evaluation
    assert [event.step for event in seen.Images("attentions")] == [22, 44]
    pixels = np.array(Image.open(io.BytesIO(seen.Images("attentions")[1].encoded_image_string)))
    assert pixels.shape[2] == 3 and pixels.shape[1] >= 900 and pixels.std() > 10
    model = build_model({"model": "kw_test_resnet", **KW}, num_classes=10)
    names = {tag.removeprefix("alpha/") for tag in seen.Tags()["histograms"]}
    assert len(names) == LAYERS and names <= model.conversion.keys()
    name = "layer4.0.conv2"
    attention = model.get_submodule(name).attention
    values = seen.Histograms(f"alpha/{name}")[1].histogram_value
    assert values.num == 64 * attention.m * attention.n and -1 <= values.min < 0 < values.max <= 1


# the methods whose kernels are mixtures; the others have no attention of this form
@pytest.mark.parametrize("name", METHODS)
def test_attentions_are_those_of_the_operator(name):
    model = build_model(METHODS[name], num_classes=10).eval()
    x = torch.randn(3, 3, 32, 32)

    def hooks():
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    before = hooks()
    with torch.no_grad():
        expected = model(x)
        with Attentions(model) as seen:
            assert torch.equal(model(x), expected)
            first = dict(seen.alphas)
            # only of the first pass, after which nothing observes the model any more
            model(x + 1)
            assert hooks() == before and seen.alphas.keys() == first.keys()
    assert all(torch.equal(seen.alphas[layer], alpha) for layer, alpha in first.items())
    mixes = name in ("kw", "kw_star", "kw1d2x", "odconv", "od", "dyconv", "condconv", "kr")
    assert bool(first) == mixes and len(first) <= LAYERS
    for layer, alpha in first.items():
        assert alpha.ndim == 3 and len(alpha) == 3
        if name == "dyconv":
            torch.testing.assert_close(alpha.sum(2), torch.ones(3, 1))
        if name == "kw":
            attention = model.get_submodule(layer).attention
            assert alpha.shape[1:] == (attention.m, attention.n)


def test_attentions_are_bounded(monkeypatch):
    model = build_model({"model": "kw_test_resnet", **KW}, num_classes=10).eval()
    monkeypatch.setattr("attention_log.NUMBERS", 2000)
    with torch.no_grad(), Attentions(model) as seen:
        model(torch.randn(16, 3, 32, 32))
    for alpha in seen.alphas.values():
        each = alpha[0].numel()
        assert len(alpha) == min(16, max(1, 2000 // each))
    assert NUMBERS <= 10**6
    assert picture({"a": torch.rand(4, 1, 8)}).dtype == torch.uint8


def test_attentions_that_are_not_finite_and_no_matplotlib(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log = run_logs.TensorBoard(str(tmp_path), 1)
    log.add_attentions(5, {"bad": torch.full((2, 1, 3), float("nan")), "good": torch.rand(2, 1, 3)})
    log.add_attentions(6, {"bad": torch.full((2, 1, 3), float("inf"))})
    log.close()
    seen = board(tmp_path)
    assert seen.Tags()["histograms"] == ["alpha/good"] and not seen.Tags()["images"]


class StandIn(ModuleType):
    """What of the module wandb is used: `init` gives a run with `log`, `save` and `finish`."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, metrics, step):
        self.calls.append(("log", (step, metrics)))

    def save(self, path):
        self.calls.append(("save", path))

    def finish(self):
        self.calls.append(("finish", None))


def test_calls_of_weights_and_biases(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options = {"epochs": 2, "enable_wandb": True, "project": "mine", "wandb_ckpt": True, "output_dir": tmp_path}
    assert main.main(quick(**options)) == 0
    kinds = [kind for kind, _ in wandb.calls]
    assert kinds[0] == "init" and kinds[-1] == "finish" and kinds.count("init") == kinds.count("finish") == 1
    assert wandb.calls[0][1]["project"] == "mine" and wandb.calls[0][1]["config"]["lr"] == 0.002
    assert [what for kind, what in wandb.calls if kind == "save"] == [
        str(tmp_path / f"checkpoint-{epoch}.pth") for epoch in (0, 1)
    ]
    logged = [what for kind, what in wandb.calls if kind == "log"]
    # it refuses steps that go back
    assert [step for step, _ in logged] == sorted(step for step, _ in logged)
    losses = [(step, metrics["epoch/test_loss"]) for step, metrics in logged if "epoch/test_loss" in metrics]
    assert losses == [(22 * (row["epoch"] + 1), row["test_loss"]) for row in read_log(tmp_path)]
    assert sum("train/loss" in metrics for _, metrics in logged) == 6


def test_weights_and_biases_offline(tmp_path):
    """The real module, where it is installed: it needs no network, and writes its own file."""
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    done = launch(quick(epochs=1, enable_wandb=True, output_dir=tmp_path / "out"), env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"epoch/test_loss" in content and json.dumps(0.002).encode() in content
