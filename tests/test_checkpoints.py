"""Checkpoints survive crashes, refuse damage and code, and a resumed run equals the unbroken one."""

import argparse
import contextlib
import functools
import hashlib
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from faults import measured
from helpers import KW, METHODS, METHODS_OF_RUNS, ROOT, make_image_folder, quick, read_log, words
from servers import folder_of, served
from states import digest

import engine
import main
from checkpoints import (
    RunFolder,
    newest_checkpoint,
    numbered_checkpoints,
    read,
    rng_state,
    set_rng_state,
    weights_of,
    write_checkpoint,
)
from models import build_model, download, load_weights, set_temperature, temperature_range
from models.config import ConfigError

CPU = torch.device("cpu")


# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def state():
    return {"model": {"weight": torch.arange(3000.0)}, "epoch": 3}


def test_write_and_read(tmp_path, state):
    write_checkpoint(tmp_path / "checkpoint-3.pth", state)
    assert digest(read(tmp_path / "checkpoint-3.pth")) == digest(state)
    assert os.listdir(tmp_path) == ["checkpoint-3.pth"]


def test_random_generators_are_restored():
    saved = rng_state(CPU)
    first = random.random(), np.random.rand(), torch.rand(1).item()
    set_rng_state(saved, CPU)
    assert first == (random.random(), np.random.rand(), torch.rand(1).item())


def test_epochs_are_numbers_not_text(tmp_path, state):
    folder = tmp_path / "run-2"
    folder.mkdir()
    for epoch in (9, 10, 99, 100, 8):
        write_checkpoint(folder / f"checkpoint-{epoch}.pth", state)
    # the order in which the files were written, and their time, say nothing
    os.utime(folder / "checkpoint-8.pth", (2e9, 2e9))
    assert newest_checkpoint(folder).name == "checkpoint-100.pth"
    # a name is only that: what counts is the epoch that a checkpoint holds
    write_checkpoint(folder / "checkpoint-7.pth", {**state, "epoch": 4})
    assert newest_checkpoint(folder).name == "checkpoint-7.pth"


