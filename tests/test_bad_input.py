"""Every mistake of a user: one line on stderr, exit code 2, before any training. A fault during training: code 1."""

import json
import os

import pytest
import torch
from helpers import KW, launch, make_image_folder, quick, read_log, refused, words

import main
from checkpoints import read, weights_of, write_checkpoint
from models import build_model
from models.config import ConfigError
from trained import open_trained

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("images"), train=9, val=6)


def on_images(folder, **options):
    return quick(**{"data_set": "IMNET", "data_path": folder, "input_size": 32, "batch_size": 4, **options})


@pytest.mark.parametrize(
    "options, part",
    [
        ({"model": "resnet19"}, "resnet19"),
        ({"model": "kw_resnet19"}, "kw_resnet19"),
        ({"data_set": "MNIST"}, "MNIST"),
        ({"opt": "lion"}, "lion"),
        ({"aa": "rand-q9", "data_set": "CIFAR", "data_path": "."}, "rand-q9"),
        ({"mixup": 0.8, "batch_size": 33}, "must be even"),
        ({"nb_classes": 100}, "10 classes"),
        ({"batch_size": 2000}, "too few"),
        ({"resume": "missing.pth"}, "missing.pth"),
        ({"finetune": "missing.pth"}, "missing.pth"),
        ({"kw_config": "missing.json"}, "missing.json"),
        ({"use_amp": True, "amp_dtype": "float16"}, "bfloat16"),
        ({"eval": True}, "--resume"),
        ({"output_dir": "/dev/null/out"}, "/dev/null/out"),
        ({"output_dir": "main.py"}, "main.py"),
        ({"enable_wandb": True}, "wandb"),
        ({"model": "kw_test_resnet", "cell_num_ratio": 0.37}, "0.37"),
        ({"model": "kw_test_resnet", "sharing_range": "layr"}, "layr"),
    ],
)
def test_options(options, part, capsys, monkeypatch):
    monkeypatch.chdir(os.path.dirname(main.__file__))
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    assert part in refused(capsys, quick(**{**(KW if options.get("model") == "kw_test_resnet" else {}), **options}))


