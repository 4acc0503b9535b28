"""Every command and snippet of the README and the guides is run, or its options are parsed (`docs_commands.py`)."""

import argparse
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from docs_commands import LANGUAGES, PAGES, RULES, Command, Snippet, contents, fences, names_of_tests, rule_of
from helpers import ROOT, make_image_folder, words

import main
from command_line import parse_command_line
from models import __main__ as package

pytestmark = pytest.mark.usefixtures("one_thread")
EVERYTHING = [item for page in PAGES for item in contents(page)]
COMMANDS = [item for item in EVERYTHING if isinstance(item, Command)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What the pages take for granted, under the names that they use: data, checkpoints, images."""
    folder = tmp_path_factory.mktemp("prepared")
    make_image_folder(folder / "IMAGENET", train=24, val=12)
    for name in ("PHOTOS", "IMAGES"):
        (folder / name).symlink_to("IMAGENET/val")
    (folder / "dog.jpg").write_bytes(min((folder / "IMAGENET/val/ant").iterdir()).read_bytes())
    options = {
        "data_path": folder / "IMAGENET", "input_size": 32, "batch_size": 8, "epochs": 3, "warmup_epochs": 0,
        "temp_epoch": 0, "num_workers": 0, "device": "cpu", "mixup": 0, "cutmix": 0,
    }  # fmt: skip
    config = {"kw_config": ROOT / "configs/resnet18/kw1x_resnet18.json", "model": "kw_test_resnet"}
    assert main.main(words(**config, **options, output_dir=folder / "OUT")) == 0
    assert main.main(words(model="test_resnet", **options, output_dir=folder / "STATIC")) == 0
    for name, source in {
        "CKPT": "OUT/checkpoint-best.pth", "KW.pth": "OUT/checkpoint-best.pth", "STATIC.pth": "STATIC/checkpoint-2.pth",
        **{f"CKPT{i + 1}": f"OUT/checkpoint-{i}.pth" for i in range(3)},
    }.items():  # fmt: skip
        (folder / name).symlink_to(source)
    _write_shards(folder)
    return folder


def _write_shards(folder):
    """The images of IMAGENET as a shard to train on and one to evaluate."""
    (folder / "SHARDS").mkdir()
    for split, name in (("train", "train-0000.tar"), ("val", "val-0000.tar")):
        with tarfile.open(folder / "SHARDS" / name, "w") as shard:
            for i, path in enumerate(sorted((folder / "IMAGENET" / split).glob("*/*"))):
                label = ("ant", "bee", "cat").index(path.parent.name)
                for suffix, data in (("jpg", path.read_bytes()), ("cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{i:04}.{suffix}")
                    entry.size = len(data)
                    shard.addfile(entry, io.BytesIO(data))


@pytest.fixture
def workshop(prepared, tmp_path, monkeypatch):
    """A folder that looks like the project's, with the prepared files in it; commands run there as they are written."""
    for path in ROOT.iterdir():
        if path.name not in ("scripts", "output", "site", "mini_coco", "work_dirs") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "scripts").mkdir()
    for path in (ROOT / "scripts").iterdir():
        (tmp_path / "scripts" / path.name).symlink_to(path)
    # the environment is that of the tests
    (tmp_path / "scripts/setup.sh").unlink()
    (tmp_path / "scripts/setup.sh").write_text("#!/bin/sh\n")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    for path in prepared.iterdir():
        subprocess.run(["cp", "-a", path, tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    # commands put folders in front
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    return tmp_path


def test_every_command_has_a_rule(capsys):
    missing = [f"{command.page}: {command.text}" for command in COMMANDS if rule_of(command) is None]
    assert not missing, "no rule in docs_commands.py says what is done with " + "; ".join(missing)
    used = {rule_of(command) for command in COMMANDS}
    assert [rule.pattern for rule in RULES if rule not in used] == []
    counts = {"run": 0, "run with --slow": 0, "run by other tests": 0, "parsed": 0}
    for rule in map(rule_of, COMMANDS):
        kind = "run by other tests" if rule.tested else "parsed" if rule.parsed else "run"
        counts["run with --slow" if rule.slow else kind] += 1
    snippets = len(EVERYTHING) - len(COMMANDS)
    with capsys.disabled():
        told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        print(f"\n{len(COMMANDS)} commands ({told}) and {snippets} snippets (all run) of {len(PAGES)} pages")
    assert snippets and all(counts.values())


def test_rules_are_of_one_kind_and_name_tests_that_exist():
    for rule in RULES:
        assert sum([rule.run is not None, bool(rule.tested), bool(rule.parsed)]) == 1, rule
        if rule.tested:
            file, _, name = rule.tested.partition("::")
            assert name in names_of_tests(file), rule


@pytest.mark.parametrize("page", PAGES)
def test_every_block_tells_its_language(page):
    """A block without one would hide commands from these tests."""
    assert {language for language, _ in fences(page)} <= LANGUAGES
    for language, text in fences(page):
        if language == "text":
            assert not re.search(r"^(python|bash|pip|torchrun) ", text, re.MULTILINE)


def _runs(item, slow):
    """Whether an item is run here, without or with the slow ones."""
    rule = None if isinstance(item, Snippet) else rule_of(item)
    return isinstance(item, Snippet) or (rule is not None and rule.run is not None and (slow or not rule.slow))


def _is_quick(item):
    return _runs(item, slow=False)


def _has_slow(page):
    return any(_runs(item, slow=True) and not _is_quick(item) for item in contents(page))


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(_is_quick, contents(page)))])
def test_quick_commands_and_snippets(page, workshop):
    for item in filter(_is_quick, contents(page)):
        _run(item, workshop)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in PAGES if _has_slow(page)])
