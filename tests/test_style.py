"""Files and functions are short enough to read in one sitting; ruff checks how many branches a function has."""

import ast

import pytest
from helpers import ROOT

LINES_OF_FILES = {"models": 400, "main.py": 350}
LINES_OF_FUNCTIONS = 60
# the two loops, and kernels
LONG = {"main.py": {"run"}, "engine.py": {"train_one_epoch"}, "triton_kernels.py": {"convolve", "mix_and_convolve"}}
FILES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", "models/**/*.py", "loading/*.py", "detection/*.py", "scripts/**/*.py")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_lengths(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= LINES_OF_FILES.get(path.parts[0], 600)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name for node in functions if node.end_lineno - node.lineno + 1 > LINES_OF_FUNCTIONS}
    assert long == LONG.get(path.name, set()), f"{path}: longer than {LINES_OF_FUNCTIONS} lines: {long}"
