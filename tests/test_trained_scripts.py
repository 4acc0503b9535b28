"""The scripts for trained models: predictions, a table of accuracies, mean weights, and files to pass on."""

import argparse
import csv
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import KW, ROOT, finish, make_image_folder, quick, read_log, words
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import center_crop, normalize, resize, to_tensor

import checkpoints
import main
from loading.images import ImageFiles, read_image
from models import build_model, load_weights, set_temperature
from trained import open_trained

sys.path.insert(0, str(ROOT / "scripts"))
import average_checkpoints
import clean_checkpoint
import predict
import validate

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {"model": "kw_test_resnet", **KW, "cell_num_ratio": 2}
SCRIPTS = ("validate", "average_checkpoints", "clean_checkpoint")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("images"), train=24, val=11)


@pytest.fixture(scope="module")
def run(tmp_path_factory, images):
    """A run of two epochs, with averaged weights; the temperature falls in the first."""
    folder = tmp_path_factory.mktemp("run")
    options = {"data_set": "IMNET", "data_path": images, "input_size": 32, "batch_size": 8, "temp_epoch": 0}
    options |= {"model_ema": True, "model_ema_decay": 0.5, "model_ema_eval": True, "aa": None}
    assert main.main(quick(**CONFIG, **options, output_dir=folder)) == 0
    return folder


@pytest.fixture
def last(run):
    return run / "checkpoint-1.pth"


def probabilities(checkpoint, path, key="model"):
    """Of the classes of an image, by the definition: torchvision's operations, and the model of the config."""
    content = torch.load(checkpoint, weights_only=True)
    model = build_model(CONFIG, num_classes=3).eval()
    set_temperature(model, content["temperature"])
    load_weights(model, content[key])
    image = Image.open(path)
    if image.getexif().get(0x0112) == 6:
        image = image.transpose(Image.Transpose.ROTATE_270)
    image = to_tensor(center_crop(resize(image.convert("RGB"), int(32 / 0.875), interpolation=3), 32))
    with torch.no_grad():
        return model(normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None]).softmax(1)[0].numpy()


def test_predictions(last, images, tmp_path, capsys):
    """JSON, CSV and text say the same, in batches and from loader processes; --ema takes the averaged weights."""
    for key, options in (("model", []), ("model_ema", ["--ema", "--num_workers", "1"])):
        common = [str(last), str(images / "val"), "--batch_size", "4", *options]
        assert predict.main([*common, "--format", "json", "--output", str(tmp_path / "x.json")]) == 0
        records = json.loads((tmp_path / "x.json").read_text())
        files = sorted((images / "val").rglob("*.JPEG"), key=str)
        assert [record["image"] for record in records] == [str(file) for file in files]
        for record in records:
            expected = probabilities(last, record["image"], key)
            found = record["predictions"]
            assert [entry["index"] for entry in found] == np.argsort(-expected).tolist()
            assert [entry["class"] for entry in found] == [("ant", "bee", "cat")[entry["index"]] for entry in found]
            assert [entry["probability"] for entry in found] == pytest.approx(np.sort(expected)[::-1], abs=1e-5)
    capsys.readouterr()
    assert predict.main([*common, "--format", "csv", "--top_k", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["image"], row["rank"], row["class"]) for row in rows] == [
        (record["image"], str(rank + 1), record["predictions"][rank]["class"]) for record in records for rank in (0, 1)
    ]
    assert predict.main([*common, "--top_k", "1"]) == 0
    best = [(record["image"], record["predictions"][0]) for record in records]
    lines = [f"{image}: {entry['class']} {100 * entry['probability']:.1f} %" for image, entry in best]
    assert capsys.readouterr().out.splitlines() == lines


def test_a_reader_that_has_enough(last, images):
    command = f"{sys.executable} {ROOT}/scripts/predict.py {last} {images}/val --device cpu | head -c 0"
    done = finish(["bash", "-o", "pipefail", "-c", command], 60)
    assert done.returncode == 0 and done.stderr == ""


ODD = ['a,b "c"\n.jpg', "d\re.JPG", "\u00e9\u4e16 \U0001f41c.jpeg", b"\xff.jpg", "=1+1.jpg", "-x.jpg", "{}%s'.jpg"]


