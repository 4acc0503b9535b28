"""Where and how the C++ files are compiled: folders that cannot be written, damaged libraries, processes at once."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from tolerance import assert_same

from models.ops import mixture_conv_naive
from models.ops.backends import compiled, fused
from models.ops.geometry import geometry

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")


FLAGS = [*compiled.FLAGS, "-O1", "-DOF_A_TEST"]  # quick to compile


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing was compiled yet; returns the folder of compiled files."""
    caches = (compiled.library, compiled.own_folder)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "FLAGS", FLAGS)
    yield tmp_path / "kernelwarehouse"
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A compiled file, as it is kept."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(compiled, "FLAGS", FLAGS)
        compiled.library.cache_clear()
        assert compiled.library("fused.cpp", torch.float32)
        compiled.library.cache_clear()
    [path] = (folder / "kernelwarehouse").iterdir()
    return path


def assert_works():
    """A compiled backend runs, without a warning, and agrees with the definition."""
    tensors = [torch.randn(2, 64, 5, 5), torch.randn(2, 18, 6), torch.randn(6, 128, 32, 1, 1)]
    geo = geometry(*(tensor.shape for tensor in tensors), [3, 3], [1, 1], [1, 1], [1, 1], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = fused.forward(*tensors, geo)
    assert_same(y, mixture_conv_naive(*tensors, (3, 3), padding=1))


def test_kept_for_the_next_process(library, fresh, monkeypatch):
    fresh.mkdir()
    shutil.copy(library, fresh)
    monkeypatch.setattr(subprocess, "run", None)  # it is not compiled again
    assert_works()


def test_a_folder_that_cannot_be_written(fresh, monkeypatch):
    """The first is so for root too, whom permissions do not stop."""
    for base in ("/proc/self", fresh.parent / "a file" / "below"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(base))
        (fresh.parent / "a file").touch()
        assert compiled._folder() == Path(compiled.own_folder().name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh.parent))
    fresh.write_text("a file in its place")
    assert_works()
    assert len(list(Path(compiled.own_folder().name).iterdir())) == 1 and fresh.is_file()
    compiled.own_folder().cleanup()


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit"])
def test_a_damaged_library_is_compiled_again(damage, library, fresh):
    """Loading the truncated one would end the process by a signal."""
    content = bytearray(library.read_bytes())
    if damage == "truncated":
        del content[5000:]
    else:
        content[len(content) // 2] ^= 1
    fresh.mkdir()
    (fresh / library.name).write_bytes(content)
    assert_works()
    [again] = fresh.iterdir()
    assert again.read_bytes() == library.read_bytes()


@pytest.mark.slow
def test_three_processes_at_once(tmp_path):
    folders = [str(folder) for folder in (ROOT, ROOT / "tests", ROOT / "scripts")]
    code = f"import sys; sys.path[:0] = {folders}; import test_compiled; test_compiled.assert_works()"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(3)]
    assert [process.wait(timeout=300) for process in started] == [0] * 3
    # and nothing half made is left
    assert {path.suffix for path in (tmp_path / "kernelwarehouse").iterdir()} == {".so"}
