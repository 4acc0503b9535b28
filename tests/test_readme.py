"""The README's code runs, its paths exist, and its table holds the numbers of the configs and of the paper."""

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
with open(ROOT / "tests/data/paper_rows.csv") as file:
    PAPER = {row["config"]: row for row in csv.DictReader(file)}
ROWS = [
    (path, [cell.strip() for cell in cells.split("|")])
    for path, cells in re.findall(r"^\|[^\n]*\]\((configs/\S+\.json)\) \|([^\n]*)\|$", README, re.MULTILINE)
]


def test_every_config_of_the_paper_is_listed_once():
    assert sorted(path for path, _ in ROWS) == sorted(PAPER)


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
