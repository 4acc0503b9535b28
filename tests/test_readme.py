"""The README is a front page; the tables and paths that stand on pages of docs/ are those of the project."""

import csv
import json
import re

import pytest
import timm
from helpers import ROOT

from models.methods import METHODS

README = (ROOT / "README.md").read_text()
ACCURACIES = (ROOT / "docs/accuracies.md").read_text()
with open(ROOT / "configs/tables.csv", newline="") as file:
    TABLES = [row for row in csv.DictReader(file) if row["config"]]
# of several rows with one config the first counts
PAPER = {row["config"]: row for row in reversed(TABLES)}
ROWS = [
    (path, [cell.strip() for cell in cells.split("|")])
    for path, cells in re.findall(r"^\|[^\n]*\]\(\.\./(configs/\S+\.json)\) \|([^\n]*)\|$", ACCURACIES, re.MULTILINE)
]


def test_configs_of_kernelwarehouse_are_listed_once():
    """The page has the method that the project is about; results/models.md has all rows."""
    listed = [path for path, _ in ROWS]
    assert len(listed) == len(set(listed)) and set(listed) <= set(PAPER)
    assert {path for path, row in PAPER.items() if row["method"] == "kw"} <= set(listed)


@pytest.mark.parametrize(("path", "cells"), ROWS, ids=[path for path, _ in ROWS])
def test_table(path, cells):
    parameters = json.loads((ROOT / path).read_text())["_about"]["parameters"]
    assert cells[:3] == [f"{parameters / 1e6:.2f} M", PAPER[path]["top1"], PAPER[path]["top5"]]


def test_paths_exist():
    named = set(re.findall(r"\]\((?!#)([^)#]+)[^)]*\)|\b((?:configs|scripts)/\S+?\.(?:json|sh))", README))
    paths = {a or b for a, b in named}
    layout = re.search(r"^```text\n(.*?)```", (ROOT / "docs/layout.md").read_text(), re.DOTALL | re.MULTILINE).group(1)
    paths |= set(re.findall(r"^(\S+)", layout, re.MULTILINE))
    missing = sorted(path for path in paths if not (ROOT / path).exists())
    assert not missing


def test_front_page_is_short():
    assert len(README.splitlines()) < 150


def test_front_page_states_facts():
    """What it says of this project, of the installed timm, and of the paper."""
    pretrained = len(timm.list_models(pretrained=True))
    # no name of this project's own registration counts
    names = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("timm.")]
    assert f"timm {timm.__version__} " in README
    assert f"({len(names):,} names)" in README and f"| {pretrained:,} |" in README
    methods = [name for name in METHODS if name != "kw1d2x"]
    assert f"{len(methods)} methods" in README
    for config in ("kw1d4x_resnet18", "kw1x_resnet18", "kw4x_resnet18", "resnet18"):
        path = f"configs/resnet18/{config}.json"
        parameters = json.loads((ROOT / path).read_text())["_about"]["parameters"]
        text = " ".join(README.split())
        assert f"{PAPER[path]['top1']} %" in text and f"{parameters / 1e6:.1f} M" in text
