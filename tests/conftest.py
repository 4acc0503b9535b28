"""Options and fixtures of all tests."""

import contextlib
import os

from startup import before_torch

before_torch()
# of several processes each has a thread, and so have those that it starts
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
if THREADS == 1:
    os.environ["OMP_NUM_THREADS"] = "1"

import faults
import pytest
import torch
from servers import answering, served

from models.ops.backends import compiled


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--faults", metavar="FILE", help="write the table of what the tests of faults measured")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """With several processes, the one that started them writes the table of what all of them measured."""
    faults.merge(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_sessionfinish(session):
    path, told = session.config.getoption("--faults"), getattr(session.config, "workeroutput", None)
    if told is not None:
        told["faults"] = faults.ROWS
    elif path and faults.ROWS:
        faults.write_table(path)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow; runs with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def deterministic():
    """The same numbers in every run."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


@pytest.fixture
def one_thread(deterministic):
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills fresh memory with NaN, so that an output that is never written shows."""
    # memory that is handed on would hold the numbers of the call before
    names = [
        f"backends.{name}"
        for name in ("grouped", "batched", "mixed", "fused", "depthwise", "pointwise", "streamed", "winograd")
    ]
    for module in ("geometry", *names):
        monkeypatch.setattr(f"models.ops.{module}.scratch", lambda slot, shape, like: like.new_empty(shape))
    monkeypatch.setattr("models.ops.backends.compiled.FLAGS", [*compiled.FLAGS, "-DPOISON"])
    compiled.library.cache_clear()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    compiled.library.cache_clear()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Starts servers on this machine; gives the address of one that answers as the given function does."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with contextlib.ExitStack() as running:
        yield lambda answer: running.enter_context(served(answering(answer)))


@pytest.fixture
def refuses(capsys):
    """Runs a script that must refuse its arguments; returns its one line."""

    def refuses(script, *arguments):
        capsys.readouterr()
        assert script.main([str(word) for word in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""
        return captured.err

    return refuses
