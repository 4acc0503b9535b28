"""What a run survives, in one process: crashes at any moment, full disks, wrong files, changed options, bad images.

The names F1 to F30 are those of the catalogue in results/faults.md, whose numbers these tests print.
"""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import time
import types

import numpy as np
import pytest
import torch
from faults import measured
from helpers import KW, make_image_folder, quick, read_log
from states import difference_of

import engine
import main
import run_logs
import training
import utils
from checkpoints import Manifest, files, newest_checkpoint, read, write_checkpoint
from elastic import divided
from loading.sampling import TrainSampler
from models.download import sha256_of
from run_lock import RunLock

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")

# two epochs of 5 updates, of 2 batches each
FULL = {
    "model": "kw_test_resnet", **KW, "data_set": "IMNET", "input_size": 32, "epochs": 2, "batch_size": 8,
    "update_freq": 2, "temp_epoch": 4, "mixup": 0.5, "cutmix": 0.5, "drop_path": 0.2, "dropout": 0.1, "clip_grad": 5.0,
    "use_amp": True, "model_ema": True, "model_ema_eval": True, "model_ema_decay": 0.9, "save_interval": 2,
    "log_interval": 1,
}  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run is done after it."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("images"), train=80, val=20)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("unbroken")
    # a fixture of the module comes before those of its tests; more threads add in another order
    torch.set_num_threads(1)
    assert main.main(quick(**FULL, data_path=images, output_dir=folder)) == 0
    return folder


def kill_at(monkeypatch, where, call):
    """Kill the run at the given call of a function."""
    module, name = where
    original, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


# autocast is entered once for every batch, of the training and of the evaluations
MOMENTS = {
    "before any save": ((engine, "autocast"), 2),
    "within an accumulation": ((engine, "autocast"), 8),
    "at the edge of an epoch": ((training.Trainer, "_require_finite"), 3),
    "during an evaluation": ((engine, "evaluate"), 2),
    "between the checkpoint and the best one": ((training.checkpoints.folder, "ema_state"), 1),
    "in the last update": ((engine, "autocast"), 26),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_run_equals_the_unbroken_one(moment, unbroken, images, tmp_path, monkeypatch):
    """F23, F30: killed, and continued with another number of loader processes."""
    options = {**FULL, "data_path": images, "output_dir": tmp_path}
    with monkeypatch.context() as patch:
        kill_at(patch, *MOMENTS[moment])
        with pytest.raises(Killed):
            main.main(quick(**options))
    assert main.main(quick(**options, num_workers=1)) == 0
    for name in ("checkpoint-1.pth", "checkpoint-best.pth", "checkpoint-best-ema.pth"):
        assert difference_of(read(tmp_path / name), read(unbroken / name)) == []
    for name in ("log.txt", "steps.jsonl"):
        assert (tmp_path / name).read_text() == (unbroken / name).read_text()
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(unbroken))
    measured("F23", f"equal when killed {moment}")


def test_a_signal_saves_and_the_resumed_run_loses_nothing(unbroken, images, tmp_path, monkeypatch, capsys):
    """F21, in one process: the update that the signal came in is the last that is done, and the first not repeated."""
    options = {**FULL, "data_path": images, "output_dir": tmp_path, "save_interval": 0}
    wishes = training.Trainer.wishes

    def interrupted(self, progress):
        if progress.update == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return wishes(self, progress)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "wishes", interrupted)
        assert main.main(quick(**options)) == 143
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"stopped by SIGTERM: saved {tmp_path}/checkpoint-0-3.pth; the same command continues there"]
    assert main.main(quick(**options)) == 0
    assert difference_of(read(tmp_path / "checkpoint-1.pth"), read(unbroken / "checkpoint-1.pth")) == []
    assert (tmp_path / "steps.jsonl").read_text() == (unbroken / "steps.jsonl").read_text()


