"""Every config reads, builds, and says the truth about itself; the released ones keep the released keys."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from models import build_model
from models.config import read_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.json"))
RELEASED = json.loads((ROOT / "tests/data/released_configs.json").read_text())
with open(ROOT / "tests/data/paper_rows.csv") as file:
    PAPER = {row["config"]: row for row in csv.DictReader(file)}
TABLES = {"KW README": "the released repository's README"}

CLASSES = {"digits": 10}
# The released config gives 4.03 M where the paper says 4.08 M.
PARAMETERS = {"configs/resnet18/kw1d4x_resnet18.json": 4.03}
# The model's own default, which the released file leaves out.
ADDED = {
    "mobilenetv2_050/kw1d2x_mobilenetv2_050": {"dropout": 0.1},
    "mobilenetv2_100/kw1d2x_mobilenetv2_100": {"dropout": 0.1},
}


def raw(path):
    return json.loads((ROOT / path).read_text())


@pytest.mark.parametrize("path", CONFIGS)
def test_about(path):
    config = raw(path)
    assert next(iter(config)) == "_about", "a config begins with what it is"
    about = config["_about"]
    assert about["what"] and about["accuracy"]
    command = about["command"]
    named = re.search(r"--kw_config (\S+)", command).group(1)
    assert named == path and (ROOT / named).is_file()

    # "8 GPUs x 128 x 4 = 4096" is the command's own arithmetic
    factors = [int(n) for n in re.findall(r"\d+", about["batch"])]
    options = dict(re.findall(r"--(nproc_per_node|batch_size|update_freq)[= ](\d+)", command))
    settings = {"nproc_per_node": 1, "batch_size": 64, "update_freq": 1, **read_config(ROOT / path), **options}
    batch = [int(settings[key]) for key in ("nproc_per_node", "batch_size", "update_freq")]
    assert factors == [*batch, batch[0] * batch[1] * batch[2]]


@pytest.mark.parametrize("path", CONFIGS)
def test_builds_with_the_parameters_it_says(path):
    with torch.device("meta"):
        model = build_model(str(ROOT / path), num_classes=CLASSES.get(raw(path).get("data_set"), 1000))
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == raw(path)["_about"]["parameters"]
    if path in PAPER:
        expected = PARAMETERS.get(path, float(PAPER[path]["params_M"]))
        assert parameters / 1e6 == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("path", PAPER)
def test_accuracy_is_the_papers(path):
    row, accuracy = PAPER[path], raw(path)["_about"]["accuracy"]
    table = TABLES.get(row["source"]) or "paper, Table " + row["source"].removeprefix("KW T")
    assert accuracy.startswith(f"top-1 {row['top1']}, top-5 {row['top5']} ({table}")


@pytest.mark.parametrize("name", RELEASED)
def test_released_keys_are_kept(name):
    config = raw(f"configs/{name}.json")
    del config["_about"]
    assert config == {**RELEASED[name], **ADDED.get(name, {})}


def test_every_config_states_its_source():
    unsourced = [path for path in CONFIGS if path not in PAPER and not path.startswith("configs/digits/")]
    assert not unsourced, "add the row of the paper's table to tests/data/paper_rows.csv"
