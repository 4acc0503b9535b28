"""Mistakes in configs and options: each is refused by name, before anything slow."""

import json
import os
import resource
import sys
import time

import pytest
from faults import measured
from helpers import ROOT, finish, refused

import main

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")


# what is wrong -> words of a command line, with FOLDER for one with the files of `bad_files`, and what the error names
MISTAKES = {
    "unknown key": (["unknown.json"], '"batch_sise"; did you mean "batch_size"?'),
    "wrong type": (["type.json"], '"epochs"'),
    "NaN": (["nan.json"], "nan.json: NaN"),
    "Infinity": (["infinity.json"], "infinity.json: -Infinity"),
    "twice": (["twice.json"], '"lr" is given twice'),
    "negative": (["negative.json"], '"batch_size"'),
    "huge integer": (["integer.json"], '"epochs"'),
    "integer of a thousand digits": (["digits.json"], '"seed"'),
    "integer of too many digits": (["long.json"], "long.json: not valid JSON"),
    "huge fraction": (["fraction.json"], '"lr"'),
    "byte order mark": (["mark.json"], "mark.json: begins with a byte order mark"),
    "UTF-16": (["utf16.json"], "utf16.json: not UTF-8"),
    "10 MB": (["large.json"], "large.json: larger than"),
    "deep": (["deep.json"], "deep.json"),
    "deep in a value": (["value.json"], '"lr"'),
    "lone surrogate": (["surrogate.json"], '"output_dir"'),
    "zero byte": (["zero.json"], '"output_dir"'),
    "empty": (["empty.json"], "empty.json"),
    "list": (["list.json"], "list.json: the top level"),
    "climbs": (["climbs.json"], '"finetune" climbs up'),
    "URL": (["url.json"], '"finetune" is a URL'),
    "recipe elsewhere": (["recipe.json"], '"recipe"'),
    "missing": (["missing.json"], "missing.json: no such config file"),
    "missing above": (["../missing.json"], "../missing.json: no such config file"),
    "folder": (["folder.json"], "folder.json: not a file"),
    "pipe": (["pipe.json"], "pipe.json: not a file"),
    "link to itself": (["loop.json"], "loop.json: no such config file"),
    "endless device": (["/dev/zero"], "/dev/zero: not a file"),
    "no name": ([""], "no such config file"),
    "a name of 5000 letters": (["x" * 5000], "xxx: no such config file"),
    "unknown option": (["good.json", "--batch-sise", "3"], 'did you mean "--batch_size"'),
    "option without a value": (["good.json", "--lr"], "--lr"),
    "option that is NaN": (["good.json", "--lr", "nan"], "--lr"),
    "negative option": (["good.json", "--epochs", "-3"], "--epochs"),
    "unknown recipe": (["good.json", "--recipe", "../deit"], "--recipe"),
    "missing weights": (["good.json", "--finetune", "../missing.pth"], "--finetune ../missing.pth"),
    "a pipe for weights": (["good.json", "--resume", "FOLDER/pipe.json"], "pipe.json: no such file"),
    "missing data": (["good.json", "--data_set", "IMNET", "--data_path", "../missing"], "--data_path ../missing"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    texts = {
        "good": "{}", "unknown": '{"batch_sise": 8}', "type": '{"epochs": "many"}', "nan": '{"lr": NaN}',
        "infinity": '{"lr": -Infinity}', "twice": '{"lr": 1, "lr": 2}', "negative": '{"batch_size": -8}',
        "integer": '{"epochs": 9223372036854775808}', "digits": '{"seed": ' + "9" * 1000 + "}",
        "long": '{"seed": ' + "9" * 100_000 + "}", "fraction": '{"lr": 1e400}', "mark": "\ufeff{}",
        "large": " " * 10_000_000 + "{}", "deep": "[" * 100_000, "value": '{"lr": ' + "[" * 900 + "]" * 900 + "}",
        "surrogate": '{"output_dir": "\\ud800"}', "zero": '{"output_dir": "a\\u0000"}', "empty": "", "list": "[]",
        "climbs": '{"finetune": "../weights.pth"}', "url": '{"finetune": "https://example.org/x-0123abcd.pth"}',
        "recipe": '{"recipe": "../recipes/deit"}',
    }  # fmt: skip
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    (folder / "utf16.json").write_bytes("{}".encode("utf-16"))
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / "loop.json").symlink_to("loop.json")
    return folder


def words_of(case, folder):
    (config, *rest), part = MISTAKES[case]
    config = f"{folder}/{config}" if config.endswith(".json") else config
    return ["--kw_config", config, *(word.replace("FOLDER", str(folder)) for word in rest)], part


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_refused_before_anything_slow(case, bad_files, capsys, monkeypatch):
    monkeypatch.setattr(main, "run", None)
    arguments, part = words_of(case, bad_files)
    start = time.process_time()
    assert part in refused(capsys, arguments)
    assert time.process_time() - start < 1
    measured("F26", "38 of 38 refused by key, each mistake alone")


def test_a_mistake_is_refused_without_assertions_too(bad_files):
    """All of them by one process of python -O, which leaves out every `assert`."""
    cases = {case: words_of(case, bad_files) for case in MISTAKES}
    code = "import json, sys, main; main.run = None; print([main.main(words) for words in json.loads(sys.argv[1])])"
    given = json.dumps([arguments for arguments, _ in cases.values()])
    done = finish([sys.executable, "-O", "-c", code, given], 100, {"OMP_NUM_THREADS": "1"})
    assert done.stdout == f"{[2] * len(cases)}\n", done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(cases)
    for line, (case, (_, part)) in zip(lines, cases.items()):
        assert line.startswith("error: ") and part in line, case
    measured("F29", "the mistakes of F26 are refused")


@pytest.mark.slow
@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.alone
def test_a_mistake_is_refused_in_three_seconds(case, bad_files):
    """As a user starts it; the time that other processes of the machine take does not count."""
    arguments, part = words_of(case, bad_files)
    taken = []
    # what else the machine does slows down the caches, too, so that the least counts
    while len(taken) < 3 and min(taken, default=3) >= 3:
        before = children_seconds()
        done = finish([sys.executable, ROOT / "main.py", *arguments], 60, {"OMP_NUM_THREADS": "1"})
        taken.append(children_seconds() - before)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and part in done.stderr
    assert min(taken) < 3


def children_seconds():
    """Processor time of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
