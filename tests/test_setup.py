"""The set-up scripts, in a copy of the project with empty requirements."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = [f"requirements{part}.txt" for part in ("", "-dev", "-export", "-look", "-detection")]


def run(*command, cwd, **env):
    result = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def copy(tmp_path):
    """A project with setup.sh and empty requirements."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts")
    for name in REQUIREMENTS:
        (tmp_path / name).write_text("# none\n")
    return tmp_path


def setup(copy, *arguments, **env):
    # the packages of the running interpreter stand for those that pip would have installed
    packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    env = {"PYTHON": sys.executable, "PYTHONPATH": packages, **env}
    return run("bash", "scripts/setup.sh", *arguments, cwd=copy, **env)


@pytest.mark.slow
def test_second_run_is_quick_and_a_killed_one_is_repaired(copy):
    code, output = setup(copy, "--no-detection")
    assert code == 0 and "make .venv" in output and ".venv is ready" in output

    start = time.monotonic()
    code, output = setup(copy, "--no-detection")
    assert code == 0 and "install" not in output
    assert time.monotonic() - start < 5  # 0.5 s alone on 2 cores

    (copy / "requirements.txt").write_text("# changed\n")
    code, output = setup(copy, "--no-detection")
    assert code == 0 and "make .venv" not in output and "install requirements.txt" in output

    (copy / "requirements-export.txt").write_text("# changed\n")
    code, output = setup(copy, "--no-detection")
    assert code == 0 and "requirements-export.txt" in output

    # what a kill in the middle of pip leaves behind
    (copy / ".venv/.installing").touch()
    code, output = setup(copy, "--no-detection")
    assert code == 0 and "make .venv" in output


def test_a_failed_step_is_named_with_its_remedy(copy):
    (copy / "requirements.txt").write_text("no-such-package==1.0\n")
    code, output = setup(copy, "--no-detection", PIP_NO_INDEX="1")
    assert code == 1
    assert "failed at: install requirements.txt" in output and "what to do:" in output
    assert ".venv is ready" not in output


def test_no_python(copy):
    code, output = setup(copy, PYTHON="/no/such/python")
    assert code == 1 and "failed at: find Python 3.11 or 3.12" in output and "what to do: install one" in output
    assert not (copy / ".venv").exists()


def test_unknown_argument(copy):
    code, output = setup(copy, "--detection")
    assert code == 2 and "unknown argument '--detection'" in output