def test_saves_after_minutes(unbroken, images, tmp_path, monkeypatch):
    """With a clock on which every update takes a minute."""
    now, saved = [0.0], []
    wishes, act = training.Trainer.wishes, training.Trainer.act

    def later(self, progress):
        now[0] += 60
        return wishes(self, progress)

    def noted(self, progress, stop, save):
        saved.extend([(progress.epoch, progress.update)] * save)
        return act(self, progress, stop, save)

    monkeypatch.setattr(training, "time", types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.time))
    monkeypatch.setattr(training.Trainer, "wishes", later)
    monkeypatch.setattr(training.Trainer, "act", noted)
    assert main.main(quick(**{**FULL, "save_interval": "2m"}, data_path=images, output_dir=tmp_path)) == 0
    # the save at the end of the epoch counts
    assert saved == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert difference_of(read(tmp_path / "checkpoint-1.pth"), read(unbroken / "checkpoint-1.pth")) == []


def test_a_signal_in_an_evaluation(unbroken, images, tmp_path, monkeypatch):
    options = {**FULL, "data_path": images, "output_dir": tmp_path, "save_interval": 0}
    evaluate = engine.evaluate

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate", interrupted)
        assert main.main(quick(**options)) == 130
    assert (tmp_path / "checkpoint-0-5.pth").exists() and not (tmp_path / "log.txt").exists()
    assert main.main(quick(**options)) == 0
    # the run that goes on saves the first of them before it updates anything
    for name in ("checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-best.pth"):
        assert difference_of(read(tmp_path / name), read(unbroken / name)) == []
    assert (tmp_path / "log.txt").read_text() == (unbroken / "log.txt").read_text()


@pytest.fixture
def finished(tmp_path):
    """The folder of a small run that is done."""
    folder = tmp_path / "run"
    assert main.main(quick(epochs=3, output_dir=folder)) == 0
    return folder


def test_flipped_bits_anywhere(finished):
    """F8: also where no checksum of the container looks."""
    path = finished / "checkpoint-2.pth"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(whole), 50):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        refused += newest_checkpoint(finished).name == "checkpoint-1.pth"
    measured("F8", f"{refused}/50 flips refused")
    assert refused == 50


def test_a_damaged_manifest_costs_nothing(finished, capsys):
    manifest = finished / "manifest.json"
    for content in (b"", b"{", b"\xff\xfe", b'{"format": 1, "files": 3}', b"[" * 100_000):
        manifest.write_bytes(content)
        assert newest_checkpoint(finished).name == "checkpoint-2.pth"
    assert "is damaged" in capsys.readouterr().out
    manifest.unlink()
    assert newest_checkpoint(finished).name == "checkpoint-2.pth"


@pytest.mark.parametrize("content", [b"{", None])
def test_what_a_damaged_manifest_listed_is_deleted_in_its_turn(finished, content):
    shutil.copy(finished / "checkpoint-1.pth", finished / "checkpoint-77.pth")
    if content is None:
        (finished / "manifest.json").unlink()
    else:
        (finished / "manifest.json").write_bytes(content)
    assert main.main(quick(epochs=5, output_dir=finished, save_ckpt_num=2)) == 0
    names = {"checkpoint-3.pth", "checkpoint-4.pth"}
    assert set(Manifest(finished).files) - {"checkpoint-best.pth"} == names
    # but not a copy that somebody made
    assert {path.name for path in finished.glob("checkpoint-[0-9]*")} == {*names, "checkpoint-77.pth"}


def test_what_a_checkpoint_holds_counts_and_not_its_name(finished):
    """F28: names, times and clocks say nothing."""
    (finished / "manifest.json").unlink()
    shutil.copy(finished / "checkpoint-1.pth", finished / "checkpoint-77.pth")
    os.utime(finished / "checkpoint-0.pth", (4e9, 4e9))
    assert newest_checkpoint(finished).name == "checkpoint-2.pth"
    # of a later run, whose manifest is here
    other = read(finished / "checkpoint-1.pth") | {"run": "other", "epoch": 9}
    assert main.main(quick(epochs=3, output_dir=finished)) == 0
    write_checkpoint(finished / "checkpoint-9.pth", other)
    assert newest_checkpoint(finished).name == "checkpoint-2.pth"
    measured("F28", "the stored position and run count, whatever names and times say")


