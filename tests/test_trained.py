"""A checkpoint alone is enough to evaluate and to use its model: every method, any data, earlier and released files."""

import argparse
import json
import re
import sys

import numpy as np
import pytest
import torch
from helpers import KW, METHODS, ROOT, make_image_folder, quick, read_log, words
from PIL import Image
from safetensors.torch import save_file

import checkpoints
import main
from command_line import parse_command_line
from loading.images import ImageFolderData
from loading.transforms import make_transform
from models import build_model, get_temperature, set_temperature, temperature_range
from models.config import ConfigError
from trained import open_trained

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")

NOT_DEFAULT = {"model": "kw_test_resnet", **KW, "cell_num_ratio": 2, "attention_function": "softmax"}


def untrained(config, classes=5):
    """A network whose statistics and temperature are not those of a fresh one."""
    model = build_model(config, num_classes=classes).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
    set_temperature(model, sum(temperature_range(model)) / 2)
    return model


def save(path, network, config, without=(), **own):
    """Write a checkpoint as main.py does: with all options, those of `own` added, those of `without` left out."""
    args = {**vars(parse_command_line(words(**config))[0]), "nb_classes": 5, "classes": None, **own}
    args = {name: value for name, value in args.items() if name not in without}
    content = {"format": 1, "model": network.state_dict(), "temperature": get_temperature(network), "args": args}
    checkpoints.write_weights(path, content)
    return path


def same_logits(trained, model):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = trained.model(x)
        return logits.shape == (2, 5) and torch.equal(logits, model(x))


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, tmp_path):
    model = untrained(METHODS[method])
    for name in ("x.pth", "x.safetensors"):
        trained = open_trained(save(tmp_path / name, model, METHODS[method]))
        assert same_logits(trained, model) and trained.classes is None and not trained.model.training
    # an earlier checkpoint: the shapes of its weights alone tell the number of classes
    trained = open_trained(save(tmp_path / "x.pth", model, METHODS[method], without=("nb_classes", "classes", "given")))
    assert same_logits(trained, model) and trained.args.nb_classes == 5


def test_classes_and_preprocessing(tmp_path):
    """From the data's names; by torchvision's own operations."""
    names = ["ant", "bee", "cat", "dog", "eel"]
    config = {"model": "test_resnet", "input_size": 48, "crop_pct": 0.75}
    trained = open_trained(save(tmp_path / "x.pth", untrained({"model": "test_resnet"}), config, classes=names))
    assert trained.classes == tuple(names)
    image = Image.effect_mandelbrot((100, 80), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    x = trained.transform(image)
    # the short side becomes 48 / 0.75 = 64 pixels
    crop = image.resize((80, 64), Image.Resampling.BICUBIC).crop((16, 8, 64, 56))
    pixels = torch.tensor(np.array(crop)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert (x - (pixels - mean) / std).abs().max() < 1e-5


def test_weights_that_show_no_classes(tmp_path):
    model = untrained({"model": "test_resnet"})
    path = save(tmp_path / "x.pth", model, {"model": "test_resnet"}, without=("nb_classes", "classes"))
    content = checkpoints.read(path)
    del content["model"]["fc.weight"], content["model"]["fc.bias"]
    checkpoints.write_weights(path, content)
    with pytest.raises(ConfigError, match=r"x\.pth: .*fc\.weight"):
        open_trained(path)


@pytest.mark.parametrize("name, value", [("input_size", "large"), ("model", 5), ("crop_pct", -1.0), ("nb_classes", 0)])
def test_an_option_that_cannot_be_is_refused(name, value, tmp_path):
    own = {"given": ["model", name], name: value}
    path = save(tmp_path / "x.pth", untrained({"model": "test_resnet"}), {"model": "test_resnet"}, **own)
    with pytest.raises(ConfigError, match=r"x\.pth"):
        open_trained(path)


def test_a_released_checkpoint_needs_its_config(tmp_path):
    """Its options are argparse's, of another program."""
    path, config = tmp_path / "x.pth", {"model": "kw_test_resnet", **KW}
    model = build_model(config, num_classes=5).eval()
    set_temperature(model, 0.0)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1, model="kw1x_resnet18")}, path)
    with pytest.raises(ConfigError, match="does not tell its model"):
        open_trained(path)
    assert same_logits(open_trained(path, config), model)
    (tmp_path / "config.json").write_text(json.dumps({**config, "input_size": 64}))
    trained = open_trained(path, str(tmp_path / "config.json"))
    assert same_logits(trained, model) and trained.args.input_size == 64
    with pytest.raises(ConfigError, match=r"x\.pth: .*another model"):
        open_trained(path, {"model": "test_resnet"})


