"""From static weights on the command line: the first accuracy is the static network's, and mistakes are explained."""

import re

import pytest
import timm
import torch
from helpers import KW, quick, words

import dry_run
import main
from models import build_model, report_model
from models.weights import load_static

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A static network after two epochs on the digits."""
    folder = tmp_path_factory.mktemp("static")
    assert main.main(quick(model="test_resnet", epochs=2, output_dir=folder)) == 0
    return folder / "checkpoint-1.pth"


def accuracies(capsys):
    return re.findall(r"Acc@1 ([\d.]+) Acc@5 [\d.]+ loss ([\d.]+)", capsys.readouterr().out)


@pytest.mark.parametrize("options", [{"model": "kw_test_resnet", **KW}, {"model": "od_test_resnet"}], ids=["kw", "od"])
def test_the_first_accuracy_is_the_static_networks(options, trained, capsys):
    assert main.main(quick(model="test_resnet", eval=True, resume=trained)) == 0
    expected = accuracies(capsys)
    assert main.main(quick(**options, eval=True, init_static=trained)) == 0
    assert accuracies(capsys) == expected


def test_another_classifier_is_left_out(trained, capsys):
    static = timm.create_model("test_resnet", num_classes=3)
    before = static.fc.weight.clone()
    assert load_static(static, str(trained))
    state = torch.load(trained, weights_only=False)["model"]
    assert torch.equal(static.fc.weight, before) and torch.equal(
        static.layer1[0].conv1.weight, state["layer1.0.conv1.weight"]
    )
    assert build_model({"model": "kw_test_resnet"}, num_classes=3, init_static=str(trained)).fc.out_features == 3


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 0), ({"temp_epoch": 1}, 1), ({"temp_init_value": 0.5}, 0.5)], ids=str
)
def test_the_temperature_is_annealed_only_if_the_command_line_says_so(given, expected, trained, capsys):
    """The recipe's annealing is for random weights. What is asked for beside --init_static and --finetune happens."""
    options = {"model": "kw_test_resnet", **KW, "recipe": "digits", "epochs": 2, "temp_epoch": 2, **given}
    if "temp_epoch" not in given:
        del options["temp_epoch"]
    assert main.main(quick(**options, init_static=trained)) == 0
    temperatures = [float(text) for text in re.findall(r"temperature ([\d.]+)", capsys.readouterr().out)]
    assert max(temperatures) <= expected and (max(temperatures) > 0) == bool(expected)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            {"finetune": "FILE", "model": "kw_test_resnet", **KW},
            ["first keys that differ", "give them as --init_static"],
        ),
        ({"init_static": "FILE", "model": "kw_test_efficientnet"}, ["of another model", "first keys that differ"]),
        ({"init_static": "FILE", "model": "test_resnet"}, ["static", "--finetune"]),
        ({"init_static": "FILE", "finetune": "FILE", "model": "kw_test_resnet", **KW}, ["give one of them"]),
        (
            {"init_static": "missing.pth", "model": "kw_test_resnet", **KW},
            ["--init_static missing.pth", "no such file"],
        ),
        ({"init_static": "timm:resnet19", "model": "kw_test_resnet", **KW}, ["timm:resnet19", "timm cannot get these"]),
        ({"init_static": "FILE", "model": "we_test_resnet"}, ["standardise false"]),
    ],
)
def test_mistakes(options, parts, trained, capsys):
    options = {name: trained if value == "FILE" else value for name, value in options.items()}
    assert main.main(quick(**options)) == 2
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1 and all(part in text for part in parts), text


@pytest.mark.parametrize("data, classes", [("digits", 10), ("CIFAR10", 10), ("CIFAR", 100), ("IMNET", 1000)])
def test_a_dry_run_reports_what_would_be_trained(data, classes, monkeypatch, capsys):
    options = {"model": "kw_test_resnet", **KW, "data_set": data, "input_size": 32}
    monkeypatch.setattr(dry_run, "LARGEST", {"cpu": 0})
    capsys.readouterr()
    # digits are looked at, and have ten
    others = [] if data == "digits" else [(7, {"nb_classes": 7})]
    for count, given in ((classes, {}), *others):
        assert main.main(words(**options, **given, dry_run=True)) == 0
        expected = report_model({"model": "kw_test_resnet", **KW}, num_classes=count, input_size=32)
        assert expected.input_shape == (3, 32, 32) and f"\n{expected}\n" in capsys.readouterr().out


def test_a_dry_run_of_a_checkpoint(tmp_path, trained, capsys):
    assert main.main(quick(model="od_test_resnet", kernel_num=2, epochs=1, output_dir=tmp_path)) == 0
    capsys.readouterr()
    assert main.main(words(resume=tmp_path / "checkpoint-0.pth", dry_run=True)) == 0
    expected = report_model({"model": "od_test_resnet", "kernel_num": 2}, num_classes=10, input_size=16)
    assert f"\n{expected}\n" in capsys.readouterr().out
    assert main.main(words(resume=trained, dry_run=True)) == 0
    assert "model: test_resnet, 10 classes, 16x16 pixels\nstatic: 0.37 M parameters, 1.23 M" in capsys.readouterr().out


def test_a_dry_run_needs_no_data(capsys):
    assert main.main(["--model", "kw_regnety_002", "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "24 of 71 layers become dynamic" in text and "static, the first layer: stem.conv" in text
    assert "data: IMNET, not looked at, since there is no --data_path" in text
    assert main.main(["--model", "regnety_002", "--dry_run"]) == 0
    assert "static: 3.16 M parameters" in capsys.readouterr().out
