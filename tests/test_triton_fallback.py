"""What happens where Triton does not work, and to the file of its tuned tiles."""

import dataclasses
import importlib
import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from mixture_calls import definition, with_gradients
from tolerance import assert_same

from models.ops import mixture_conv
from models.ops.backends import BACKENDS, available_backends, triton_calls, triton_support
from models.ops.control import forced_backend
from models.ops.geometry import geometry

PLAN = importlib.import_module("models.ops.mixture_conv")._plan
ARGUMENTS = ([3, 3], None, [1, 1], [1, 1], [1, 1], 1)


def tensors():
    return [torch.randn(s, requires_grad=True) for s in ((2, 8, 5, 5), (2, 9, 3), (3, 6, 8, 1, 1))]


def geometry_of(values):
    return geometry(*(t.shape for t in values), [3, 3], [1, 1], [1, 1], [1, 1], 1)


@pytest.fixture
def fresh(monkeypatch):
    """Triton as if it was not tried yet, and again afterwards."""

    def forget():
        triton_support._works.cache_clear()
        triton_support.kernels.cache_clear()
        PLAN.cache_clear()

    forget()
    monkeypatch.setattr(triton_support, "_failed", False)
    yield
    monkeypatch.undo()
    forget()


def gpu_of(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("old GPU", "compute capability 7.5 of this GPU is below 8.0"),
        ("not installed", "it is not installed; pip install triton"),
        ("broken", "ImportError: libtriton.so: undefined symbol"),
        ("no driver", "RuntimeError: 0 active drivers"),
    ],
)
def test_where_triton_does_not_work(fault, reason, fresh, monkeypatch, recwarn):
    gpu_of(monkeypatch, (7, 5) if fault == "old GPU" else (9, 0))
    monkeypatch.setattr(triton_support, "installed", lambda: fault != "not installed")
    error = ImportError("libtriton.so: undefined symbol") if fault == "broken" else RuntimeError("0 active drivers")
    monkeypatch.setattr(triton_support, "kernels", raising(error))
    for dtype in (torch.float32, torch.bfloat16):
        names = available_backends(geometry_of(tensors()), dtype, "cuda")
        assert names[:3] == ["grouped", "batched", "mixed"] and not any(name.startswith("triton") for name in names)
    (warning,) = recwarn
    assert reason in str(warning.message) and "\n" not in str(warning.message)


@pytest.mark.parametrize("error", [RuntimeError("PTX\nptxas fatal"), ValueError("no tiles fit"), OSError("disk full")])
def test_a_kernel_that_fails_at_its_first_launch(error, fresh, monkeypatch, recwarn):
    monkeypatch.setattr(triton_support, "_interpreted", lambda: True)
    monkeypatch.setattr(triton_support, "kernels", raising(error))
    for _ in range(2):
        values = tensors()
        assert ("triton" in available_backends(geometry_of(values), torch.float32, "cpu")) == (len(recwarn) == 0)
        with forced_backend("triton"):
            results = with_gradients(mixture_conv, values, ARGUMENTS)
        for value, expected in zip(results, definition(values, ARGUMENTS), strict=True):
            assert_same(value, expected)
    (warning,) = recwarn
    assert type(error).__name__ in str(warning.message) and "\n" not in str(warning.message)
    with pytest.raises(ValueError, match="backend 'triton' cannot evaluate this call; available: grouped"):
        mixture_conv(*tensors(), *ARGUMENTS, backend="triton")


def test_a_kernel_that_is_named_and_fails_is_an_error(fresh, monkeypatch):
    monkeypatch.setattr(triton_support, "_interpreted", lambda: True)
    monkeypatch.setattr(triton_support, "kernels", raising(RuntimeError("ptxas fatal")))
    with pytest.warns(UserWarning), pytest.raises(triton_support.TritonFailed, match="ptxas fatal"):
        mixture_conv(*tensors(), *ARGUMENTS, backend="triton")


def test_a_backward_pass_that_fails(fresh, monkeypatch, recwarn):
    broken = dataclasses.replace(
        BACKENDS["grouped"],
        available=lambda *call: not triton_support._failed,
        backward=triton_support.guarded(raising(RuntimeError("out of resource: shared memory"))),
    )
    monkeypatch.setitem(BACKENDS, "triton", broken)
    values = tensors()
    results = with_gradients(mixture_conv, values, ARGUMENTS, backend="triton")
    for value, expected in zip(results, definition(values, ARGUMENTS), strict=True):
        assert_same(value, expected)
    assert len(recwarn) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("illegal")])
def test_errors_of_the_gpu_are_not_hidden(error, fresh, monkeypatch):
    monkeypatch.setattr(triton_support, "_interpreted", lambda: True)
    monkeypatch.setattr(triton_calls.Call, "__init__", raising(error))
    with forced_backend("triton"), pytest.raises(type(error)):
        mixture_conv(*tensors(), *ARGUMENTS)
    assert not triton_support._failed


# --- tuning -----------------------------------------------------------------------------------------------------------