def test_averaged_weights(tmp_path):
    model, averaged = untrained({"model": "test_resnet"}), untrained({"model": "test_resnet"})
    path = save(tmp_path / "x.pth", model, {"model": "test_resnet"})
    with pytest.raises(ConfigError, match="no averaged weights"):
        open_trained(path, ema=True)
    checkpoints.write_checkpoint(path, {**checkpoints.read(path), "model_ema": averaged.state_dict()})
    assert same_logits(open_trained(path, ema=True), averaged) and same_logits(open_trained(path), model)


@pytest.mark.parametrize("data", ["digits", "IMNET"])
def test_evaluation_from_the_checkpoint_alone(data, tmp_path, capsys):
    """Settings, data set and preprocessing are the checkpoint's, and so the accuracy is the one of the log."""
    folder = {"data_path": make_image_folder(tmp_path / "images")} if data == "IMNET" else {}
    size, batch_size = (8, 128) if data == "digits" else (24, 4)
    options = {**NOT_DEFAULT, "data_set": data, "input_size": size, "batch_size": batch_size}
    options |= {"crop_pct": 0.75, "epochs": 1}
    assert main.main(quick(**options, **folder, output_dir=tmp_path / "run")) == 0
    capsys.readouterr()
    alone = {"eval": True, "resume": tmp_path / "run/checkpoint-0.pth", "device": "cpu", "num_workers": 0}
    if folder:
        assert main.main(words(**alone)) == 2
        assert "needs --data_path" in capsys.readouterr().err
    assert main.main(words(**alone, **folder)) == 0
    (line,) = read_log(tmp_path / "run")
    found = re.search(r"Acc@1 ([\d.]+) Acc@5 ([\d.]+) loss ([\d.]+)", capsys.readouterr().out)
    assert [float(text) for text in found.groups()] == [
        pytest.approx(line[f"test_{name}"], abs=6e-4) for name in ("acc1", "acc5", "loss")
    ]
    trained = open_trained(alone["resume"])
    assert trained.classes == (tuple("0123456789") if data == "digits" else ("ant", "bee", "cat"))
    assert trained.args.attention_function == "softmax" and trained.args.input_size == size


