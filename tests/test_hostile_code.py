"""Checkpoints, URLs and configs with code in them: it never runs."""

import hashlib
import os
import shutil
import sys

import pytest
import torch
from faults import measured
from helpers import KW, ROOT, finish, quick, refused, words
from servers import sends

import main
from models import build_model
from models.config import ConfigError, read_config

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")
TRAP = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def evil_checkpoint(path, target, slot, legacy):
    model = build_model({"model": "test_resnet"}, num_classes=10)
    content = {"model": model.state_dict(), "args": {}, "optimizer": {}, "rng": [], "epoch": 0}
    content[slot] = {**content[slot], "x": Evil(target)} if isinstance(content[slot], dict) else [Evil(target)]
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def arguments_of(way, path, serve):
    """Options of a run that reads a checkpoint in one of the ways that there are."""
    if way == "output_dir":
        (path.parent / "out").mkdir()
        shutil.copy(path, path.parent / "out" / "checkpoint-0.pth")
        return quick(output_dir=path.parent / "out")
    if way == "url":
        content = path.read_bytes()
        url = f"{serve(sends(content))}/{path.name}#sha256={hashlib.sha256(content).hexdigest()}"
        return quick(resume=url, eval=True)
    dynamic = {"model": "kw_test_resnet", **KW} if way == "init_static" else {}
    return quick(**dynamic, **{way: path})


WAYS = ("resume", "finetune", "init_static", "output_dir", "url")
SLOTS = ("model", "args", "optimizer", "rng")


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("way", ("init_static", "output_dir", "url"))
def test_code_in_a_checkpoint_never_runs(way, legacy, slot, tmp_path, serve, monkeypatch, capsys):
    for name, value in TRAP.items():
        monkeypatch.setenv(name, value)
    path = evil_checkpoint(tmp_path / "evil.pth", tmp_path / "ran", slot, legacy)
    line = refused(capsys, arguments_of(way, path, serve))
    assert ("evil.pth" if way != "output_dir" else str(tmp_path / "out")) in line
    assert not (tmp_path / "ran").exists()
    measured("F10", "never ran, in this process")
    measured("F12", "never ran, in this process")


# every way with both formats, every slot, with the variable and without
IN_PROCESSES = [
    pytest.param(way, legacy, SLOTS[(2 * number + legacy) % 4], [{}, TRAP][(number + legacy) % 2], id=f"{way}-{kind}")
    for number, way in enumerate(WAYS)
    for legacy, kind in enumerate(("zip", "legacy"))
]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "legacy", "slot", "trap"), IN_PROCESSES)
def test_code_in_a_checkpoint_never_runs_in_a_process(way, legacy, slot, trap, tmp_path, serve):
    path = evil_checkpoint(tmp_path / "evil.pth", tmp_path / "ran", slot, legacy)
    arguments = arguments_of(way, path, serve)
    environment = {"OMP_NUM_THREADS": "1", "TORCH_HOME": str(tmp_path / "hub"), **trap}
    done = finish([sys.executable, ROOT / "main.py", *arguments], 60, environment)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and ("evil.pth" if way != "output_dir" else str(tmp_path / "out")) in lines[0]
    assert not (tmp_path / "ran").exists()
    measured("F12", "never ran, with and without the variable")


def test_code_in_texts_of_a_checkpoint_never_runs(tmp_path, capsys, monkeypatch):
    """Texts stay texts: a config in Python, what hydra would call, imports, templates."""
    monkeypatch.chdir(tmp_path)
    call = "__import__('os').system('touch ran')"
    texts = {
        "meta": {"config": f"import os\nos.system('touch {tmp_path}/ran')\n"},
        "args": {"_target_": "os.system", "_args_": ["touch ran"], "custom_imports": {"imports": ["antigravity"]}},
        "hyper_parameters": f"!!python/object/apply:os.system ['touch {tmp_path}/ran']",
        "__reduce__": call,
    }
    state = build_model({"model": "test_resnet"}, num_classes=10).state_dict()
    torch.save({"model": state, **texts}, "texts.pth")
    assert main.main(quick(eval=True, resume=tmp_path / "texts.pth")) == 0
    # of these options each one that is read is checked as in a config
    for name, value in (("model", call), ("opt", call), ("aa", f"{call}-m9"), ("layers", [call]), ("data_set", call)):
        args = {"model": "test_resnet", "data_set": "digits", "input_size": 16, name: value, "given": ["model", name]}
        torch.save({"model": state, "args": args}, "texts.pth")
        capsys.readouterr()
        assert main.main(words(resume=tmp_path / "texts.pth", device="cpu", num_workers=0, epochs=1)) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and "antigravity" not in sys.modules
    measured("F11", "never ran")


@pytest.mark.parametrize(
    "key, value",
    [
        ("_target_", "os.system"),
        ("custom_imports", {"imports": ["antigravity"]}),
        ("model", "__import__('os').system('touch ran')"),
        ("opt", "torch.optim.SGD"),
        ("data_set", "__import__('os')"),
        ("layers", {"_target_": "os.system"}),
        ("model", {"_target_": "os.system", "_args_": ["touch ran"]}),
    ],
)
def test_code_in_a_config_is_refused(key, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=key):
        read_config({key: value})
    assert os.listdir(tmp_path) == [] and "antigravity" not in sys.modules