def test_two_checkpoints_are_always_kept(tmp_path, monkeypatch):
    left = []
    save = training.RunFolder.save

    def counted(self, *args, **kwargs):
        result = save(self, *args, **kwargs)
        self.wait()
        left.append(sorted(name for name in Manifest(tmp_path).files if "best" not in name))
        return result

    monkeypatch.setattr(training.RunFolder, "save", counted)
    assert main.main(quick(epochs=2, output_dir=tmp_path, save_ckpt_num=1, save_interval=10)) == 0
    assert left[0] == ["checkpoint-0-10.pth"] and all(2 <= len(names) <= 3 for names in left[1:])
    assert left[-1] == ["checkpoint-0.pth", "checkpoint-1.pth"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-[0-9]*")) == left[-1]


def limit(monkeypatch, fails):
    """Let every write to a file for which `fails` fail as on a full disk."""
    for module in (utils, files):
        put_in_place = module.put_in_place

        def full(temporary, path, put_in_place=put_in_place):
            if fails(path.name):
                raise OSError(errno.ENOSPC, "No space left on device")
            return put_in_place(temporary, path)

        monkeypatch.setattr(module, "put_in_place", full)


@contextlib.contextmanager
def largest_file(size):
    """Let every write beyond `size` bytes of a file fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_best_checkpoint_that_fails_is_tried_again(tmp_path, monkeypatch, capsys):
    """F4: the disk is full when the best epoch is saved, and has room later."""
    accuracies = iter([80.0, 50.0, 40.0])
    evaluate = engine.evaluate
    monkeypatch.setattr(
        engine, "evaluate", lambda *args, **kwargs: evaluate(*args, **kwargs) | {"acc1": next(accuracies)}
    )
    epochs = []
    with monkeypatch.context() as patch:
        limit(patch, lambda name: "best" in name and not epochs.append(name) and len(epochs) == 1)
        assert main.main(quick(epochs=3, output_dir=tmp_path)) == 0
    best = read(tmp_path / "checkpoint-best.pth")
    assert (best["epoch"], best["best"]["acc1"]) == (0, 80.0)
    assert difference_of(best, read(tmp_path / "checkpoint-0.pth")) == []
    assert capsys.readouterr().err.count("checkpoint-best.pth was not saved") == 1


def test_a_full_disk_loses_only_what_was_to_be_saved(tmp_path, monkeypatch, capsys):
    """F4, F5: the run goes on, and ends with 0; every row of the logs comes once there is room."""
    free = {"log.txt": 1, "steps.jsonl": 2}
    fsync, count = os.fsync, []

    def full(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name in free and free[name] > 0:
            free[name] -= 1
            count.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        limit(patch, lambda name: name in ("checkpoint-0.pth", "curves.png"))
        assert main.main(quick(epochs=2, output_dir=tmp_path)) == 0
    err = capsys.readouterr().err
    assert count and "log.txt was not written" in err and err.count("checkpoint-0.pth was not saved") == 1
    assert [row["epoch"] for row in read_log(tmp_path)] == [0, 1]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert read(tmp_path / "checkpoint-1.pth")["epoch"] == 1 and not (tmp_path / "checkpoint-0.pth").exists()
    measured("F4", "exit code 0, one warning for each failed save, older files intact")


def test_a_disk_that_is_full_from_the_start(finished):
    """F4: a run continues although nothing can be written, and loses nothing of what was there."""
    logs = {name: (finished / name).read_bytes() for name in ("log.txt", "steps.jsonl")}
    newest = finished / "checkpoint-2.pth"
    newest.write_bytes(newest.read_bytes()[:-1])
    kept = sha256_of(finished / "checkpoint-1.pth")
    with largest_file(1):
        assert main.main(quick(epochs=3, output_dir=finished)) == 0
    assert sha256_of(finished / "checkpoint-1.pth") == kept
    assert [row["epoch"] for row in read_log(finished)] == [0, 1]
    assert main.main(quick(epochs=3, output_dir=finished)) == 0
    assert {name: (finished / name).read_bytes() for name in logs} == logs


def test_torn_and_foreign_lines_of_a_log(finished):
    log = finished / "log.txt"
    log.write_bytes(log.read_bytes() + b'{"epoch": 1, "trai\n\xff\xfe\n[1]\n{"epoch": 5')
    assert main.main(quick(epochs=4, output_dir=finished)) == 0
    assert [row["epoch"] for row in read_log(finished)] == [0, 1, 2, 3]


def test_full_disk_of_tensorboard(tmp_path, capsys):
    """F6: its file ends, and the run does not."""
    pytest.importorskip("tensorboardX")
    with largest_file(300):
        started = time.monotonic()
        assert main.main(quick(epochs=1, log_dir=tmp_path / "tb", log_interval=1)) == 0
        wall = time.monotonic() - started
    assert capsys.readouterr().err.count("TensorBoard's log") == 1
    measured("F6", f"training finished in {wall:.0f} s with a full disk for TensorBoard")


def test_steps_of_tensorboard_after_a_resume(tmp_path):
    """What an earlier attempt wrote beyond the checkpoint is hidden."""
    pytest.importorskip("tensorboardX")
    board = run_logs.TensorBoard(str(tmp_path), 7)
    board.add(7, {"train/loss": 0.5})
    board.close()
    (path,) = tmp_path.iterdir()
    from tensorboardX.proto.event_pb2 import Event

    content, events = path.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert [(event.step, event.session_log.status) for event in events][1:] == [(7, 1), (7, 0)]
    assert events[2].summary.value[0].simple_value == 0.5


@pytest.mark.parametrize("budget", [0, 3])
def test_updates_that_are_not_finite(budget, tmp_path, monkeypatch, capsys):
    """F13: they are left out up to a budget, and no checkpoint holds what is not finite."""
    batches, bad = engine._on_device, {2, 5, 6, 9}

    def poisoned(*args):
        for index, (images, *rest) in enumerate(batches(*args)):
            yield (images * float("nan") if index in bad and len(images) == 64 else images, *rest)

    options = {"epochs": 1, "output_dir": tmp_path, "save_interval": 1, "skip_nonfinite": budget}
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_on_device", poisoned)
        assert main.main(quick(**options)) == 1
    step = sorted(bad)[0]
    assert f"not finite at step {step} of epoch 0" in capsys.readouterr().err
    last = newest_checkpoint(tmp_path)
    # the update after the budget ends the run
    assert last.name == f"checkpoint-0-{sorted(bad)[budget]}.pth"
    state = read(last)
    tensors = [*state["model"].values(), *(v for s in state["optimizer"]["state"].values() for v in s.values())]
    count = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)
    measured("F13", f"budget {budget}: stopped at bad update {budget + 1}, {count} non-finite numbers saved")
    assert count == 0
    assert main.main(quick(**options)) == 0, "the same command continues"
    assert budget == 0 or read_log(tmp_path)[0]["train_skipped"] == budget


def test_weights_that_overflow_are_not_saved(tmp_path, capsys):
    """F13: the last update of an epoch makes them infinite, and no later loss shows it."""
    run = quick(epochs=1, opt="adamw", lr=1e38, min_lr=1e38, opt_eps=0, output_dir=tmp_path, batch_size=1024)
    assert main.main(run) == 1
    assert "not finite" in capsys.readouterr().err and not list(tmp_path.glob("checkpoint*"))


def test_unreadable_training_images(tmp_path, capsys):
    """F14: each is named and counted, another stands for it, and above a share of them the run stops."""
    folder = make_image_folder(tmp_path / "data", train=40, val=10)
    paths = sorted((folder / "train").rglob("*.JPEG"))
    half = paths[3].read_bytes()
    paths[3].write_bytes(half[: len(half) // 2])
    paths[10].write_bytes(b"")
    paths[20].write_bytes(b"<html></html>")
    bad = {str(paths[index]) for index in (3, 10, 20)}
    options = {"data_set": "IMNET", "data_path": folder, "input_size": 32, "batch_size": 4, "epochs": 1}
    assert main.main(quick(**options, bad_images=0.1, output_dir=tmp_path / "out", num_workers=1)) == 0
    named = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: left out")]
    assert len(named) == 3 and all(any(path in line for line in named) for path in bad)
    assert read_log(tmp_path / "out")[0]["train_unreadable"] == 3
    assert main.main(quick(**options, bad_images=0.05)) == 1
    assert "3 of 40 training images cannot be read" in capsys.readouterr().err
    assert main.main(quick(**options)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and any(path in last for path in bad)
    # an image to evaluate is never replaced
    (image,) = sorted((folder / "val").rglob("*.JPEG"))[:1]
    image.write_bytes(b"")
    assert main.main(quick(**options, bad_images=0.5)) == 1
    assert str(image) in capsys.readouterr().err
    measured("F14", "3 of 3 bad images named and counted; stopped above the share; evaluation names the file")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_image_once_when_the_processes_change(world):
    """F24: the rest of an epoch is divided among any number of processes."""
    for before in (1, 2, 4):
        size, batch = 101, 4
        first = [TrainSampler(size, rank, before, 5) for rank in range(before)]
        seen = [list(sampler)[: 3 * batch] for sampler in first]
        consumed = 3 * batch * before
        rest = []
        for rank in range(world):
            sampler = TrainSampler(size, rank, world, 5)
            sampler.consumed = consumed
            rest += list(sampler)
        indices = [index for part in seen for _, index in part] + [index for _, index in rest]
        assert len(indices) == len(set(indices)) == consumed + (size - consumed) // world * world
    measured("F24", f"each image once with {world} processes after 1, 2 and 4")


@pytest.mark.parametrize(
    ("images", "world", "batch", "even", "expected"),
    [
        (64, 2, 32, False, (32, 1)), (64, 4, 32, False, (16, 1)), (64, 1, 32, False, (32, 2)),
        (96, 4, 32, True, (24, 1)), (64, 3, 32, False, None), (74, 2, 32, False, None), (36, 2, 12, True, (6, 3)),
    ],
)  # fmt: skip
def test_how_an_update_is_divided(images, world, batch, even, expected):
    assert divided(images, world, batch, even) == expected


def test_one_run_for_a_folder(finished, capsys):
    """F22: a second start is refused as long as the first one lives."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with RunLock(finished) as lock:
            lock.take()
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(0)
    try:
        os.read(reader, 1)
        started = time.monotonic()
        assert main.main(quick(epochs=4, output_dir=finished)) == 2
        wall = time.monotonic() - started
        assert f"another run (process {pid} on " in capsys.readouterr().err
        assert main.main(quick(epochs=3, eval=True, output_dir=finished)) == 0, "an evaluation only reads"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    measured("F22", f"a second start ends with 2 after {wall:.1f} s")
    assert wall < 5 and main.main(quick(epochs=3, output_dir=finished)) == 0


CHANGES = {
    "opt": ({"opt": "sgd"}, 2, "trained with --opt adamw, whose state --opt sgd cannot continue"),
    "adam": ({"opt": "adam"}, 2, "whose state --opt adam cannot continue"),
    "layer_decay": ({"layer_decay": 0.5}, 2, "grouped in another way"),
    "method": ({"attention_function": "softmax"}, 2, "was trained with attention_function caf"),
    "budget": ({"cell_num_ratio": 2}, 2, "was trained with cell_num_ratio 1"),
    "seed within an epoch": ({"seed": 7}, 2, "order of images is that of --seed 1"),
    "lr": ({"lr": 0.5}, 0, "note: other options than those of .*: lr 0.002 -> 0.5"),
    "many": (
        {"opt_betas": [0.5, 0.6], "weight_decay": 0.3, "clip_grad": 1.0},
        0,
        "clip_grad None -> 1, opt_betas None -> .*0.5, 0.6.*, weight_decay 0.05 -> 0.3",
    ),
    "ema": ({"model_ema": True}, 0, "holds no averaged weights: the average begins with its weights"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped within its first epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    patch = pytest.MonkeyPatch()
    kill_at(patch, (engine, "autocast"), 8)
    with pytest.raises(Killed):
        main.main(quick(model="kw_test_resnet", **KW, epochs=1, save_interval=5, output_dir=folder))
    patch.undo()
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_changed_options_are_told_or_refused(change, stopped, tmp_path, capsys):
    options, code, text = CHANGES[change]
    folder = shutil.copytree(stopped, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    common = {"model": "kw_test_resnet", **KW, "epochs": 1, "save_interval": 5, "output_dir": folder}
    assert main.main(quick(**{**common, **options})) == code
    out = capsys.readouterr()
    assert re.search(text, out.err if code else out.out)
    if code:
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".run.lock"} == {
            name: content for name, content in before.items() if name != ".run.lock"
        }
    elif change == "many":
        group = read(folder / "checkpoint-0.pth")["optimizer"]["param_groups"][0]
        assert tuple(group["betas"]) == (0.5, 0.6) and group["weight_decay"] in (0.3, 0.0)


def test_an_evaluation_with_another_attention_function_is_refused(stopped, capsys):
    options = {"model": "kw_test_resnet", **KW, "attention_function": "softmax", "eval": True, "output_dir": stopped}
    assert main.main(quick(**options)) == 2
    assert "it was trained with attention_function caf, and this run has softmax" in capsys.readouterr().err


MADE_BY_HAND = {
    "epoch -7": {"epoch": -7},
    "epoch nan": {"epoch": float("nan")},
    "epoch text": {"epoch": "3"},
    "format 99": {"format": 99},
    "format text": {"format": "x"},
    "best nan": {"best": {"acc1": float("nan"), "acc1_ema": None}},
    "best list": {"best": [1]},
    "rng none": {"rng": None},
    "rng empty": {"rng": [{}]},
    "rng text": {"rng": ["x"]},
    "optimizer text": {"optimizer": "x"},
    "optimizer empty": {"optimizer": {}},
    "scaler list": {"scaler": [1]},
    "progress text": {"progress": "x"},
    "progress empty": {"progress": {}},
    "progress negative": {"progress": {"update": -1}},
    "temperature text": {"temperature": "x"},
    "temperature nan": {"temperature": float("nan")},
    "args list": {"args": [1]},
    "model none": {"model": None},
    "images text": {"images_per_update": {"images": "x", "target": "y"}},
    "images zero": {"images_per_update": {"images": 0, "target": 0}},
    "best_epoch text": {"best_epoch": {"acc1": "x"}},
    "run list": {"run": [1]},
    "world text": {"world_size": "x"},
}
HARMLESS = {"scaler list", "best_epoch text", "run list", "world text", "args list"}


@pytest.mark.parametrize("entry", MADE_BY_HAND)
def test_checkpoints_made_by_hand(entry, stopped, tmp_path, capsys):
    """One line and exit code 2, or a run; never a traceback."""
    state = read(newest_checkpoint(stopped)) | MADE_BY_HAND[entry]
    torch.save(state, tmp_path / "made.pth")
    code = main.main(quick(model="kw_test_resnet", **KW, epochs=1, resume=tmp_path / "made.pth"))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == ((0, 0) if entry in HARMLESS else (2, 1))
    assert all("made.pth" in line for line in errors)


def test_sparse_weights_made_by_hand(stopped, tmp_path, capsys):
    state = read(newest_checkpoint(stopped))
    name = next(name for name, value in state["model"].items() if value.ndim == 2)
    state["model"][name] = state["model"][name].to_sparse()
    torch.save(state, tmp_path / "made.pth")
    assert main.main(quick(model="kw_test_resnet", **KW, epochs=1, resume=tmp_path / "made.pth")) == 2
    assert "made.pth" in capsys.readouterr().err


def test_the_log_is_json(finished):
    rows = [json.loads(line) for line in (finished / "steps.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] == 3 * 22