def test_all_commands_and_snippets(page, workshop):
    for item in contents(page):
        if _runs(item, slow=True):
            _run(item, workshop)


def _run(item, workshop):
    if isinstance(item, Snippet):
        exec(compile(item.text, item.page, "exec"), {"__name__": "snippet"})
        return
    rule = rule_of(item)
    if rule.package and importlib.util.find_spec(rule.package) is None:
        return
    for name in rule.fresh:
        subprocess.run(["rm", "-rf", workshop / name], check=True)
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = _started([*item.words, *shlex.split(rule.run)])
    assert code in (0, None), f"{item.page}: {item.text} ended with {code}: {told.getvalue()[-2000:]}"


def _started(argv):
    """Run a command in this process, or a shell script in one of its own; returns the exit code."""
    program, *argv = argv
    if program == "bash":
        done = subprocess.run([program, *argv], capture_output=True, text=True, check=False)
        print(done.stderr[-2000:], file=sys.stderr)
        return done.returncode
    if program == "kernelwarehouse":
        return package.main(argv)
    assert program == "python" and argv[0].endswith(".py")
    sys.argv = argv
    try:
        return main.main(argv[1:]) if argv[0] == "main.py" else _script(argv[0]).main(*_arguments(argv))
    except SystemExit as end:
        return end.code


def _script(path):
    """The module of a script of scripts/ or detection/."""
    folder, name = Path(path).parent.name, Path(path).stem
    return importlib.import_module(name if folder == "scripts" else f"{folder}.{name}")


def _arguments(argv):
    """What the script's main takes: its words, or nothing, if it reads those of the process."""
    code = _script(argv[0]).main.__code__
    return [argv[1:]] if code.co_argcount else []


class _Parsed(BaseException):
    """The options of a script were accepted."""