@pytest.mark.parametrize(
    "options, style",
    [
        ({"data_set": "digits", "input_size": 8}, {}),
        ({"data_set": "CIFAR", "input_size": 32}, {}),
        ({"data_set": "IMNET", "input_size": 24, "crop_pct": 0.75}, {}),
        ({"data_set": "digits", "input_size": 8}, {"crop_pct": 0.75}),
    ],
    ids=str,
)
def test_any_folder_is_evaluated_with_the_checkpoints_preprocessing(options, style, tmp_path, capsys):
    """By main.py as by validate.py and open_trained; what the command line says of it wins."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import validate

    names = ["ant", "bee", "cat", "dog", "eel"]
    folder = make_image_folder(tmp_path / "images", classes=names)
    model = untrained(NOT_DEFAULT)
    with torch.no_grad():
        # logits that tell one preprocessing from another
        model.fc.weight.mul_(100)
    path = save(tmp_path / "x.pth", model, {**NOT_DEFAULT, **options}, classes=names)
    command = {"data_set": "IMNET", "data_path": folder, "device": "cpu", "num_workers": 0, **style}
    assert main.main(words(eval=True, resume=path, **command)) == 0
    printed = re.search(r"Acc@1 \S+ Acc@5 \S+ loss (\S+)", capsys.readouterr().out)
    trained = open_trained(str(path))
    args = argparse.Namespace(**{**vars(trained.args), **style, "data_set": "IMNET"})
    data = ImageFolderData(folder / "val", make_transform(args, is_train=False) if style else trained.transform)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(trained.model(image[None]), torch.tensor([label]))
            for image, label in data
        ]
    assert float(printed[1]) == pytest.approx(float(sum(losses)) / len(losses), abs=6e-4)
    assert validate.main([str(path), "--output", str(tmp_path / "x.csv"), *words(**command)]) == 0
    assert printed[0] in capsys.readouterr().out


def test_other_classes_are_refused(tmp_path, capsys):
    """As many, with other names or in another order; nothing is compared where either side has no names."""
    names = ["ant", "bee", "cat", "dog", "eel"]
    folder = make_image_folder(tmp_path / "images", classes=names)
    command = {"data_path": folder, "device": "cpu", "num_workers": 0, "batch_size": 4}
    for classes, part in (
        (["ant", "cat", "bee", "dog", "eel"], "class 1 is 'cat' in the checkpoint and 'bee' in the data"),
        (["ant", "bee"], "class 2 is missing in the checkpoint and 'cat' in the data"),
        (names, None),
        (None, None),
    ):
        options = {"model": "test_resnet", "input_size": 24, "data_set": "IMNET", "epochs": 1}
        path = save(tmp_path / "x.pth", untrained({"model": "test_resnet"}), options, classes=classes)
        for more in ({"eval": True}, {"mixup": 0, "cutmix": 0}):
            assert main.main(words(resume=path, **command, **more)) == (0 if part is None else 2)
            err = capsys.readouterr().err
            assert (part is None) == (not err) and (part or "") in err and err.count("\n") == (part is not None)


def test_an_evaluation_is_in_float32_unless_told_otherwise(tmp_path):
    path = save(tmp_path / "x.pth", untrained({"model": "test_resnet"}), {"model": "test_resnet", "use_amp": True})
    for more, expected in (({"eval": True}, False), ({"eval": True, "use_amp": True}, True), ({}, True)):
        args, given = parse_command_line(words(resume=path, **more))
        checkpoints.adopt(args, given, checkpoints.read(path), path)
        assert args.use_amp == expected


def test_a_crop_of_huge_images_is_refused(tmp_path):
    path = save(tmp_path / "x.pth", untrained({"model": "test_resnet"}), {"model": "test_resnet", "crop_pct": 1e-9})
    with pytest.raises(ConfigError, match="crop_pct"):
        open_trained(path)


def test_data_without_named_classes_keep_the_number(tmp_path):
    """A stream does not tell its classes, so that a run on it begins with the checkpoint's number of them."""
    path = save(tmp_path / "x.pth", untrained({"model": "test_resnet"}), {"model": "test_resnet"})
    args, given = parse_command_line(words(resume=path))
    checkpoints.adopt(args, given, checkpoints.read(path), path)
    assert args.nb_classes == 5 and "nb_classes" not in given
    args, given = parse_command_line(words(resume=path, nb_classes=7))
    checkpoints.adopt(args, given, checkpoints.read(path), path)
    assert args.nb_classes == 7


def test_safetensors_of_another_project_and_damaged_ones(tmp_path):
    path, state = tmp_path / "x.safetensors", {"weight": torch.arange(5.0)}
    save_file(state, path, {"format": "pt"})
    assert torch.equal(checkpoints.read(path)["weight"], state["weight"])
    for text in ("{", "[]", "[" * 100000):
        save_file(state, path, {"kernelwarehouse": text})
        with pytest.raises(ConfigError, match=r"x\.safetensors"):
            checkpoints.read(path)
    shared = {"a": state["weight"][1:3], "b": state["weight"][1:3], "c": torch.ones(2, 3).T}
    checkpoints.write_safetensors(path, shared, {"args": {"sharing_range": ("layer",)}})
    found = checkpoints.read(path)
    assert found["args"] == {"sharing_range": ["layer"]} and found["model"].keys() == shared.keys()
    assert all(torch.equal(value, shared[key]) for key, value in found["model"].items())
    first = path.read_bytes()
    for tensors, metadata in (({"a": 1}, {}), ({}, {"lr": float("nan")}), ({}, {"x": state["weight"]})):
        with pytest.raises(ValueError, match=r"safetensors|JSON"):
            checkpoints.write_safetensors(path, tensors, metadata)
    assert path.read_bytes() == first and [entry.name for entry in tmp_path.iterdir()] == [path.name]
