"""Texts of checkpoints, and names of files, cannot break out of what is printed and written."""

import csv
import io
import json
import os
import re

import predict
import pytest
import summarize
import torch
import validate
from helpers import make_image_folder

import main
import utils
from checkpoints import write_checkpoint
from exporting import describe
from models import build_model
from models.config import ConfigError, read_config
from models.messages import printable
from trained import open_trained

pytestmark = pytest.mark.usefixtures("one_thread")

# a new title for the window, a formula, a second line of a CSV file, marks of direction, a sequence of one byte
ODD = ["\x1b]0;title\x07", '=HYPERLINK("http://x")', 'a,"b"\nc,d', "\u202eabc\u2066", "\x9b31m\x7f"]
CLASSES = [*ODD, "\u4e16 \U0001f41c"]
# anything but line breaks that a terminal obeys
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
FILES = ["\x1b[31mred.jpg", "=1+1.jpg", "new\nline.jpg", "\u202ejpg.exe.jpg", os.fsdecode(b"\xff\x9b.jpg")]


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A folder with a checkpoint of odd classes and images of odd names, which is the current one."""
    image = (make_image_folder(tmp_path / "data", train=3, val=3) / "val" / "ant" / "0.JPEG").read_bytes()
    (tmp_path / "odd").mkdir()
    monkeypatch.chdir(tmp_path / "odd")
    for name in FILES:
        with open(name, "wb") as file:
            file.write(image)
    model = build_model({"model": "test_resnet"}, num_classes=len(CLASSES))
    args = {"model": "test_resnet", "input_size": 32, "classes": CLASSES, "given": ["input_size", "model"]}
    write_checkpoint(tmp_path / "odd" / "=x\x1b.pth", {"model": model.state_dict(), "args": args})
    return "=x\x1b.pth"


def test_predictions(odd, capfdbinary):
    found = {}
    for form in ("text", "json", "csv"):
        assert predict.main([odd, *FILES, "--format", form, "--top_k", "9"]) == 0
        found[form] = capfdbinary.readouterr().out.decode()
        assert not OBEYED.search(found[form]), form
    assert len(found["text"].splitlines()) == len(FILES)
    assert r"\x1b[31mred.jpg: " in found["text"] and r"\u202eabc\u2066" in found["text"]
    names = [utils.shown(name) for name in FILES]
    records = json.loads(found["json"])
    assert [record["image"] for record in records] == names
    assert {entry["class"] for entry in records[0]["predictions"]} == set(CLASSES)
    rows = list(csv.DictReader(io.StringIO(found["csv"], newline="")))
    assert len(rows) == len(FILES) * len(CLASSES)
    assert {row["image"] for row in rows} == {utils.csv_cell(name) for name in names}
    classes = {row["class"] for row in rows}
    assert {'a,"b"\nc,d', '\'=HYPERLINK("http://x")', r"\x1b]0;title\x07"} <= classes and len(classes) == len(CLASSES)


def test_errors_and_notes(odd, tmp_path, capfd):
    """What is wrong with a file is told with its name, on one line."""
    os.truncate("\x1b[31mred.jpg", 100)
    assert predict.main([odd, *FILES]) == 1
    assert predict.main([odd, FILES[0]]) == 2
    assert predict.main(["missing\x1b[31m\n.pth", FILES[0]]) == 2
    # the classes are those of the data, as far as a name of a folder can be one of these
    assert main.main(["--eval", "--resume", odd, "--data_path", str(tmp_path / "data"), "--device", "cpu"]) == 2
    assert main.main(["--kw_config", "a\x1b[31m\n.json"]) == 2
    captured = capfd.readouterr()
    assert not OBEYED.search(captured.out + captured.err)
    assert captured.err.count("error: ") == 4 == sum(line.startswith("error: ") for line in captured.err.splitlines())
    assert r"passed over: \x1b[31mred.jpg: cannot be read" in captured.err


def test_table_of_checkpoints(odd, capfd):
    row = dict.fromkeys(validate.COLUMNS, 1) | {"model": "kw_x", "checkpoint": "=x\x1b,\n.pth", "top1": -1.5}
    (read,) = csv.DictReader(io.StringIO(validate.as_csv([row]), newline=""))
    assert (read["checkpoint"], read["model"], read["top1"]) == ("'=x\\x1b,\n.pth", "kw_x", "-1.5")
    assert validate.main([odd, "--data_path", "missing", "--device", "cpu", "--output", "out.csv"]) == 2
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1 and not OBEYED.search(captured.err)


def test_table_of_configs(tmp_path, capfd, monkeypatch):
    path = tmp_path / "=x|\x1b[31m\n.json"
    path.write_text(json.dumps({"model": "test_resnet", "input_size": 32}))
    for form in ("markdown", "csv", "json"):
        monkeypatch.setattr("sys.argv", ["summarize.py", str(path), "--format", form])
        summarize.main()
        assert not OBEYED.search("".join(capfd.readouterr()))
    assert summarize.markdown_table(["a"], [["b\n| c |\x1b"]]).splitlines()[2:] == [r"| b\n\| c \|\x1b |"]


def test_names_of_warehouses():
    for name in ("a\x1b[31m", "a\nb", "\u202ea"):
        with pytest.raises(ConfigError, match="a control character in its name"):
            read_config({"warehouses": {name: {"layers": ["x"]}}})


@pytest.mark.slow
def test_metadata_of_exported_files(odd, tmp_path):
    """Every text comes back from ONNX as it was, from a field of its own."""
    onnx = pytest.importorskip("onnx")
    from exporting import write_onnx

    trained = open_trained(odd)
    about = describe(trained)
    assert about["classes"] == CLASSES and json.dumps(about).isascii()
    write_onnx(trained.model, tmp_path / "x.onnx", 32, about, False, names=("logits",))
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "x.onnx").metadata_props}
    assert json.loads(metadata["classes"]) == CLASSES and metadata["classes"].isascii()
    assert metadata.keys() >= about.keys()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("\u00e9 \u4e16 \U0001f41c.jpg", "\u00e9 \u4e16 \U0001f41c.jpg"),
        ("\u0646\u06cc\u200c\u062e\u0648", "\u0646\u06cc\u200c\u062e\u0648"),
        ("\x1b[2J\r\n\t\x00", r"\x1b[2J\r\n\t\x00"),
        ("\x85\x9b\u2028\u2029\u202e\u2066\ufeff", r"\x85\x9b\u2028\u2029\u202e\u2066\ufeff"),
        ("\ud800\udc00"[:1], r"\ud800"),
        (os.fsdecode(b"a\xff\x1b"), r"a\xff\x1b"),
        ("\U000e0041", r"\U000e0041"),
    ],
)  # fmt: skip
def test_printable(text, expected):
    assert printable(text) == expected == printable(expected)


def test_log_and_errors_are_printable(capsys):
    utils.log("a\x1b[31m\nb")
    assert capsys.readouterr().out == "a\\x1b[31m\\nb\n"
    assert str(ConfigError("a\x1b\nb")) == r"a\x1b b"


@pytest.mark.parametrize(
    "value, expected",
    [("=1", "'=1"), ("+1", "'+1"), ("-1", "'-1"), ("@x", "'@x"), ("\t=1", "'\\t=1"), ("a=1", "a=1"), (-1.5, -1.5)],
)  # fmt: skip
def test_csv_cell(value, expected):
    assert utils.csv_cell(value) == expected


def test_json_of_odd_texts():
    value = {"a": ["\x1b", "\x9b\u202e\U000e0041", "\u00e9\n", torch.pi]}
    text = utils.as_json(value)
    assert json.loads(text) == value and not OBEYED.search(text) and "\u00e9" in text