@pytest.mark.parametrize(
    "command",
    [command for command in COMMANDS if rule_of(command) is not None and rule_of(command).run is None],
    ids=lambda command: re.sub(r"\W+", "-", command.text)[:60],
)
def test_options_are_accepted(command, workshop, monkeypatch):
    """Of commands that are not run here: a script's own parser takes them, and what they name exists."""
    program, *argv = command.words
    while program in ("torchrun", "sbatch") or argv[:2] == ["-m", "torch.distributed.launch"]:
        program, argv = _without_launcher(program, argv)
    if program == "kernelwarehouse" or argv[:2] == ["-m", "kernelwarehouse"]:
        name = argv[2] if argv[0] == "-m" else argv[0]
        assert name == "train"
        program, argv = "python", ["main.py", *argv[argv.index(name) + 1 :]]
    if program == "bash":
        _check_shell_script(monkeypatch, command, *argv)
        return
    if program == "python" and len(argv) == 1:
        # nothing to parse
        assert (ROOT / argv[0]).is_file()
        return
    if program == "python" and argv[0] != "-m":
        _check_options(monkeypatch, *argv)
        return
    assert program in ("pip", "source", ".venv/bin/pre-commit") or argv[:2] == ["-m", "mkdocs"], command.text


def _without_launcher(program, argv):
    """The command that a launcher starts, whose own options it must know."""
    if program == "sbatch":
        script = next(i for i, word in enumerate(argv) if word.endswith(".sh"))
        return "bash", argv[script:]
    from torch.distributed.run import get_args_parser

    argv = argv[2:] if argv[0] == "-m" else argv
    known = get_args_parser().parse_args(argv)
    start = ["-m", known.training_script] if known.module else [known.training_script]
    return "python", [*start, *known.training_script_args]


def _check_shell_script(monkeypatch, command, script, *argv):
    assert subprocess.run(["bash", "-n", ROOT / script], check=False).returncode == 0
    if Path(script).name in ("launch.sh", "launch_slurm.sh"):
        parse_command_line(list(argv))
        text = (ROOT / script).read_text()
        assert all(re.search(rf"\b{name}\b", text) for name, _ in command.variables)
    elif script.startswith("detection/"):
        # what it would start, told by a program that prints its words
        told = {"PYTHON": "echo", "PATH": os.environ["PATH"]}
        if "slurm" in script:
            assert len(argv) >= 4
            return
        done = subprocess.run(["bash", ROOT / script, *argv], capture_output=True, text=True, check=True, env=told)
        _, (path, *options) = _without_launcher("python", shlex.split(done.stdout))
        assert Path(path).samefile(ROOT / script.replace("dist_", "").replace(".sh", ".py"))
        _check_options(monkeypatch, path, *options)
    elif script == "scripts/test.sh":
        assert all(word.startswith("-") or word.isidentifier() or (ROOT / word).exists() for word in argv)
    else:
        assert argv in ((), ("--no-detection",))


def _check_options(monkeypatch, script, *argv):
    """Start a script up to where its options were parsed."""
    if script == "main.py":
        parse_command_line(list(argv))
        return
    if Path(script).parent.name == "detection":
        pytest.importorskip("mmdet")
    module = _script(script)
    sys.argv = [script, *argv]
    with monkeypatch.context() as patch, pytest.raises(_Parsed):
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, _stopping(getattr(argparse.ArgumentParser, name)))
        module.main(*_arguments([script, *argv]))


def _stopping(original):
    """A method of a parser that raises `_Parsed` where it would return to the script."""

    def parse(self, args=None, namespace=None):
        result = original(self, args, namespace)
        # parse_args calls the other, and then refuses what is left
        if original.__name__ == "parse_args" or sys._getframe(1).f_code.co_name != "parse_args":
            raise _Parsed
        return result

    return parse


def test_what_a_reader_would_see_fails(workshop, monkeypatch):
    """The checks find a wrong option, a wrong value, and a command that fails."""
    with pytest.raises(pytest.fail.Exception):
        _check_options(monkeypatch, "scripts/predict.py", "CKPT", "PHOTOS", "--no_such_option")
    with pytest.raises(ValueError):
        _check_options(monkeypatch, "main.py", "--no_such_option", "1")
    command = Command("page", "python scripts/report.py", ("python", "scripts/report.py", "ABSENT"))
    with pytest.raises(AssertionError, match="ended with 2"):
        _run(command, workshop)
    assert rule_of(Command("page", "python scripts/nothing.py", ())) is None