@pytest.mark.parametrize(
    "text, part", [("{", "line 1"), ('{"lr": NaN}', "NaN"), ('{"lr": 1, "lr": 2}', "twice"), ('{"lrr": 1}', "lrr")]
)
def test_config(text, part, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert part in refused(capsys, quick(kw_config=path))


def test_data_folders(folder, tmp_path, capsys):
    assert str(tmp_path / "nowhere") in refused(capsys, on_images(tmp_path / "nowhere"))
    assert str(tmp_path) in refused(capsys, on_images(tmp_path))
    assert "--data_path" in refused(capsys, on_images(""))
    empty = tmp_path / "empty"
    for split in ("train", "val"):
        (empty / split / "ant").mkdir(parents=True)
    assert "holds no images" in refused(capsys, on_images(empty))
    other = make_image_folder(tmp_path / "other", train=9, val=6)
    (other / "val" / "cat").rename(other / "val" / "cow")
    assert "cat, cow" in refused(capsys, on_images(other))
    assert "3 classes" in refused(capsys, on_images(folder, nb_classes=1000))


def test_one_class_and_one_image(tmp_path, capsys):
    root = make_image_folder(tmp_path / "class", train=8, val=4, classes=("ant",))
    assert "one class (ant)" in refused(capsys, on_images(root))
    root = make_image_folder(tmp_path / "images", train=2, val=2, classes=("ant", "bee"))
    assert "2 training images are too few for one update of 4" in refused(capsys, on_images(root))
    line = refused(capsys, on_images(root, batch_size=1))
    assert "--batch_size 1: BatchNorm" in line and "two or more" in line
    # without it one image is enough
    assert main.main(on_images(root, batch_size=1, model="test_vit", input_size=160, epochs=1)) == 0


def test_without_the_library_for_curves(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main.main(quick(epochs=1, output_dir=tmp_path)) == 0
    captured = capsys.readouterr()
    (line,) = [line for line in (captured.out + captured.err).splitlines() if "matplotlib" in line]
    assert line == "curves.png was not drawn: matplotlib is not installed" and not (tmp_path / "curves.png").exists()
    assert "curves " not in captured.out.split(line)[1]


def test_checkpoints(tmp_path, capsys):
    good = build_model({"model": "test_resnet"}, num_classes=10).state_dict()
    path = tmp_path / "checkpoint.pth"
    for option in ({"eval": True}, {}):
        write_checkpoint(path, {"model": build_model({"model": "test_efficientnet"}, num_classes=10).state_dict()})
        line = refused(capsys, quick(resume=path, **option))
        assert "conv1.0.weight" in line and "conv_stem.weight" in line
        write_checkpoint(path, {"model": build_model({"model": "test_resnet"}, num_classes=3).state_dict()})
        assert "fc.weight" in refused(capsys, quick(resume=path, **option))
        write_checkpoint(path, {"model": good})
        path.write_bytes(path.read_bytes()[:-1000])
        assert str(path) in refused(capsys, quick(resume=path, **option))
        path.write_text("not a checkpoint")
        assert str(path) in refused(capsys, quick(resume=path, **option))
        torch.save([1, 2], path)
        assert str(path) in refused(capsys, quick(resume=path, **option))
        write_checkpoint(path, {"epoch": 3})
        assert str(path) in refused(capsys, quick(resume=path, **option))
        write_checkpoint(path, {"model": good, "temperature": "hot"})
        assert str(path) in refused(capsys, quick(resume=path, **option))


def entry(**own):
    return lambda content: content["args"].update(own)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main.main(quick(model="kw_test_resnet", **KW, epochs=1, output_dir=folder)) == 0
    return folder / "checkpoint-0.pth"


@pytest.mark.parametrize(
    "change, parts",
    [
        (entry(classes=5), ['args["classes"]', "got 5", "--kw_config"]),
        (entry(classes=torch.ones(3)), ['args["classes"]']),
        (entry(classes="abcdefghij"), ['args["classes"]']),
        (entry(given=5), ['args["given"]']),
        (entry(given=None), ['args["given"]']),
        (entry(classes=None, nb_classes="x"), ['args["nb_classes"]']),
        (entry(classes=None, nb_classes=10**12), ["parameters", "its weights have"]),
        (entry(cell_num_ratio=1e9), ["parameters", "its weights have"]),
        (entry(cell_num_ratio=1e300), ['"cell_num_ratio"']),
        (entry(cell_num_ratio=1e17), ["parameters", "its weights have"]),
        (entry(data_set=7), ['"data_set"']),
        (lambda content: content.update(args=[1]), ["does not tell its model"]),
        (lambda content: content.update(temperature="hot"), ["temperature", "'hot'"]),
        (lambda content: content.update(model_ema="x"), ["model_ema", "'x'"]),
        (lambda content: content["model"].update({"fc.bias": "x"}), ["'fc.bias'", "str"]),
        (lambda content: content["model"].update({"fc.bias": 1}), ["'fc.bias'", "int"]),
        (lambda content: content["model"].update({5: torch.ones(1)}), ["key 5"]),
        (lambda content: content["model"].update({"fc.bias": torch.ones(10).to_sparse()}), ["'fc.bias'", "sparse"]),
    ],
)
def test_odd_entries_of_a_checkpoint(change, parts, run, tmp_path, capsys):
    """Wherever it is read: by its own options, beside others, and as weights alone."""
    content, path = torch.load(run, weights_only=True), tmp_path / "odd.pth"
    change(content)
    torch.save(content, path)
    capsys.readouterr()
    for options in ({"eval": True, "resume": path}, {"resume": path, "epochs": 2}):
        line = refused(capsys, words(**options, device="cpu", num_workers=0))
        assert str(path) in line and all(part in line for part in parts), line
    with pytest.raises(ConfigError, match=r"odd\.pth"):
        open_trained(str(path))
    of_weights = parts[0] in ("'fc.bias'", "key 5")
    if of_weights:
        assert str(path) in refused(capsys, quick(model="kw_test_resnet", init_static=path))
    if of_weights or parts[0].startswith(("args", "temperature", "model_ema")):
        assert str(path) in refused(capsys, quick(model="kw_test_resnet", **KW, finetune=path))
        with pytest.raises(ConfigError, match=r"odd\.pth"):
            weights_of(read(path), path)


@pytest.mark.parametrize("change", [{"epoch": "x"}, {"epoch": -2}, {"best": 5}, {"best": {"acc1": "x"}}], ids=str)
def test_odd_progress(change, run, tmp_path, capsys):
    torch.save({**torch.load(run, weights_only=True), **change}, tmp_path / "odd.pth")
    capsys.readouterr()
    assert "odd.pth" in refused(capsys, words(resume=tmp_path / "odd.pth", device="cpu", num_workers=0))


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"init_static": "ftp://x/y.pth"}, ["--init_static ftp://x/y.pth", "not supported; download"]),
        ({"finetune": "file:///y.pth"}, ["--finetune file:///y.pth", "not supported; download"]),
        ({"resume": "s3://x/y.pth"}, ["--resume s3://x/y.pth", "not supported; download"]),
        ({"finetune": "timm:resnet18"}, ["--finetune timm:resnet18", "is for --init_static"]),
        ({"resume": "timm:resnet18"}, ["--resume timm:resnet18", "is for --init_static"]),
        ({"eval": True, "resume": "FILE", "finetune": "FILE"}, ["--finetune", "give one"]),
        ({"eval": True, "resume": "FILE", "init_static": "timm:resnet18"}, ["--init_static timm:resnet18", "give one"]),
        ({"eval": True, "resume": "FILE", "disable_eval": True}, ["--disable_eval", "leave it out"]),
        ({"eval": True, "resume": "FILE", "model_ema_eval": True}, ["no averaged weights", "--model_ema_eval"]),
        ({"data_path": "."}, ["--data_path .", "digits", "--data_set IMNET"]),
    ],
    ids=str,
)
def test_weights_and_options_that_contradict_each_other(options, parts, run, capsys):
    capsys.readouterr()
    options = {name: run if value == "FILE" else value for name, value in options.items()}
    line = refused(capsys, quick(model="kw_test_resnet", **KW, **options))
    assert all(part in line for part in parts), line