class Kernel:
    """What the tuner needs of a kernel; a launch takes as long on the clock as its tiles are large."""

    arg_names, cache_key = ["size"], "source"

    def __init__(self):
        self.launched, self.fn = [], raising

    def run(self, size, **meta):
        self.launched.append(meta["BLOCK"])


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """A function that makes a tuner with eight configurations, as every process makes its own."""
    triton = pytest.importorskip("triton")
    from test_triton import Driver
    from triton.runtime import driver

    from models.ops.backends import triton_tuning

    monkeypatch.setattr(driver, "_active", Driver(90))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_tuning, "BUDGET", triton_tuning.Budget(30))

    def make(seconds=0.0):
        kernel = Kernel()
        configs = [triton.Config({"BLOCK": block}) for block in (64, 128, 32, 16, 256, 512, 1024, 8)]
        now = [0.0]

        def measured(call, quantiles):
            call()
            now[0] += seconds
            # a tile of 16 is the fastest
            return [abs(kernel.launched[-1] - 16) + 1.0] * 3

        monkeypatch.setattr(triton_tuning.time, "perf_counter", lambda: now[0])
        tuner = triton_tuning.Tuner(
            kernel, ["size"], configs, ["size"], None, None, do_bench=measured, cache_results=True
        )
        return tuner, kernel

    return make


def files(folder):
    return list(Path(folder).rglob("*.tuned.json"))


def test_the_best_tiles_are_kept_in_a_file(tuning, tmp_path):
    tuner, kernel = tuning()
    tuner.run(5, grid=None)
    assert sorted(kernel.launched[:-1]) == [8, 16, 32, 64, 128, 256, 512, 1024] and kernel.launched[-1] == 16
    (path,) = files(tmp_path)
    assert len(json.loads(path.read_text())) == 8
    # the next process measures nothing
    tuner, kernel = tuning()
    tuner.run(5, grid=None)
    assert kernel.launched == [16]
    tuner.run(6, grid=None)
    assert len(kernel.launched) == 1 + 8 + 1 and len(files(tmp_path)) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"a": 1}', '{"BLOCK: 64": "fast"}', "\xff\xfe", '{"BLOCK: 64": NaN}']
)
def test_a_damaged_file_is_written_again(content, tuning, tmp_path):
    tuning()[0].run(5, grid=None)
    (path,) = files(tmp_path)
    good = path.read_text()
    path.write_bytes(content.encode("latin-1"))
    tuner, kernel = tuning()
    tuner.run(5, grid=None)
    assert len(kernel.launched) == 9 and kernel.launched[-1] == 16
    assert path.read_text() == good


def test_a_folder_that_cannot_be_written(tuning, tmp_path, fresh, monkeypatch):
    """Without a folder every process tunes for itself, and compiled kernels go to a temporary folder."""
    import triton

    (tmp_path / "cache").write_text("a file where the folder should be")
    tuner, kernel = tuning()
    tuner.run(5, grid=None)
    assert kernel.launched[-1] == 16
    triton_support.kernels()
    assert Path(triton.knobs.cache.dir).is_dir() and str(tmp_path) not in triton.knobs.cache.dir


def test_a_disk_that_is_full(tuning, monkeypatch):
    from triton.runtime.cache import FileCacheManager

    monkeypatch.setattr(FileCacheManager, "put", raising(OSError(28, "No space left on device")))
    tuner, kernel = tuning()
    tuner.run(5, grid=None)
    assert kernel.launched[-1] == 16


def test_two_processes_at_once(tuning, tmp_path):
    def work():
        for size in range(40):
            tuner, kernel = tuning()
            tuner.run(size, grid=None)
            assert kernel.launched[-1] == 16
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(files(tmp_path)) == 40 and all(len(json.loads(path.read_text())) == 8 for path in files(tmp_path))


def test_tuning_ends_after_thirty_seconds(tuning, tmp_path, monkeypatch):
    from models.ops.backends import triton_tuning

    tuner, kernel = tuning(seconds=2.5)
    for size in range(20):
        tuner.run(size, grid=None)
    assert triton_tuning.BUDGET.spent <= 30
    # eight for the first shape, and what fits into the rest for the second, whose best so far is taken and not kept
    assert len(kernel.launched) == 11 + 20 and len(files(tmp_path)) == 1
    # afterwards the first tiles
    assert kernel.launched[-1] == 64
    # the next process goes on
    monkeypatch.setattr(triton_tuning, "BUDGET", triton_tuning.Budget(30))
    tuner, kernel = tuning(seconds=2.5)
    for size in range(20):
        tuner.run(size, grid=None)
    assert len(files(tmp_path)) == 2


def test_tiles_that_do_not_run_are_never_the_choice(tuning, monkeypatch):
    """Not even when no time was left to measure another one."""
    from triton.runtime.errors import OutOfResources

    tuner, kernel = tuning(seconds=29)
    run = kernel.run

    def too_large(size, **meta):
        run(size, **meta)
        if meta["BLOCK"] == 64:
            raise OutOfResources(300, 200, "shared memory")

    kernel.run = too_large
    tuner.run(5, grid=None)
    assert kernel.launched[-1] == 128
