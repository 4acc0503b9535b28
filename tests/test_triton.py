"""The backends in Triton: `triton_cases.py` in its interpreter or on a GPU, and kernels compiled for three GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.ops import mixture_conv
from models.ops.backends import BACKENDS, available_backends, triton_calls, triton_support
from models.ops.cost import cheapest
from models.ops.geometry import geometry

ROOT = Path(__file__).parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# shared memory of one program on these GPUs, by compute capability
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
NEEDS = [True, True, True]


def call_of(batch, channels, c_out, k, size, n, stride=1, dtype=torch.float32):
    x = torch.empty(batch, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    alpha, cells = torch.empty(batch, k * k, n, dtype=dtype), torch.empty(n, c_out, channels, 1, 1, dtype=dtype)
    strides = [stride, stride]
    return x, alpha, cells, geometry(x.shape, alpha.shape, cells.shape, [k, k], strides, [k // 2] * 2, [1, 1], 1)


@pytest.mark.parametrize("where", ["interpreter", "cuda"])
def test_cases(where):
    pytest.importorskip("triton")
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if where == "interpreter" else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_cases.py"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr


def test_a_gpu_that_is_not_there(monkeypatch):
    """A program can be made for a GPU where there is none."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    triton_support._works.cache_clear()
    geo = call_of(2, 16, 16, 3, 8, 4)[3]
    assert not BACKENDS["triton"].available(geo, torch.float32, "cuda")
    assert cheapest(geo, available_backends(geo, torch.float32, "cuda"), 4, "cuda") in BACKENDS
    monkeypatch.undo()
    triton_support._works.cache_clear()


# --- compiling for GPUs that are not here -----------------------------------------------------------------------------


class Driver:
    """What compiling asks of a driver."""

    def __init__(self, arch):
        self.arch, self.utils = arch, self

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED[self.arch]}


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A function that compiles what a call would launch, and lists (kernel, configuration, shared memory)."""
    pytest.importorskip("triton")
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile(arch, name, shape, every):
        results = []

        def run(self, *args, grid, warmup, **kwargs):
            self.nargs = dict(zip(self.arg_names, args))
            configs = self.prune_configs(kwargs)
            assert len(configs) > 1
            for config in configs if every else configs[-1:]:
                kernel = self.fn.run(*args, grid=grid, warmup=True, **kwargs, **config.all_kwargs())
                assert all(0 < n < 1 << 31 for n in grid({**self.nargs, **kwargs, **config.kwargs}))
                results.append((self.base_fn.__name__, config, kernel))

        monkeypatch.setattr(Autotuner, "run", run)
        monkeypatch.setattr(driver, "_active", Driver(arch))
        precision = "tf32" if name == "tf32" else "ieee"
        monkeypatch.setattr(triton_calls, "_precision", lambda backend: precision)
        x, alpha, cells, geo = call_of(*shape, dtype=DTYPES[name])
        for backend in ("triton", "triton_fused"):
            forward, backward = BACKENDS[backend].forward, BACKENDS[backend].backward
            y = forward(x, alpha, cells, geo)
            dx, dalpha, dcells = backward(
                y, x, alpha, cells, geo, NEEDS if backend == "triton" else [True, False, False]
            )
            assert y.shape[1] == geo.c_out and dx.shape == x.shape
        return results

    yield compile


def check(results, arch):
    assert {name for name, *_ in results} == {
        "assemble", "convolve", "kernel_gradient", "multiply", "mix_and_convolve"
    }  # fmt: skip
    for name, config, kernel in results:
        assert kernel.metadata.shared <= SHARED[arch], f"{name}: {config}"


# batch, input and output channels, kernel, size, cells, stride: ResNet's, with odd numbers, and with ones
SHAPES = {
    "even": (16, 256, 128, 3, 14, 27),
    "strided": (16, 64, 256, 1, 14, 100, 2),
    "odd": (3, 33, 17, 3, 7, 5, 2),
    "one": (1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize(("arch", "name", "shape"), [(90, "bf16", "even"), (80, "fp16", "odd"), (90, "tf32", "one")])
def test_kernels_compile(compiled, arch, name, shape):
    check(compiled(arch, name, SHAPES[shape], False), arch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"), [*((name, "even") for name in DTYPES), *(("bf16", shape) for shape in SHAPES if shape != "even")]
)
@pytest.mark.parametrize("arch", SHARED)
def test_every_choice_of_tiles_compiles(compiled, arch, name, shape):
    check(compiled(arch, name, SHAPES[shape], True), arch)


def assembled(kernel, arch, folder):
    """Registers of a thread and bytes that do not fit into them, from NVIDIA's assembler, which comes with Triton."""
    nvidia = pytest.importorskip("triton.backends.nvidia.compiler")
    try:
        assembler = nvidia.get_ptxas(arch).path
    except RuntimeError as error:
        pytest.skip(f"there is no ptxas for compute capability {arch / 10}: {error}")
    source = folder / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)[1]
    command = [assembler, "-v", f"--gpu-name={target}", str(source), "-o", str(folder / "kernel.cubin")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", told)))
    return int(re.search(r"Used (\d+) registers", told)[1]), spilled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "tf32"])
