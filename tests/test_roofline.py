"""The roofline estimate, which chooses backends on GPUs that were not measured."""

import dataclasses
import itertools
import math

import pytest
import roofline_table
import torch

from models.ops import cost
from models.ops.backends import BACKENDS, available_backends
from models.ops.cost import cheapest, estimate
from models.ops.geometry import geometry
from models.ops.peaks import CPU, GPUS, gpu_peak
from models.ops.roofline import roofline, steps

CONFIGS = {
    "resnet50": "configs/resnet50/kw1x_resnet50.json",
    "mobilenetv2": "configs/mobilenetv2_100/kw1x_mobilenetv2_100.json",
}
# what works on a GPU without Triton
PORTABLE = ["grouped", "batched", "mixed"]


def layer(channels, c_out, k, size, n, batch=128):
    shapes = (batch, channels, size, size), (batch, k * k, n), (n, c_out, channels, 1, 1)
    return geometry(*shapes, [k, k], [1, 1], [k // 2] * 2, [1, 1], 1, True)


@pytest.fixture
def unmeasured(monkeypatch):
    """Estimates for a compute capability, as if nothing was fitted."""
    monkeypatch.setattr(cost, "fitted_costs", lambda capability, item_bytes: None)

    def of(capability):
        monkeypatch.setattr(cost, "capability", lambda: capability)

    of((8, 0))
    return of


@pytest.fixture(scope="module", params=CONFIGS)
def layers(request):
    """The calls of a network at batch 8, and its name."""
    calls = roofline_table.layers(CONFIGS[request.param], 8, 224)
    return request.param, [(count, dataclasses.replace(geo, last=False)) for count, geo in calls]


# of all pairs of backends of a layer, the share that roofline and measured costs put in the same order, and the time
# that its choices take by the measured costs over the least time
AGREEMENT = {
    ("resnet50", 4): (0.9, 1.06),
    ("resnet50", 2): (0.89, 1.08),
    ("mobilenetv2", 4): (0.89, 1.07),
    ("mobilenetv2", 2): (0.83, 1.25),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("item", [4, 2], ids=["float32", "bfloat16"])
def test_order_of_preference_is_that_of_measured_costs(layers, item, backward):
    """With the peaks of a CPU, the roofline orders backends as the costs that were measured on one."""
    name, calls = layers
    agree, chosen, best = [], 0.0, 0.0
    for count, geo in calls:
        names = available_backends(geo, {4: torch.float32, 2: torch.bfloat16}[item], "cpu")
        # the roofline does not tell "streamed" from other compiled backends: it differs in how it uses the caches
        names = [backend for backend in names if backend != "streamed"]
        measured = {backend: estimate(backend, geo, item, "cpu", backward) for backend in names}
        guessed = {backend: roofline(backend, geo, item, CPU, False, backward) for backend in names}
        agree += [(measured[a] < measured[b]) == (guessed[a] < guessed[b]) for a, b in itertools.combinations(names, 2)]
        chosen += count * measured[min(guessed, key=guessed.get)]
        best += count * min(measured.values())
    share, loss = sum(agree) / len(agree), chosen / best
    print(f"{name}, {item} bytes: {share:.3f} of {len(agree)} pairs agree, the choices take {loss:.3f} times the least")
    least, most = AGREEMENT[name, item]
    assert share >= least and loss <= most


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gpu", [False, True])
def test_every_backend_computes_the_products_of_the_definition(backend, gpu):
    """Mixing and convolving is the least work; a backward pass has at least two and a half times as much."""
    geo = layer(64, 64, 3 if backend in ("fused", "winograd", "triton", "grouped", "batched") else 1, 8, 5, 16)
    if backend in ("mixed", "outputs"):
        least = geo.batch * geo.positions * geo.c_out * geo.c_in * geo.n
    elif backend == "winograd":
        # products of 16 spectra of 2 x 2 outputs
        least = geo.batch * geo.c_out * geo.c_in * (9 * geo.n + 4 * geo.positions)
    else:
        least = geo.batch * geo.taps * geo.c_out * geo.c_in * (geo.n + geo.positions)
    forward, backward = (sum(step.macs for step in steps(backend, geo, 2, gpu, b)) for b in (False, True))
    assert least <= forward <= 1.3 * least and 1.9 * forward <= backward <= 3.2 * forward


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_choice_on_a_gpu(unmeasured, capability, backward):
    unmeasured(capability)
    with_triton = [*PORTABLE, "triton", "triton_fused"]
    # where the kernels do not dominate, Triton's implicit product moves least
    assert cheapest(layer(64, 64, 3, 56, 87), with_triton, 2, "cuda", backward) == "triton"
    assert cheapest(layer(128, 128, 3, 28, 104), with_triton, 2, "cuda", backward) == "triton"
    # without Triton: products of matrices where patches are views or maps are small, else a grouped convolution
    for channels, c_out, size in ((64, 256, 56), (256, 64, 56), (1024, 256, 14), (512, 2048, 7)):
        assert cheapest(layer(channels, c_out, 1, size, 60), PORTABLE, 2, "cuda", backward) == "batched"
    assert cheapest(layer(512, 512, 3, 7, 47), PORTABLE, 2, "cuda", backward) in ("batched", "mixed")
    assert cheapest(layer(64, 64, 3, 56, 87), PORTABLE, 2, "cuda", backward) == "grouped"


def test_older_and_unlisted_gpus_have_peaks():
    assert gpu_peak((9, 0)) is GPUS[9, 0] and gpu_peak((8, 7)) is GPUS[8, 6]
    assert gpu_peak((13, 0)) is GPUS[12, 0] and gpu_peak((6, 1)) is GPUS[7, 0]


def test_larger_peaks_make_less_time():
    for backend in ("grouped", "batched", "mixed", "triton", "triton_fused"):
        for backward in (False, True):
            slow, fast = (
                roofline(backend, layer(256, 256, 3, 14, 100), 2, GPUS[key], True, backward) for key in ((8, 0), (9, 0))
            )
            assert 0 < fast < slow


def test_a_fitted_table_beats_the_roofline(unmeasured, monkeypatch):
    geo = layer(64, 64, 3, 56, 87)
    assert cheapest(geo, ["grouped", "mixed", "triton"], 2, "cuda") == "triton"
    fitted = {"grouped": [(1,) * 9] * 2, "mixed": [(0,) * 5] * 2}
    monkeypatch.setattr(cost, "fitted_costs", lambda *key: fitted if key == ((8, 0), 2) else None)
    assert cheapest(geo, ["grouped", "mixed", "triton"], 2, "cuda") == "mixed"
    assert estimate("triton", geo, 2, "cuda") == math.inf
    # other data types and GPUs are still estimated
    assert cheapest(geo, ["grouped", "mixed", "triton"], 4, "cuda") == "triton"
    unmeasured((9, 0))
    assert cheapest(geo, ["grouped", "mixed", "triton"], 2, "cuda") == "triton"


def test_the_table_in_results_is_what_the_script_writes(tmp_path):
    roofline_table.main(["--out", str(tmp_path / "table.md")])
    written = (roofline_table.Path(__file__).parents[1] / "results/gpu_choice.md").read_text()
    assert (tmp_path / "table.md").read_text() == written
