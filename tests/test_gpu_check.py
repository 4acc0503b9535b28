"""The command for GPUs: its dry run on the CPU, and the faults that it must find."""

import copy
import csv
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import gpu_check
import pytest
import torch
from helpers import ROOT, finish
from timm.utils import ModelEmaV3

from checkpoints import state
from gpu_checks import costs, timing, training, writing
from gpu_checks.cases import Shapes, layer_shapes, networks
from gpu_checks.report import Report
from models.ops import cost, fitted_costs
from models.ops.backends import BACKENDS, available_backends
from models.ops.cost import work

# what a GPU machine's own Python need not have
MISSING = ("mmcv", "mmengine", "mmdet", "tensorboardX", "onnx", "onnxruntime", "pycocotools")
WITHOUT_TRITON = ("--skip", "triton", "triton_fused")
SHAPES = Shapes((8, 64, 14, 14), (8, 9, 6), (6, 64, 64, 1, 1), (3, 3), (1, 1), (1, 1), (1, 1), 1)


def check(*arguments, before=""):
    """Run the dry run in a process of its own, in Triton's interpreter; `before` is code that runs first."""
    code = f"import sys; sys.path.insert(0, 'scripts')\n{before}\nimport gpu_check\n"
    code += f"sys.exit(gpu_check.main(['--dry_run', *{arguments!r}]))"
    return finish([sys.executable, "-c", code], 500, {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


def refused(capsys, *arguments):
    """The failures that a dry run in this process prints; Triton has no interpreter here."""
    assert gpu_check.main(["--dry_run", *arguments]) == 1
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    summary = next(line for line in lines if "checks passed" in line)
    failures = [line.removeprefix("FAILED ") for line in lines[lines.index(summary) :] if line.startswith("FAILED ")]
    assert f"{len(failures)} failed" in summary
    return failures


# --- the dry run ------------------------------------------------------------------------------------------------------


def test_dry_run(tmp_path):
    """All parts, without the packages that a GPU machine may lack; 45 s on a free core."""
    block = f"sys.modules.update(dict.fromkeys({MISSING!r}))"
    result = check("--output", str(tmp_path), before=block)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout and ", 0 failed, in" in result.stdout
    for backend in BACKENDS:
        assert f"  {backend}: " in result.stdout and f"{backend}: not checked" not in result.stdout

    page = (tmp_path / "gpu.md").read_text()
    assert "A dry run on the CPU: its times say nothing" in page and "test_resnet, KW 1x" in page
    layers = list(csv.DictReader((tmp_path / "gpu_layers.csv").open()))
    assert {row["backend"] for row in layers} >= {"static", "grouped", "batched", "triton"}
    for row in layers:
        for way in ("forward", "backward"):
            low, middle, high = (float(row[f"{way}_{q}_us"]) for q in ("quartile_1", "median", "quartile_3"))
            assert 0 < low <= middle <= high
    rows = list(csv.DictReader((tmp_path / "gpu_networks.csv").open()))
    assert {row["contender"] for row in rows} == {"static", "naive", "ours"} and len(rows) == 2 * 2 * 3
    assert "grouped" in json.loads((tmp_path / "cuda_costs.json").read_text())["cpu"]["2"]
    assert not fitted_costs.PATH.exists() or "cpu" not in fitted_costs.read_costs(fitted_costs.PATH)


def test_without_a_gpu():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "scripts/gpu_check.py"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: no GPU found") and len(result.stderr.splitlines()) == 1


def test_an_unknown_backend(capsys):
    assert gpu_check.main(["--dry_run", "--skip", "cudnn"]) == 2
    assert capsys.readouterr().err.startswith("error: --skip cudnn: the backends are grouped")


def test_a_command_that_hangs():
    """It shows where, and ends."""
    code = (
        "import sys, time; sys.path.insert(0, 'scripts')\nimport gpu_check\n"
        "def hanging(*arguments):\n    time.sleep(100)\n"
        "gpu_check.run, gpu_check.STUCK = hanging, 0.01\n"
        "gpu_check.main(['--dry_run'])"
    )
    result = finish([sys.executable, "-c", code], 60)
    assert result.returncode == 1 and "Timeout" in result.stderr and "in hanging" in result.stderr


def test_checks_that_were_not_made(capsys):
    """There was no time: nothing failed, and still not all is well."""
    assert gpu_check.main(["--dry_run", "--only", "synchronisations", "--minutes", "0"]) == 1
    assert "0 checks passed, 0 failed, 3 were not made for lack of time" in capsys.readouterr().out


# --- planted faults ---------------------------------------------------------------------------------------------------


def test_a_tensor_on_the_cpu_is_found(monkeypatch, capsys):
    def forward(x, *rest, own=BACKENDS["mixed"].forward):
        y = own(x, *rest)
        return y + torch.zeros(y.shape[-1], dtype=y.dtype)

    monkeypatch.setitem(BACKENDS, "mixed", replace(BACKENDS["mixed"], forward=forward))
    (line,) = refused(capsys, "--only", "operators", *WITHOUT_TRITON)
    assert line.startswith("backend mixed, devices: ") and "cpu" in line


def test_a_number_read_from_the_gpu_is_found(monkeypatch, capsys):
    def backward(dy, *rest, own=BACKENDS["grouped"].backward):
        float(dy.sum())
        return own(dy, *rest)

    monkeypatch.setitem(BACKENDS, "grouped", replace(BACKENDS["grouped"], backward=backward))
    (line,) = refused(capsys, "--only", "operators", *WITHOUT_TRITON)
    assert line.startswith("backend grouped, devices: ") and "_local_scalar_dense" in line


def test_a_wrong_gradient_is_found(monkeypatch, capsys):
    def backward(*arguments, own=BACKENDS["batched"].backward):
        dx, dalpha, dcells = own(*arguments)
        return dx, dalpha * 1.001, dcells

    monkeypatch.setitem(BACKENDS, "batched", replace(BACKENDS["batched"], backward=backward))
    lines = refused(capsys, "--only", "operators", *WITHOUT_TRITON)
    assert all(line.startswith("backend batched, ") and "gradient of alpha differs by" in line for line in lines)
    assert any("float32" in line for line in lines)


def test_a_wrong_mask_is_found():
    """A kernel of Triton that leaves out the last input channel."""
    plant = """
import importlib.util
from models.ops.backends import triton_support
spec = importlib.util.find_spec("models.ops.backends.triton_kernels")
text = open(spec.origin).read()
right, wrong = "mask=(at >= 0)[:, None] & (k < k_size)[None, :]", "mask=(at >= 0)[:, None] & (k < k_size - 1)[None, :]"
assert right in text
import tempfile
# Triton reads the source of a kernel from its file
file = tempfile.NamedTemporaryFile("w", suffix=".py")
file.write(text.replace(right, wrong)), file.flush()
spec = importlib.util.spec_from_file_location("models.ops.backends.faulty", file.name)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
triton_support.kernels = lambda: module
"""
    others = [name for name in BACKENDS if not name.startswith("triton")]
    result = check("--only", "operators", "--skip", *others, before=plant)
    assert result.returncode == 1, result.stdout + result.stderr
    failures = [line for line in result.stdout.splitlines() if line.startswith("FAILED ")]
    assert failures and all(line.startswith("FAILED backend triton, ") for line in failures), result.stdout
    assert any("output differs by" in line for line in failures)


def test_a_synchronisation_is_found(monkeypatch, capsys):
    def update(self, *arguments, own=ModelEmaV3.update):
        own(self, *arguments)
        float(next(self.parameters()).sum())

    monkeypatch.setattr(ModelEmaV3, "update", update)
    (line,) = refused(capsys, "--only", "synchronisations")
    assert line.startswith("synchronisation in a step, kw, bf16") and "waits for it" in line


def test_random_numbers_that_are_not_restored_are_found(monkeypatch, capsys):
    monkeypatch.setattr(state, "_restore_random", lambda checkpoint, live: None)
    (line,) = refused(capsys, "--only", "resume")
    assert line.startswith("resume: the random generators differ after a resume")


def test_a_layer_that_differs_on_the_gpu_is_found(monkeypatch, capsys):
    """A norm that adds 1e-2 to the variance, where the CPU adds 1e-5."""
    own = training.step_of

    def step_of(start, setting, *rest):
        start = copy.deepcopy(start)
        for module in start.modules():
            if setting is training.FLOAT32 and isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 1e-2
        return own(start, setting, *rest)

    monkeypatch.setattr(training, "step_of", step_of)
    monkeypatch.setattr(training, "_plan", lambda dry, skip: [("we", training.FLOAT32)])
    (line,) = refused(capsys, "--only", "methods")
    assert line.startswith("we, float32: the update differs by")


def test_a_wrong_average_is_found(monkeypatch, capsys):
    monkeypatch.setattr(training, "_plan", lambda dry, skip: [("we", training.BF16)])
    monkeypatch.setattr(ModelEmaV3, "update", lambda *arguments: None)
    (line,) = refused(capsys, "--only", "methods")
    assert line.startswith("we, bf16") and "the averaged weights are not the average" in line


def test_a_backend_that_failed_is_not_timed():
    report, size = Report("cpu", 1, dry=True), timing.Size(2, 32)
    report.begin("", 1)
    (layer,) = timing.layers_of({"one": [(2, SHAPES)], "two": [(1, SHAPES)]}, size)
    timing.time_layers(report, [layer], size, {"batched"})
    assert layer.count == 3 and "batched" not in layer.times and {"static", "grouped"} <= set(layer.times)


def test_layers_that_need_too_much_memory_are_left_empty(monkeypatch):
    def forward(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(BACKENDS, "grouped", replace(BACKENDS["grouped"], forward=forward))
    report, size = Report("cpu", 1, dry=True), timing.Size(2, 32)
    report.begin("", 1)
    layers = timing.layers_of({"one": layer_shapes(networks(True)["test_resnet, ODConv 4x"], 32)[:1]}, size)
    timing.time_layers(report, layers, size, {"triton", "triton_fused"})
    assert report.ok and "grouped" not in layers[0].times and "batched" in layers[0].times


def test_what_was_not_measured_is_empty(tmp_path):
    """There was no time for any network, nor for the layer."""
    report, size = Report("cpu", 1, dry=True), timing.Size(2, 32)
    layers = timing.layers_of({"first": [(1, SHAPES)]}, size)
    writing.write_page(tmp_path / "gpu.md", report, {}, ["first", "second"], layers, size)
    page = (tmp_path / "gpu.md").read_text().splitlines()
    assert "| second |" + "  |" * len(writing.GOALS) in page
    assert f"| 1 in first | {SHAPES.of_batch(2)} |" in page


# --- fitted costs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU of compute capability 9.0, of which nothing but that is asked, and a file of costs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(fitted_costs, "PATH", tmp_path / "cuda_costs.json")
    costs.forget_choices()
    yield fitted_costs.PATH
    monkeypatch.undo()
    costs.forget_choices()


PORTABLE = ("grouped", "batched", "mixed", "outputs")


def test_costs_of_a_gpu_are_used(gpu):
    geo, half = SHAPES.geometry(True), timing.Size()
    present = [cost.estimate(name, geo, 2, "cuda") for name in PORTABLE]
    table = {name: [[2.0] * len(work(name, geo, 2))] * 2 for name in PORTABLE}
    table["grouped"] = [[0.0] * len(way) for way in table["grouped"]]
    costs.write_costs(gpu, "8.0", half, table)
    # another GPU's
    assert [cost.estimate(name, geo, 2, "cuda") for name in PORTABLE] == present
    costs.write_costs(gpu, "9.0", half, table)
    assert cost.estimate("batched", geo, 2, "cuda") == pytest.approx(2 * sum(work("batched", geo, 2)))
    assert cost.cheapest(geo, list(PORTABLE), 2, "cuda") == "grouped"
    # numbers of four bytes were not fitted, and neither was the CPU
    assert cost.estimate("grouped", geo, 4, "cuda") > 0 and cost.estimate("grouped", geo, 2, "cpu") > 0
    assert set(fitted_costs.read_costs(gpu)) == {"8.0", "9.0"}


def test_costs_that_choose_no_better_are_not_kept(gpu, monkeypatch):
    """Times that are those of the present costs."""
    report, layers = Report("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for channels in (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384):
        shapes = replace(SHAPES, x=(8, channels, 14, 14), cells=(6, 64, channels, 1, 1))
        layer = timing.Layer(shapes, shapes.geometry(True), [("one", 1)])
        for name in ("grouped", "batched", "mixed"):
            forward, backward = (cost.estimate(name, layer.geo, 2, "cuda", way) for way in (False, True))
            layer.times[name] = ((forward,) * 3, (backward,) * 3)
        layers.append(layer)
    assert costs.fit_costs(report, layers, timing.Size()) is None
    assert any("the present costs are kept" in line for line in report.lines)
    for layer in layers:
        # a GPU on which "mixed" is twice as fast as the present costs make the best of the others
        least = [min(layer.times[name][way][1] for name in ("grouped", "batched")) / 2 for way in (0, 1)]
        layer.times["mixed"] = tuple((value,) * 3 for value in least)
    table = costs.fit_costs(report, layers, timing.Size())
    costs.write_costs(gpu, "9.0", timing.Size(), table)
    chosen = [timing.chosen_backends(layer, torch.bfloat16, "cuda") for layer in layers]
    assert sum(names.count("mixed") for names in chosen) > len(layers)


def test_work_grows_with_the_layer():
    """Four times the batch is more work, and at most four times as much; Triton pads the definition's."""
    geo, larger = SHAPES.geometry(True), SHAPES.of_batch(32).geometry(True)
    mix = 8 * 9 * 64 * 64 * 6 / 1e9
    convolve = mix / 6 * 14 * 14
    for name in BACKENDS:
        amounts, grown = work(name, geo, 4), work(name, larger, 4)
        assert all(0 <= a <= b <= 4 * a * 1.000001 for a, b in zip(amounts, grown, strict=True)), name
        assert sum(grown) > sum(amounts), name
    # four bytes take Triton four times as long; 6 cells are padded to 16 or more, and 196 positions to whole tiles
    for name, again in (("triton", 1), ("triton_fused", 4)):
        mixed, convolved, *_ = work(name, geo, 2)
        assert mixed >= again * mix * 16 / 6 and convolve <= convolved <= 8 * convolve, name


def test_costs_in_the_project_fit_the_model_of_costs():
    """A cost for every amount of work."""
    for by_size in fitted_costs.read_costs(fitted_costs.PATH).values():
        for item_bytes, table in by_size.items():
            for name, both in table.items():
                amounts = work(name, SHAPES.geometry(True), int(item_bytes))
                assert [len(way) for way in both] == [len(amounts)] * 2


def test_layers_are_those_of_the_networks():
    """Recorded from tensors without data, which take no time."""
    found = layer_shapes(networks(True)["test_resnet, KW 1x"], 32)
    assert sum(count for count, _ in found) == 12 and all(shapes.x[0] == 1 for _, shapes in found)
    assert all("grouped" in available_backends(shapes.geometry(True), torch.float32, "cpu") for _, shapes in found)
    module = importlib.import_module("gpu_checks.cases")
    assert len(networks(False)) == 4 * len(module.BACKBONES)