@pytest.mark.parametrize("arch", SHARED)
def test_registers_and_shared_memory(compiled, arch, name, tmp_path):
    """Prints what a program of every kernel and choice of tiles takes on a GPU; `-s` shows it."""
    lines, spills = [], {}
    for kernel_name, config, kernel in compiled(arch, name, SHAPES["even"], True):
        registers, spilled = assembled(kernel, arch, tmp_path)
        tiles = " ".join(f"{key.removeprefix('BLOCK_')}={value}" for key, value in config.kwargs.items())
        lines.append(
            f"{arch / 10} {name} {kernel_name} {tiles} warps={config.num_warps} stages={config.num_stages}: "
            f"{registers} registers, {spilled} bytes spilled, {kernel.metadata.shared} bytes of shared memory"
        )
        assert registers <= 255 and kernel.metadata.shared <= SHARED[arch], lines[-1]
        spills.setdefault(kernel_name, []).append(spilled)
    print("\n" + "\n".join(dict.fromkeys(lines)))
    # without time for tuning a kernel takes its first tiles, which must fit: observed are at most 8 bytes (convolve in
    # tf32 on 10.0), where other tiles of the fused kernel spill 208
    assert all(each[0] <= 16 for each in spills.values()), spills


def test_another_batch_compiles_nothing(compiled):
    """Sizes that change with the batch are neither constants nor tested for divisibility.

    "multiply" alone asks whether its inner size is a multiple of 16, to load whole vectors along it.
    """

    def hashes(batch):
        results = compiled(90, "bf16", (batch, 32, 32, 3, 8, 9), False)
        return {kernel.hash for name, _, kernel in results if name != "multiply"}

    assert hashes(6) == hashes(32)


def test_tensor_cores_and_wide_copies_are_used(compiled):
    """Where channels are a multiple of 16, tiles are copied 16 bytes at a time while others are multiplied."""
    for name, config, kernel in compiled(90, "bf16", SHAPES["even"], False):
        ptx = kernel.asm["ptx"]
        assert "wgmma.mma_async" in ptx or "mma.sync" in ptx, f"{name}: {config}"
        assert "cp.async.cg.shared.global" in ptx, f"{name}: {config}"


# --- where they are available -----------------------------------------------------------------------------------------


def test_triton_is_imported_when_it_is_needed():
    code = "import sys, models.ops; print('triton' in sys.modules, 'models.ops.backends.triton_kernels' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_not_available_on_the_cpu():
    x, alpha, cells, geo = call_of(2, 4, 4, 3, 5, 3)
    assert not BACKENDS["triton"].available(geo, x.dtype, "cpu")
    with pytest.raises(ValueError, match="backend 'triton' cannot evaluate"):
        mixture_conv(x, alpha, cells, (3, 3), padding=1, backend="triton")


@pytest.mark.parametrize("change", ["nothing", "float64", "not installed", "groups", "window", "size"])
def test_what_is_not_available(change, monkeypatch):
    monkeypatch.setattr(triton_support, "_interpreted", lambda: True)
    monkeypatch.setattr(triton_support, "installed", lambda: change != "not installed")
    x, _, _, geo = call_of(2, 4, 4, 3, 5, 3)
    if change == "groups":
        geo = geometry(x.shape, (2, 9, 3), (3, 4, 1, 1, 1), [3, 3], [1, 1], [1, 1], [1, 1], 4)
    if change == "window":
        geo = geometry(x.shape, (2, 1, 3), (3, 4, 4, 3, 3), [3, 3], [1, 1], [1, 1], [1, 1], 1)
    if change == "size":
        geo = geometry((1, 4, 1 << 15, 1 << 15), (1, 9, 3), (3, 4, 4, 1, 1), [3, 3], [2, 2], [1, 1], [1, 1], 1)
    dtype = torch.float64 if change == "float64" else torch.float32
    assert BACKENDS["triton"].available(geo, dtype, "cpu") == (change == "nothing")


def test_never_chosen_on_the_cpu():
    for shape in SHAPES.values():
        assert not cheapest(call_of(*shape)[-1], list(BACKENDS), 4, "cpu").startswith("triton")