def test_truncated_newest_falls_back(tmp_path, state, capsys):
    write_checkpoint(tmp_path / "checkpoint-1.pth", state)
    write_checkpoint(tmp_path / "checkpoint-2.pth", state)
    newest = tmp_path / "checkpoint-2.pth"
    whole = newest.read_bytes()
    for part in range(64):
        newest.write_bytes(whole[: len(whole) * part // 64])
        assert newest_checkpoint(tmp_path).name == "checkpoint-1.pth"
        assert str(newest) in capsys.readouterr().out
    measured("F7", "64 of 64")


def test_flipped_bit_falls_back(tmp_path, state):
    write_checkpoint(tmp_path / "checkpoint-1.pth", state)
    newest = tmp_path / "checkpoint-2.pth"
    write_checkpoint(newest, state)
    whole = newest.read_bytes()
    # inside the stored entries; the zeros that align them belong to no entry
    with zipfile.ZipFile(newest) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    start = whole.index(np.arange(3000.0, dtype=np.float32).tobytes())
    rng = np.random.default_rng(0)
    for position in rng.integers(start, start + entry.file_size, 100):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        newest.write_bytes(damaged)
        assert newest_checkpoint(tmp_path).name == "checkpoint-1.pth"


def test_none_good_is_an_error(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for name in ("checkpoint-1.pth", "checkpoint-2.pth", "checkpoint-best.pth"):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ConfigError, match="none of its 3 checkpoints"):
        newest_checkpoint(tmp_path)
    measured("F9", "an error that names the folder")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html></html>", b"\x80\x02}q\x00.", os.urandom(2000)])
def test_no_checkpoint_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(path)
        # an empty dict is read, and then has no weights
        load_weights(build_model({"model": "test_resnet"}, num_classes=3), read(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("slot", ["model", "args", "optimizer", "rng"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("trap", [False, True])
def test_code_in_a_checkpoint_never_runs(tmp_path, slot, legacy, trap, monkeypatch, capsys):
    if trap:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, target = tmp_path / "evil.pth", tmp_path / "ran"
    model = build_model({"model": "test_resnet"}, num_classes=10)
    content = {"model": model.state_dict(), "epoch": 0, slot: Evil(target)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConfigError, match=r"evil\.pth"):
        read(path)
    for option in ("resume", "finetune"):
        assert main.main(quick(**{option: path})) == 2
        assert "evil.pth" in capsys.readouterr().err
    assert not target.exists()


def test_code_in_a_plain_pickle_never_runs(tmp_path):
    path, target = tmp_path / "evil.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Evil(target)))
    with pytest.raises(ConfigError):
        read(path)
    assert not target.exists()


@pytest.fixture
def server(tmp_path):
    """The folder over HTTP, on this machine."""
    with served(folder_of(tmp_path)) as address:
        yield address


def hashed(server, path):
    """The URL of a file, which the server's folder has under this path, with the hash that a URL must tell."""
    return f"{server}#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_url(tmp_path, server, monkeypatch, capsys):
    """Weights from a URL are loaded; code from there never runs."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = tmp_path / "ran"
    torch.save({"model": build_model({"model": "test_resnet"}, num_classes=10).state_dict()}, tmp_path / "good.pth")
    torch.save({"model": Evil(target)}, tmp_path / "evil.pth")
    assert main.main(quick(eval=True, resume=hashed(f"{server}/good.pth", tmp_path / "good.pth"))) == 0
    for name in ("evil.pth", "missing.pth"):
        capsys.readouterr()
        assert main.main(quick(eval=True, resume=hashed(f"{server}/{name}", tmp_path / "evil.pth"))) == 2
        line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(line) == 1 and name in line[0]
    assert not target.exists()


def test_two_urls_of_one_name_are_two_files(tmp_path, server, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for index in (0, 1):
        (tmp_path / str(index)).mkdir()
        torch.save({"model": {"weight": torch.full((3,), index)}}, tmp_path / str(index) / "model.pth")
    for index in (0, 1, 0):
        url = hashed(f"{server}/{index}/model.pth", tmp_path / str(index) / "model.pth")
        assert read(url)["model"]["weight"][0] == index


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_released_options_by_url_and_a_damaged_copy(tmp_path, server, monkeypatch, legacy):
    """What is kept of a download is verified whenever it is read, and fetched again where it changed."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    content = {"model": {"weight": torch.arange(1000.0)}, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "released.pth", _use_new_zipfile_serialization=not legacy)
    url = hashed(f"{server}/released.pth", tmp_path / "released.pth")
    assert read(url)["args"].lr == 0.1
    (kept,) = (tmp_path / "hub").rglob("*-released.pth")
    whole = kept.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:1000] + bytes([whole[1000] ^ 4]) + whole[1001:]):
        kept.write_bytes(content)
        assert torch.equal(read(url)["model"]["weight"], torch.arange(1000.0))
        assert kept.read_bytes() == whole
    (tmp_path / "released.pth").unlink()
    assert read(url)["args"].lr == 0.1, "what is kept needs no server"


def short(self):
    """Sends half of what it promises."""
    self.send_response(200)
    self.send_header("Content-Length", "4000")
    self.end_headers()
    self.wfile.write(b"x" * 2000)


def silent(self):
    """Says nothing for longer than anybody waits."""
    time.sleep(3)


@pytest.mark.parametrize(("answer", "reason"), [(short, "2000 of 4000"), (silent, "timed out")])
def test_a_download_that_ends_early_or_never_is_refused(answer, reason, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SECONDS", 0.5)
    with pytest.raises(ConfigError, match=reason):
        read(f"{serve(answer)}/model-0123abcd.pth")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_hash_in_the_name_counts(tmp_path, server, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    torch.save({"model": {}}, tmp_path / "any")
    digest = hashlib.sha256((tmp_path / "any").read_bytes()).hexdigest()
    for name, fits in ((f"model-{digest[:8]}.pth", True), ("model-0123abcd.pth", False)):
        (tmp_path / name).write_bytes((tmp_path / "any").read_bytes())
        with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="SHA-256"):
            assert read(f"{server}/{name}") == {"model": {}}


def test_options_of_released_checkpoints_are_read(tmp_path, state):
    """They keep argparse's record of options, which holds values only."""
    torch.save({**state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "released.pth")
    assert read(tmp_path / "released.pth")["args"].lr == 0.1


def test_failed_save_leaves_the_older_file(tmp_path, state, monkeypatch, capsys):
    path = tmp_path / "checkpoint-1.pth"
    write_checkpoint(path, state)
    before = path.read_bytes()
    for fault in ("save", "fsync", "replace"):
        with monkeypatch.context() as patch:

            def fail(*args, **kwargs):
                raise OSError(28, "No space left on device")

            patch.setattr(torch if fault == "save" else os, fault, fail)
            assert RunFolder(tmp_path, 2).save({**state, "epoch": 4}, 1) is False
        assert "No space left" in capsys.readouterr().err
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_full_disk_leaves_the_older_file(tmp_path):
    """A limit on the size of files stands for the full disk."""
    code = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import torch
from checkpoints import RunFolder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = RunFolder(Path({str(tmp_path)!r}), 2)
assert folder.save({{"model": torch.zeros(1000), "epoch": 1}}, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
assert not folder.save({{"model": torch.zeros(1_000_000), "epoch": 1}}, 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning:") == 1
    assert len(read(tmp_path / "checkpoint-1.pth")["model"]) == 1000
    assert set(os.listdir(tmp_path)) == {"checkpoint-1.pth", "manifest.json"}


# at 16 pixels the last stage sees single pixels, where oneDNN's bfloat16 weight gradient of a strided 3x3 convolution
# holds memory that was never written
FULL = {
    "data_set": "IMNET", "input_size": 32, "epochs": 3, "batch_size": 8, "update_freq": 2, "temp_epoch": 4,
    "mixup": 0.5, "cutmix": 0.5, "drop_path": 0.2, "dropout": 0.1, "clip_grad": 5.0, "use_amp": True,
    "model_ema": True, "model_ema_eval": True, "model_ema_decay": 0.9,
}  # fmt: skip


class Stop(BaseException):
    pass


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Of five updates an epoch."""
    return make_image_folder(tmp_path_factory.mktemp("images"), train=80, val=20)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, images):
    """Method -> the output folder of a whole run of it."""

    @functools.cache
    def run(method):
        folder = tmp_path_factory.mktemp("unbroken")
        assert main.main(quick(**FULL, **METHODS[method], data_path=images, output_dir=folder)) == 0
        return folder

    return run


@pytest.fixture
def unbroken(run_of):
    return run_of("kw")


@pytest.mark.parametrize("method", METHODS_OF_RUNS)
def test_resumed_run_equals_the_unbroken_one(method, run_of, images, tmp_path, monkeypatch):
    """Stopped in the second epoch, and continued with another number of loader processes."""
    unbroken, options = run_of(method), {**FULL, **METHODS[method], "data_path": images}
    train = engine.train_one_epoch

    def stop_in_epoch_1(*args, epoch, **kwargs):
        if epoch == 1:
            raise Stop
        return train(*args, epoch=epoch, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_one_epoch", stop_in_epoch_1)
        with pytest.raises(Stop):
            main.main(quick(**options, output_dir=tmp_path))
    assert [epoch for epoch, _ in numbered_checkpoints(tmp_path)] == [0]
    assert main.main(quick(**options, output_dir=tmp_path, num_workers=1)) == 0

    assert (tmp_path / "log.txt").read_text() == (unbroken / "log.txt").read_text()
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(unbroken))
    for name in ("checkpoint-1.pth", "checkpoint-2.pth", "checkpoint-best.pth", "checkpoint-best-ema.pth"):
        ours, theirs = digest(read(tmp_path / name)), digest(read(unbroken / name))
        for name in ("args", "run"):
            ours.pop(name), theirs.pop(name)
        assert ours == theirs


@pytest.mark.parametrize("method", METHODS_OF_RUNS)
def test_run_writes_what_it_promises(method, run_of):
    unbroken = run_of(method)
    names = {
        "checkpoint-0.pth",
        "checkpoint-1.pth",
        "checkpoint-2.pth",
        "checkpoint-best.pth",
        "checkpoint-best-ema.pth",
    }
    logs = {"log.txt", "steps.jsonl", "times.jsonl", "curves.png", "report.html", "report.json"}
    assert set(os.listdir(unbroken)) == names | logs | {"manifest.json", ".run.lock"}
    assert (unbroken / "curves.png").read_bytes().startswith(b"\x89PNG")
    log = read_log(unbroken)
    assert [line["epoch"] for line in log] == [0, 1, 2]
    assert log[-1]["best_acc1"] == max(line["test_acc1"] for line in log)
    assert log[-1]["best_acc1_ema"] == max(line["test_acc1_ema"] for line in log)
    model = build_model(METHODS[method], num_classes=3)
    first, last = temperature_range(model)
    temperature = last + (first - last) * (1 - (3 * 5 - 1) / (4 * 5))
    assert log[-1]["train_temperature"] == pytest.approx(temperature)
    assert read(unbroken / "checkpoint-2.pth")["temperature"] == pytest.approx(temperature)
    keys = read(unbroken / "checkpoint-2.pth")["model"]
    assert list(keys) == list(model.state_dict())


@pytest.mark.parametrize("method", METHODS_OF_RUNS)
def test_evaluation_prints_what_training_logged(method, run_of, images, capsys):
    """Live and EMA weights, at the temperature in the middle of its schedule."""
    unbroken = run_of(method)
    line = read_log(unbroken)[-1]
    common = {**METHODS[method], "data_path": images, "eval": True}
    common |= {key: FULL[key] for key in ("data_set", "input_size", "use_amp", "batch_size")}
    assert main.main(quick(**common, resume=unbroken / "checkpoint-2.pth", model_ema_eval=True)) == 0
    out = capsys.readouterr().out
    for title, suffix in (("", ""), ("EMA ", "_ema")):
        values = [line[f"test_{name}{suffix}"] for name in ("acc1", "acc5", "loss")]
        assert "\n{}* Acc@1 {:.3f} Acc@5 {:.3f} loss {:.3f}".format(title, *values) in out
    best = unbroken / "checkpoint-best-ema.pth"
    assert main.main(quick(**common, resume=best, model_ema_eval=True)) == 2
    assert "already are the averaged ones; leave out --model_ema_eval" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="already are the averaged ones; leave out --ema"):
        weights_of(read(best), best, ema=True)
    assert main.main(quick(**common, resume=best)) == 0
    assert f"* Acc@1 {line['best_acc1_ema']:.3f} " in capsys.readouterr().out
    # the newest of a folder
    measured("F30", f"{method} equal")
    assert main.main(quick(**common, output_dir=unbroken)) == 0
    assert f"* Acc@1 {line['test_acc1']:.3f} " in capsys.readouterr().out


def test_same_seed_same_run_another_seed_another(tmp_path):
    logs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main.main(quick(epochs=1, output_dir=tmp_path / name, seed=seed)) == 0
        logs.append((tmp_path / name / "log.txt").read_text())
    assert logs[0] == logs[1] != logs[2]


def test_fresh_run_keeps_the_old_log(unbroken, tmp_path):
    shutil.copy(unbroken / "log.txt", tmp_path / "log.txt")
    assert main.main(quick(epochs=1, output_dir=tmp_path)) == 0
    assert len(read_log(tmp_path)) == 1
    kept = list(tmp_path.glob("earlier-*/log.txt"))
    assert len(kept) == 1 and kept[0].read_text() == (unbroken / "log.txt").read_text()


def test_a_fresh_start_in_a_used_folder(tmp_path, capsys):
    """A shorter run goes on from its own checkpoints, and those of the longer one before it are kept apart."""
    assert main.main(quick(epochs=3, output_dir=tmp_path)) == 0
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".run.lock"}
    assert main.main(quick(epochs=1, seed=2, output_dir=tmp_path, auto_resume=False)) == 0
    assert "4 checkpoints of an earlier run" in capsys.readouterr().out
    (aside,) = tmp_path.glob("earlier-*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == old
    assert [epoch for epoch, _ in numbered_checkpoints(tmp_path)] == [0]
    assert main.main(quick(epochs=2, seed=2, output_dir=tmp_path)) == 0
    assert f"resuming from {tmp_path / 'checkpoint-0.pth'}" in capsys.readouterr().out
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]
    # back to the first epoch of this run: the second one is no longer its own
    resumed = quick(epochs=1, seed=2, output_dir=tmp_path, resume=tmp_path / "checkpoint-0.pth")
    assert main.main(resumed) == 0
    assert [epoch for epoch, _ in numbered_checkpoints(tmp_path)] == [0]


def test_number_of_checkpoints_and_frequency(tmp_path):
    assert main.main(quick(epochs=4, output_dir=tmp_path, save_ckpt_num=1, save_ckpt_freq=2, disable_eval=True)) == 0
    # never fewer than two, of which one may turn out to be damaged
    assert [epoch for epoch, _ in numbered_checkpoints(tmp_path)] == [1, 3]
    assert not (tmp_path / "checkpoint-best.pth").exists()


def test_stale_files_are_removed(tmp_path):
    stale = tmp_path / ".checkpoint-7.pth.123.tmp"
    stale.write_bytes(b"half")
    assert main.main(quick(epochs=1, output_dir=tmp_path)) == 0
    assert not stale.exists()


def test_released_checkpoint_is_evaluated(tmp_path, capsys):
    """It holds `model` and no temperature, which is then 0."""
    model = build_model({"model": "kw_test_resnet", **KW}, num_classes=10)
    set_temperature(model, 0.0)
    torch.save(
        {"model": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "released.pth"
    )
    common = quick(model="kw_test_resnet", **KW, eval=True, resume=tmp_path / "released.pth")
    assert main.main(common) == 0
    assert "* Acc@1 " in capsys.readouterr().out


def test_finetune_leaves_out_another_classifier(unbroken, tmp_path, capsys):
    """100 classes became 10: everything but the classifier is loaded."""
    model = build_model({"model": "test_resnet"}, num_classes=100)
    path = tmp_path / "weights.pth"
    torch.save({"state": {f"net.{key}": value for key, value in model.state_dict().items()}}, path)
    options = {"finetune": path, "model_key": "state", "model_prefix": "net.", "epochs": 1, "lr": 0, "min_lr": 0}
    assert main.main(quick(**options, output_dir=tmp_path / "out")) == 0
    assert "classifier has another size" in capsys.readouterr().out
    tuned = read(tmp_path / "out" / "checkpoint-0.pth")["model"]
    start = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    same = {name for name in parameters if torch.equal(tuned[name], start[name])}
    assert parameters - same == {"fc.weight", "fc.bias"} and tuned["fc.bias"].shape == (10,)
    # of another model: refused
    assert main.main(quick(**{**options, "model": "test_efficientnet"})) == 2
    assert "first keys that differ" in capsys.readouterr().err


def test_compiled_and_plain_runs_share_keys(tmp_path, monkeypatch):
    """`module.compile()` leaves the names alone. The compiler itself is replaced, since it takes minutes."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", self._call_impl))
    assert main.main(quick(epochs=1, output_dir=tmp_path, compile=True, channels_last=True)) == 0
    assert not any("_orig_mod" in key for key in read(tmp_path / "checkpoint-0.pth")["model"])


@pytest.mark.slow
def test_compiled_run(tmp_path):
    """With the real compiler: the same accuracy to rounding, and clean keys."""
    for name, compiled in (("plain", False), ("compiled", True)):
        arguments = quick(
            model="kw_test_resnet", **KW, epochs=1, temp_epoch=1, compile=compiled, output_dir=tmp_path / name
        )
        assert main.main(arguments) == 0
    plain, compiled = (read_log(tmp_path / name)[0] for name in ("plain", "compiled"))
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=0.05)
    assert not any("_orig_mod" in key for key in read(tmp_path / "compiled" / "checkpoint-0.pth")["model"])


def test_words():
    assert words(a=True, b=None, c=[1, 2]) == ["--a", "true", "--b", "none", "--c", "1", "2"]


def test_a_checkpoint_is_evaluated_and_continued_without_its_config(tmp_path, capsys):
    """It carries the options of its run: the model with its settings, the data set and the preprocessing."""
    model = {"model": "kw_test_resnet", **KW, "cell_num_ratio": 2}
    assert main.main(quick(**model, epochs=1, output_dir=tmp_path)) == 0
    path = tmp_path / "checkpoint-0.pth"
    capsys.readouterr()
    assert main.main(words(eval=True, resume=path, device="cpu")) == 0
    alone = re.search(r"Acc@1 .*", capsys.readouterr().out)[0]
    assert main.main(quick(**model, eval=True, resume=path)) == 0
    assert re.search(r"Acc@1 .*", capsys.readouterr().out)[0] == alone
    assert main.main(words(resume=path, epochs=2, output_dir=tmp_path, device="cpu")) == 0
    assert read(tmp_path / "checkpoint-1.pth")["args"]["lr"] == read(path)["args"]["lr"]
    torch.save({"model": build_model({"model": "test_resnet"}).state_dict()}, tmp_path / "bare.pth")
    assert main.main(words(eval=True, resume=tmp_path / "bare.pth", device="cpu")) == 2
    assert "does not tell its model; give --kw_config or --model" in capsys.readouterr().err


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    model = build_model({"model": "kw_test_resnet", **KW}, num_classes=5)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    again = load_weights(build_model({"model": "kw_test_resnet", **KW}, num_classes=5), tmp_path / "x.safetensors")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"x\.safetensors' is not a safetensors file"):
        load_weights(again, tmp_path / "x.safetensors")
