"""The README's code runs, its paths exist, and its table holds the numbers of the configs and of the paper."""

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
with open(ROOT / "configs/tables.csv", newline="") as file:
    TABLES = [row for row in csv.DictReader(file) if row["config"]]
# of several rows with one config the first counts
PAPER = {row["config"]: row for row in reversed(TABLES)}
ROWS = [
    (path, [cell.strip() for cell in cells.split("|")])
    for path, cells in re.findall(r"^\|[^\n]*\]\((configs/\S+\.json)\) \|([^\n]*)\|$", README, re.MULTILINE)
]


def test_configs_of_kernelwarehouse_are_listed_once():
    """The README has the method that it is about; results/models.md has all rows."""
    listed = [path for path, _ in ROWS]
    assert len(listed) == len(set(listed)) and set(listed) <= set(PAPER)
    assert {path for path, row in PAPER.items() if row["method"] == "kw"} <= set(listed)


@pytest.mark.parametrize(("path", "cells"), ROWS, ids=[path for path, _ in ROWS])
def test_table(path, cells):
    parameters = json.loads((ROOT / path).read_text())["_about"]["parameters"]
    assert cells[:3] == [f"{parameters / 1e6:.2f} M", PAPER[path]["top1"], PAPER[path]["top5"]]


def test_paths_exist():
    named = set(re.findall(r"\]\((?!#)([^)]+)\)|\b((?:configs|scripts)/\S+?\.(?:json|sh))", README))
    paths = {a or b for a, b in named}
    layout = re.search(r"## Layout\n```\n(.*?)```", README, re.DOTALL).group(1)
    paths |= set(re.findall(r"^(\S+)", layout, re.MULTILINE))
    missing = sorted(path for path in paths if not (ROOT / path).exists())
    assert not missing


def test_python_examples():
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