def test_odd_names_and_unreadable_images(last, images, tmp_path, capsys, refuses):
    folder = tmp_path / "odd"
    (folder / "inside").mkdir(parents=True)
    (folder / "inside" / "above").symlink_to(folder)
    for name in ODD:
        shutil.copy(images / "val/ant/0.JPEG", os.path.join(os.fsencode(folder), os.fsencode(name)))
    (folder / "inside" / "bad.jpg").write_bytes((images / "val/ant/0.JPEG").read_bytes()[:300])
    (folder / "inside" / "good.jpg").write_bytes((images / "val/ant/0.JPEG").read_bytes())
    (folder / "notes.txt").write_text("no image")
    os.mkfifo(folder / "pipe.png")
    Image.new("L", (1, 200_000)).save(folder / "thin.png")
    expected = {f"{folder}/{name if isinstance(name, str) else chr(92) + 'xff.jpg'}" for name in ODD}
    expected.add(str(folder / "inside" / "good.jpg"))
    for form in ("json", "csv", "text"):
        target = tmp_path / f"x.{form}"
        assert predict.main([str(last), str(folder), "--format", form, "--output", str(target)]) == 1
        reasons = ("pipe.png: cannot be read as an image (it is no regular file)", "thin.png: cannot", "inside/bad.jpg")
        note, *lines = capsys.readouterr().err.splitlines()
        assert note.startswith(f"note: {folder}: 1 files are left out for their suffix (.txt 1)")
        for line, reason in zip(lines, reasons, strict=True):
            assert line.startswith(f"passed over: {folder}/{reason}")
        text = target.read_bytes().decode("utf-8")
        if form == "json":
            found = [record["image"] for record in json.loads(text)]
        elif form == "csv":
            found = [row["image"] for row in csv.DictReader(io.StringIO(text, newline="")) if row["rank"] == "1"]
        else:
            assert len(text.splitlines()) == len(expected)
            continue
        # in CSV, line breaks are kept and other control characters escaped
        names = {name.replace("\r", "\\r") for name in expected} if form == "csv" else expected
        assert len(found) == len(names) and set(found) == names
    assert refuses(predict, last, folder / "inside" / "bad.jpg").startswith(f"error: {folder}/inside/bad.jpg: cannot")
    assert predict.main([str(last), str(folder / "inside" / "bad.jpg"), str(folder / "thin.png")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[2].startswith("error: none of the 2 images")


def test_an_image_that_cannot_be_transformed(images):
    def transform(image):
        raise OverflowError("size is too large")

    file = str(images / "val/ant/0.JPEG")
    reason = f"{file}: cannot be prepared for the model (size is too large)"
    assert ImageFiles([file], transform)[0] == (0, reason)


@pytest.mark.parametrize("scale", [1, 257])
def test_grey_of_32_bits(tmp_path, scale):
    pixels = np.arange(256, dtype=np.int32).reshape(16, 16)
    Image.fromarray(pixels * scale).save(tmp_path / "grey.tif")
    read = read_image(str(tmp_path / "grey.tif"), "grey")
    assert np.array_equal(np.asarray(read), np.repeat(pixels[..., None], 3, 2))


def test_class_names_that_are_no_utf_8(last, images, tmp_path):
    content = checkpoints.read(last)
    content["args"]["classes"] = [os.fsdecode(b"caf\xe9"), "\ud800", "cat"]
    torch.save(content, tmp_path / "odd.pth")
    written = {}
    for form in ("json", "csv", "text"):
        target = tmp_path / f"x.{form}"
        arguments = [tmp_path / "odd.pth", images / "val/ant/0.JPEG", "--format", form, "--output", target]
        assert predict.main([str(word) for word in arguments]) == 0
        written[form] = target.read_bytes().decode("utf-8")
    (record,) = json.loads(written["json"])
    assert {entry["class"] for entry in record["predictions"]} == {"caf\\xe9", "\\ud800", "cat"}
    assert all("caf\\xe9" in written[form] and "\\ud800" in written[form] for form in ("csv", "text"))


def test_an_output_that_cannot_be_written(last, images, monkeypatch, capsys):
    arguments = [str(last), str(images / "val/ant/0.JPEG")]
    with open("/dev/full", "w") as full:
        for stdout, reason in ((full, "cannot be written: No space left"), (None, "is closed; give --output")):
            monkeypatch.setattr(sys, "stdout", stdout)
            assert predict.main(arguments) == 2
            monkeypatch.undo()
            err = capsys.readouterr().err
            assert err.startswith("error: the standard output") and reason in err and err.count("\n") == 1


@pytest.mark.parametrize("link", [False, True])
def test_no_script_writes_over_what_it_reads(last, images, tmp_path, refuses, link):
    folder = tmp_path / "in"
    folder.mkdir()
    first, second, image, config = (folder / name for name in ("a.pth", "b.pth", "x.jpg", "config.json"))
    for path in (first, second):
        shutil.copy(last, path)
    shutil.copy(images / "val/ant/0.JPEG", image)
    config.write_text(json.dumps(CONFIG))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for script, arguments, path in (
        (predict, (first, image), first),
        (predict, (first, folder), image),
        (predict, (first, image, "--kw_config", config), config),
        (validate, (first, second), second),
        (validate, (first, "--kw_config", config), config),
        (average_checkpoints, (first, second), first),
        (clean_checkpoint, (first,), first),
    ):
        output = path
        if link:
            output = tmp_path / f"link{path.suffix}"
            output.unlink(missing_ok=True)
            output.hardlink_to(path)
        assert f"{path} itself, which is read" in refuses(script, *arguments, "--output", output)
    assert {path: path.read_bytes() for path in before} == before


def test_predictions_of_unnamed_classes_and_of_a_released_checkpoint(images, tmp_path, capsys):
    model = build_model(CONFIG, num_classes=7)
    torch.save({"model": model.state_dict()}, tmp_path / "released.pth")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "input_size": 32}))
    arguments = [tmp_path / "released.pth", images / "val/ant/0.JPEG", "--kw_config", tmp_path / "config.json"]
    assert predict.main([*map(str, arguments), "--format", "json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert len(record["predictions"]) == 5 and all(e["class"] == str(e["index"]) for e in record["predictions"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    torch.save({"model": model.state_dict()}, tmp_path / "released.pth")
    assert predict.main([*map(str, arguments), "--format", "json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "not finite" in captured.err


def test_predict_refuses(last, images, tmp_path, refuses):
    image = images / "val/ant/0.JPEG"
    (tmp_path / "empty").mkdir()
    for arguments, part in (
        ((last, tmp_path / "nowhere.jpg"), "nowhere.jpg"),
        ((last, tmp_path / "empty"), "no images"),
        ((tmp_path / "missing.pth", image), "missing.pth"),
        ((image, image), "0.JPEG"),
        ((last, image, "--top_k", 0), "--top_k"),
        ((last, image, "--batch_size", "many"), "--batch_size"),
        ((last, image, "--batch_size", 10**20), "--batch_size: must be at most"),
        ((last, image, "--format", "xml"), "--format"),
        ((last, image, "--kw_config", "missing.json"), "missing.json"),
        ((last, image, "--output", tmp_path / "no" / "x"), "there is no folder"),
        ((last, image, "--output", tmp_path), "not a file"),
        ((last, image, "--output", "a\0b"), "null byte"),
        ((last, image, "--output", tmp_path / ("x" * 300)), "too long"),
        # the temporary file's name is longer
        ((last, image, "--output", tmp_path / ("x" * 250)), "too long"),
        # before anything is computed
        ((tmp_path / "missing.pth", image, "--output", "/dev/null/x"), "/dev/null/x"),
        ((last, image, "--output", "/dev/null"), "/dev/null"),
        ((last,), "images"),
    ):
        assert part in refuses(predict, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and Path("/dev/null").is_char_device()


def test_table(run, images, tmp_path, capsys):
    """The accuracies of the log, which main.py prints, too; what cannot be evaluated is passed over."""
    bad = tmp_path / "bad.pth"
    bad.write_text("no checkpoint")
    other = tmp_path / "other.pth"
    torch.save({**checkpoints.read(run / "checkpoint-0.pth"), "model": {}}, other)
    target = tmp_path / "x.csv"
    paths = [run / "checkpoint-0.pth", bad, run / "checkpoint-1.pth", other]
    data = words(data_path=images, device="cpu", num_workers=0, model_ema_eval=True)
    assert validate.main([*map(str, paths), "--output", str(target), *data]) == 1
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
    assert str(bad) in errors[0] and str(other) in errors[1]
    rows = list(csv.DictReader(target.open()))
    assert list(rows[0]) == validate.COLUMNS
    log = [line for line in read_log(run) for _ in range(2)]
    for row, line, suffix in zip(rows, log, ["", "_ema"] * 2, strict=True):
        assert [float(row["top1"]), float(row["top5"])] == pytest.approx(
            [line[f"test_acc1{suffix}"], line[f"test_acc5{suffix}"]], abs=6e-5
        )
        assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
        assert row["model"] == "kw_test_resnet" + (" (EMA)" if suffix else "")
        assert float(row["param_count"]) == round(line["n_parameters"] / 1e6, 2)
        preprocessing = row["img_size"], row["crop_pct"], row["interpolation"]
        assert preprocessing == ("32", "0.875", "bicubic") and row["checkpoint"].startswith(str(run))
    capsys.readouterr()
    assert main.main(words(eval=True, resume=paths[2], data_path=images, device="cpu", num_workers=0)) == 0
    assert f"* Acc@1 {float(rows[2]['top1']):.3f} Acc@5 {float(rows[2]['top5']):.3f} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"traditional_preprocess": True}, (224, 0.875, "bilinear")),
        ({"crop_pct": 0.95}, (224, 0.95, "bicubic")),
        ({"input_size": 384}, (384, 1.0, "bicubic")),
        ({"data_set": "CIFAR", "input_size": 32}, (32, 1.0, "bicubic")),
        ({"data_set": "digits", "input_size": 16}, (16, 1.0, "bicubic")),
    ],
)
def test_preprocessing_in_the_table(options, expected):
    args, _ = validate.merged_options(options)
    assert tuple(validate.preprocessing(args).values()) == expected


def test_validate_refuses(last, tmp_path, refuses, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, part in (
        ((), "CKPT"),
        ((last, "--data_pat", "x"), "--data_path"),
        ((last, "--input_size", "0"), "--input_size"),
        ((last, "--resume", last), "--resume"),
        ((last, "--output", tmp_path / "no" / "x.csv"), "there is no folder"),
    ):
        assert part in refuses(validate, *arguments)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refuses(validate, last)
    assert not any(tmp_path.iterdir())


def test_average(run, tmp_path, capsys):
    paths = [run / f"checkpoint-{epoch}.pth" for epoch in (0, 1)]
    for key, options in (("model", []), ("model_ema", ["--ema"])):
        for suffix in (".pth", ".safetensors"):
            target = tmp_path / f"{key}{suffix}"
            assert average_checkpoints.main([*map(str, paths), "--output", str(target), *options]) == 0
            states = [torch.load(path, weights_only=True)[key] for path in paths]
            mean = checkpoints.read(target)
            assert mean["model"].keys() == states[0].keys() and mean["temperature"] == 0
            for name, value in mean["model"].items():
                first, second = (state[name].numpy() for state in states)
                is_counter = name.endswith("num_batches_tracked")
                expected = second if is_counter else ((first.astype("f8") + second) / 2).astype("f4")
                assert value.numpy().dtype == second.dtype and np.array_equal(value.numpy(), expected)
            assert open_trained(target).classes == ("ant", "bee", "cat")
    capsys.readouterr()


def test_average_is_evaluated_resumed_and_tuned(run, images, tmp_path, capsys):
    target = tmp_path / "mean.safetensors"
    paths = [str(run / f"checkpoint-{epoch}.pth") for epoch in (0, 1)]
    assert average_checkpoints.main([*paths, "--output", str(target)]) == 0
    common = {"data_path": images, "device": "cpu", "num_workers": 0}
    assert main.main(words(eval=True, resume=target, **common)) == 0
    assert "* Acc@1" in capsys.readouterr().out
    for option in ("resume", "finetune"):
        more = {**CONFIG, "data_set": "IMNET", "input_size": 32, "batch_size": 8, "epochs": 1, "lr": 0, "min_lr": 0}
        folder = tmp_path / option
        assert main.main(quick(**more, **common | {option: target, "output_dir": folder, "weight_decay": 0})) == 0
        tuned, mean = torch.load(folder / "checkpoint-0.pth", weights_only=True)["model"], load_file(target)
        assert all(torch.equal(tuned[key], mean[key]) for key in mean if key.endswith("weight"))


def test_average_refuses(run, tmp_path, refuses):
    paths, out = [run / f"checkpoint-{epoch}.pth" for epoch in (0, 1)], ("--output", tmp_path / "out.pth")
    content = checkpoints.read(paths[1])
    others = {
        "renamed": ({**content, "model": {f"x.{key}": value for key, value in content["model"].items()}}, "conv1.0"),
        "shorter": ({**content, "model": {**content["model"], "fc.bias": torch.ones(7)}}, "fc.bias is"),
        "warm": ({**content, "temperature": 0.5}, "0.0 and 0.5"),
        "classes": ({**content, "args": {**content["args"], "classes": ["a", "b", "c"]}}, '"classes"'),
        "softmax": ({**content, "args": {**content["args"], "attention_function": "softmax"}}, '"attention_function"'),
        "empty": ({"epoch": 3}, "no weights"),
        "object": ({"model": {"weight": 1}}, "weight"),
        "nan": ({**content, "model": {**content["model"], "fc.bias": torch.full((3,), torch.nan)}}, "fc.bias is not"),
    }
    for name, (other, part) in others.items():
        path = tmp_path / f"{name}.pth"
        torch.save(other, path)
        line = refuses(average_checkpoints, *paths, path, *out)
        assert part in line and str(path) in line
        assert name in ("empty", "object", "nan") or str(paths[0]) in line
    assert "two or more" in refuses(average_checkpoints, paths[0], *out)
    assert "missing.pth" in refuses(average_checkpoints, paths[0], "missing.pth", *out)
    assert ".safetensors" in refuses(average_checkpoints, *paths, "--output", tmp_path / "x.onnx")
    assert "--output" in refuses(average_checkpoints, *paths)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_clean(suffix, run, last, images, tmp_path, capsys):
    target = tmp_path / f"small{suffix}"
    for key, options in (("model", []), ("model_ema", ["--ema"])):
        assert clean_checkpoint.main([str(last), "--output", str(target), *options]) == 0
        out, content = capsys.readouterr().out, target.read_bytes()
        assert f"{last}: {os.path.getsize(last):,} bytes\n{target}: {len(content):,} bytes\n" in out
        assert f"SHA-256 {hashlib.sha256(content).hexdigest()}" in out
        assert len(content) < 0.3 * os.path.getsize(last)
        assert str(run).encode() not in content and str(images).encode() not in content
        cleaned, whole = checkpoints.read(target), checkpoints.read(last)
        assert cleaned.keys() == {"format", "model", "temperature", "args"}
        assert all(torch.equal(value, whole[key][name]) for name, value in cleaned["model"].items())
        assert not {"data_path", "output_dir", "device", "num_workers", "kw_config"} & cleaned["args"].keys()
        trained, expected = open_trained(target), open_trained(last, ema=key == "model_ema")
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(trained.model(x), expected.model(x))
        assert trained.classes == expected.classes and str(trained.transform) == str(expected.transform)
    assert main.main(words(eval=True, resume=target, data_path=images, device="cpu", num_workers=0)) == 0
    assert f"* Acc@1 {read_log(run)[1]['test_acc1_ema']:.3f} " in capsys.readouterr().out
    # the same again: what was cleaned, under a name with the hash of the content
    assert clean_checkpoint.main([str(target), "--output", str(tmp_path / f"other{suffix}"), "--hash"]) == 0
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    assert {path.name for path in tmp_path.iterdir()} == {target.name, f"other-{digest[:8]}{suffix}"}


def test_clean_a_released_checkpoint(tmp_path, capsys):
    model = build_model(CONFIG, num_classes=5).eval()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    content = {"model": state, "optimizer": {"state": torch.ones(10**6)}, "args": argparse.Namespace(data_path="/home")}
    torch.save(content, tmp_path / "released.pth")
    target = tmp_path / "small.safetensors"
    assert clean_checkpoint.main([str(tmp_path / "released.pth"), "--output", str(target)]) == 0
    assert "give --kw_config" in capsys.readouterr().out and b"/home" not in target.read_bytes()
    trained = open_trained(target, CONFIG)
    set_temperature(model, 0.0)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(trained.model(x), model(x))
    # a bare state dict of safetensors
    again = load_weights(build_model(CONFIG, num_classes=5), target)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_clean_refuses(last, tmp_path, refuses, monkeypatch):
    out = ("--output", tmp_path / "out.pth")
    assert "missing.pth" in refuses(clean_checkpoint, "missing.pth", *out)
    assert ".safetensors" in refuses(clean_checkpoint, last, "--output", tmp_path / "x.bin")
    assert "there is no folder" in refuses(clean_checkpoint, last, "--output", tmp_path / "no" / "x.pth")
    state = {"model": {"weight": torch.ones(3)}}
    torch.save(state, tmp_path / "bare.pth")
    assert "averaged" in refuses(clean_checkpoint, tmp_path / "bare.pth", *out, "--ema")

    assert "too long" in refuses(clean_checkpoint, last, "--output", tmp_path / f"{'x' * 300}.pth")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    for place in ("torch.save", "utils._flush_to_disk", "tempfile.mkdtemp"):
        monkeypatch.setattr(place, full)
        for suffix in (".pth", ".safetensors"):
            output = tmp_path / f"out{suffix}"
            if (place, suffix) != ("torch.save", ".safetensors"):
                line = refuses(clean_checkpoint, last, "--output", output)
                assert line.startswith(f"error: {output}: cannot be written: ") and "No space left" in line
        monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["bare.pth"]


@pytest.mark.parametrize("name", ["predict", *(pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS)])
def test_scripts_start(name):
    """As a user starts them, from another folder; they explain themselves."""
    done = finish([sys.executable, ROOT / f"scripts/{name}.py", "--help"], 60, cwd="/")
    assert done.returncode == 0 and "usage: " in done.stdout and done.stderr == ""
