"""--dry_run tells what a run would do and writes nothing; --print_config where every value is from."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import KW, ROOT, finish, make_image_folder, quick, read_log, refused, words

import dry_run
import main
from command_line import make_parser, merged_options, parse_words
from elastic import scale_lr
from models import build_model
from models.config import ConfigError
from models.options import all_options

pytestmark = pytest.mark.usefixtures("one_thread")


def test_nothing_is_written(tmp_path):
    """Neither the output folder nor a cache: a process with a home of its own, whose layers compile code."""
    for name in ("home", "here", "temporary"):
        (tmp_path / name).mkdir()
    environment = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary"), "OMP_NUM_THREADS": "1"}
    environment |= {"XDG_CACHE_HOME": "", "TORCH_HOME": "", "PYTHONDONTWRITEBYTECODE": "1"}
    options = words(kw_config="kw1x_test_resnet", output_dir="out", log_dir="logs", device="cpu", dry_run=True)
    done = finish([sys.executable, str(ROOT / "main.py"), *options], 120, environment, cwd=tmp_path / "here")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "data: digits, 1,437 images to train, 360 images to evaluate; 10 classes: 0, 1, 2" in done.stdout
    assert "updates: 32 x 1 x 1 = 32 images an update, 44 updates an epoch, 440 in 10 epochs" in done.stdout
    assert re.search(r"^memory: about [\d,]+ MiB a process on cpu for batches of 32", done.stdout, re.MULTILINE)
    assert re.search(r"^time: about \S+ s for 32 images, \d+ \w+ an epoch, \d+ \w+ in all", done.stdout, re.MULTILINE)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "home", "temporary"]


def told(capsys, *arguments):
    assert main.main([*arguments, "--dry_run"]) == 0
    return capsys.readouterr().out


def test_a_folder_of_images_and_several_processes(tmp_path, monkeypatch, capsys):
    root = make_image_folder(tmp_path, train=25, val=11)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    options = quick(data_set="IMNET", data_path=root, batch_size=4, update_freq=3, epochs=5, model="test_vit")
    assert told(capsys, *options) == ""
    monkeypatch.setenv("RANK", "0")
    text = told(capsys, *options, "--input_size", "160")
    assert "data: IMNET, 25 images to train, 11 images to evaluate; 3 classes: ant, bee, cat\n" in text
    # 13 images for each process make 3 batches of 4, which are one update
    assert "updates: 4 x 3 x 2 = 24 images an update, 1 updates an epoch, 5 in 5 epochs\n" in text
    parameters = sum(p.numel() for p in build_model({"model": "test_vit"}, num_classes=3).parameters())
    assert f"static: {parameters / 1e6:.2f} M parameters, " in text
    assert "memory: about" in text and "time: about" in text


def test_what_a_run_refuses(tmp_path, capsys):
    assert "no such folder" in refused(capsys, quick(data_set="IMNET", data_path=tmp_path / "gone", dry_run=True))
    assert "too few for one update" in refused(capsys, quick(batch_size=2000, dry_run=True))
    assert "10 classes" in refused(capsys, quick(nb_classes=7, dry_run=True))
    # images too small for the network, and a batch of one on maps of one position
    for options, part in (
        ({"model": "vit_tiny_cifar"}, "doesn't match model"),
        ({"batch_size": 1}, "more than 1 value"),
    ):
        last = told(capsys, *quick(**options)).splitlines()[-1]
        assert last.startswith("memory and time: a step fails: ") and part in last


@pytest.mark.parametrize(
    "options", [{"data_set": "wds/x", "data_path": "https://127.0.0.1:1/train-{00..07}.tar"}, {"data_set": "hfds/x"}]
)
def test_nothing_is_fetched(options, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "make_loaders", None)
    text = told(capsys, *quick(**options))
    assert f"data: {options['data_set']}, not looked at, since a dry run fetches nothing\n" in text


@pytest.mark.parametrize(("cost", "images"), [(0.001, 64), (0.02, 32), (0.1, 8)])
def test_estimates(cost, images, monkeypatch, capsys):
    """Steps of `cost` seconds an image are timed up to the batch of 64, or as long as there is time."""
    clock, peak = [0.0], [0]

    def step(args, model, optimizer, classes, images, device):
        clock[0] += images * cost
        peak[0] = 1000 + 10 * images
        return images * cost

    monkeypatch.setattr(dry_run, "_step", step)
    monkeypatch.setattr(dry_run, "peak_memory", lambda device: peak[0])
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: clock[0])
    args = SimpleNamespace(**{name: option.default for name, option in all_options().items()})
    net = build_model({"model": "test_resnet"}, num_classes=10)
    found = dry_run.measure(args, net, 10, torch.device("cpu"))
    assert found.images == images
    # 64 images are 10 MiB for each beyond 1000
    assert found.memory == 1000 + 640 and found.seconds == pytest.approx(images * cost)
    assert clock[0] < dry_run.BUDGET + 6 * cost + 1e-9
    capsys.readouterr()
    dry_run._estimate(args, found, 100, torch.device("cpu"))
    seconds = 64 * cost
    assert f"time: about {seconds:.3g} s for 64 images, {dry_run._duration(100 * seconds)} an epoch" in (
        capsys.readouterr().out
    )


def rows(text):
    """name -> (value, source) of a printed config."""
    found = re.findall(r"^  (\w+) +(\S.*?) {2,}(\S.*)$", text, re.MULTILINE)
    return {name: (json.loads(value), source) for name, value, source in found}


def test_print_config(tmp_path, capsys):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.json").write_text('{"epochs": 7, "momentum": 0.5, "weight_decay": 0.1}')
    config = tmp_path / "config.json"
    config.write_text('{"model": "kw_test_resnet", "recipe": "mine", "epochs": 8, "weight_decay": 0.2, "aa": null}')
    # the folder of the data is not looked at
    assert main.main(["--kw_config", str(config), "--weight-decay", "0.3", "--data_path", "", "--print_config"]) == 0
    found = rows(capsys.readouterr().out)
    assert found["weight_decay"] == (0.3, "command line") and found["momentum"] == (0.5, "recipe mine")
    assert found["epochs"] == (8, f"config {config}") and found["aa"] == (None, f"config {config}")
    assert found["model"] == ("kw_test_resnet", f"config {config}") and found["lr"] == (0.004, "default")
    # all that a run reads, as it reads it
    args, _ = merged_options(parse_words(make_parser(), ["--kw_config", str(config), "--weight-decay", "0.3"]))
    assert found.keys() == all_options().keys()
    assert {name: value for name, (value, _) in found.items() if name not in ("print_config", "data_path")} == {
        name: value for name, value in vars(args).items() if name not in ("print_config", "data_path", "given")
    }


def test_print_config_of_a_checkpoint_and_of_weights(tmp_path, capsys):
    assert main.main(quick(model="kw_test_resnet", **KW, epochs=1, output_dir=tmp_path)) == 0
    capsys.readouterr()
    checkpoint = tmp_path / "checkpoint-0.pth"
    assert main.main(words(resume=checkpoint, epochs=9, print_config=True)) == 0
    found = rows(capsys.readouterr().out)
    assert found["lr"] == (0.002, f"checkpoint {checkpoint}") and found["epochs"] == (9, "command line")
    assert found["model"] == ("kw_test_resnet", f"checkpoint {checkpoint}")
    assert main.main(words(finetune=checkpoint, kw_config="kw1x_test_resnet", print_config=True)) == 0
    assert rows(capsys.readouterr().out)["temp_epoch"] == (0, "--finetune")
    assert refused(capsys, words(resume=tmp_path / "gone.pth", print_config=True))


def test_help_tells_choices_and_ranges(capsys):
    with pytest.raises(SystemExit, match="0"):
        main.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "(adamw, adam, sgd, nesterov, momentum; default: adamw)", "(from 0 to 1; default: 0.25)",
        "(above 0 and at most 1; default: 0.1)", "(at least 1; default: 64)", "(cuda, cuda:N or cpu; default: cuda)",
    ):  # fmt: skip
        assert part in text, part


def rates(**own):
    return SimpleNamespace(**{"lr": 0.004, "min_lr": 1e-6, "lr_batch": 4096, "scale_lr": False, **own})


def test_scaled_learning_rates(capsys):
    args = rates(scale_lr=True)
    scale_lr(args, 1024)
    assert (args.lr, args.min_lr) == (0.001, 2.5e-7)
    assert "lr 0.001 and min_lr 2.5e-07 are 0.25 times those of the options" in capsys.readouterr().out
    for same in (rates(scale_lr=True, lr_batch=1024), rates(lr_batch=None)):
        scale_lr(same, 1024)
        assert same.lr == 0.004 and not capsys.readouterr().out
    args = rates()
    scale_lr(args, 16)
    assert args.lr == 0.004
    expected = "note: 16 images per update, where lr 0.004 is for 4096, and nothing scales it; --scale_lr true makes it"
    assert capsys.readouterr().out == f"{expected} 1.5625e-05\n"
    with pytest.raises(ConfigError, match="add --lr_batch"):
        scale_lr(rates(scale_lr=True, lr_batch=None), 16)


def test_a_run_with_a_scaled_rate_is_that_with_the_rate(tmp_path, capsys):
    common = {"epochs": 2, "min_lr": 0}
    options = {"scaled": {"lr": 0.008, "lr_batch": 256, "scale_lr": True}, "plain": {"lr": 0.002}}
    for name, own in options.items():
        assert main.main(quick(**common, **own, output_dir=tmp_path / name)) == 0
    assert read_log(tmp_path / "scaled") == read_log(tmp_path / "plain")
    assert "note:" not in capsys.readouterr().out
    # resumed, it is scaled once
    (tmp_path / "scaled" / "checkpoint-1.pth").unlink()
    assert main.main(quick(**common, **options["scaled"], output_dir=tmp_path / "scaled")) == 0
    assert "resuming from" in capsys.readouterr().out
    assert read_log(tmp_path / "scaled") == read_log(tmp_path / "plain")


def test_a_recipe_tells_the_images_of_its_own_rate_only(tmp_path, capsys):
    def batch(*arguments):
        args, given = merged_options(parse_words(make_parser(), list(arguments)))
        assert ("lr_batch" in given) == (args.lr_batch is not None)
        return args.lr_batch

    assert batch("--recipe", "advanced") == 4096 and batch() is None
    assert batch("--recipe", "advanced", "--lr", "0.1") is None
    assert batch("--recipe", "advanced", "--lr", "0.1", "--lr_batch", "8") == 8
    config = tmp_path / "config.json"
    config.write_text('{"recipe": "advanced", "lr": 0.5}')
    assert batch("--kw_config", str(config)) is None
    # a checkpoint tells it of its own, too
    options = {"epochs": 1, "lr": 0.002, "lr_batch": 32}
    assert main.main(quick(**options, output_dir=tmp_path / "run")) == 0
    assert "note: 64 images per update, where lr 0.002 is for 32" in capsys.readouterr().out
    given = {"resume": tmp_path / "run" / "checkpoint-0.pth", "print_config": True}
    for own, expected in (({}, 32), ({"lr": 0.1}, None)):
        assert main.main(words(**given, **own)) == 0
        assert rows(capsys.readouterr().out)["lr_batch"][0] == expected