def test_what_a_config_contradicts_is_not_an_error(run, tmp_path, capsys):
    """A config for training is good for an evaluation, too."""
    (tmp_path / "config.json").write_text(
        json.dumps({"disable_eval": True, "finetune": "gone", "model_ema_eval": True})
    )
    options = {"model": "kw_test_resnet", **KW, "eval": True, "resume": run}
    assert main.main(quick(**options, kw_config=tmp_path / "config.json")) == 0
    assert "note: no averaged weights are evaluated" in capsys.readouterr().out


def test_a_folder_for_a_checkpoint_of_embedded_data(run, folder, capsys):
    capsys.readouterr()
    line = refused(capsys, words(eval=True, resume=run, data_path=folder, device="cpu"))
    assert "was trained on digits" in line and "--data_set IMNET" in line


def test_checkpoint_of_another_optimizer(tmp_path, capsys):
    assert main.main(quick(epochs=1, output_dir=tmp_path)) == 0
    capsys.readouterr()
    line = refused(capsys, quick(epochs=2, resume=tmp_path / "checkpoint-0.pth", layer_decay=0.5))
    assert "optimizer" in line
    # the whole folder damaged: no silent start from epoch 0
    for path in tmp_path.glob("checkpoint-*.pth"):
        path.write_bytes(path.read_bytes()[:5000])
    assert main.main(quick(epochs=2, output_dir=tmp_path)) == 2
    captured = capsys.readouterr()
    assert "none of its 2 checkpoints" in captured.err and "epoch 0" not in captured.out
    assert len(read_log(tmp_path)) == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_unreadable_image_is_named(split, tmp_path, capsys):
    root = make_image_folder(tmp_path, train=9, val=6)
    bad = root / split / "bee" / "1.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    assert main.main(on_images(root, batch_size=3, epochs=1)) == 1
    assert str(bad) in capsys.readouterr().err


def test_non_finite_loss_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    import engine

    assert main.main(quick(epochs=2, output_dir=tmp_path, save_ckpt_num=1)) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
    capsys.readouterr()
    to_device, calls = engine._to_device, []

    def poison(*arguments):
        images, targets = to_device(*arguments)
        calls.append(1)
        return (images * float("nan") if len(calls) == 3 else images), targets

    monkeypatch.setattr(engine, "_to_device", poison)
    assert main.main(quick(epochs=3, output_dir=tmp_path, save_ckpt_num=1)) == 1
    assert "step 2 of epoch 2 (step 46 of the run)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")} == before
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]


def test_bad_config_is_refused_at_once(tmp_path):
    """As a user starts it, and also under python -O."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"batch_sise": 8}))
    done = launch(["--kw_config", str(path)], timeout=30, env={"PYTHONOPTIMIZE": "1"})
    assert done.returncode == 2
    assert done.stderr == f'error: {path}: unknown key "batch_sise"; did you mean "batch_size"?\n' and done.stdout == ""
