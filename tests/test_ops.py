"""Every backend of the mixture convolution against its naive definition."""

import importlib
import math
import platform

import pytest
import torch
from mixture_calls import definition, make_call, with_gradients
from tolerance import assert_same, difference

from gpu_checks.cases import DEPTHWISE
from models.ops import mixture_conv, mixture_conv_naive
from models.ops.backends import BACKENDS, available_backends, compiled
from models.ops.cost import cheapest
from models.ops.geometry import geometry

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# those in Triton are in triton_cases.py
ON_CPU = [backend for backend in BACKENDS if not backend.startswith("triton")]


def fitting(backend, tensors, arguments):
    kernel, _, stride, padding, dilation, groups = arguments
    geo = geometry(*(t.shape for t in tensors), kernel, stride, padding, dilation, groups)
    if backend is not None and backend not in available_backends(geo, tensors[0].dtype, "cpu"):
        pytest.skip("this backend cannot evaluate such a convolution")


def assert_equals_naive(backend, tensors, arguments):
    """Output and gradients are those of the definition in double precision."""
    values = with_gradients(mixture_conv, tensors, arguments, backend=backend)
    for value, expected in zip(values, definition(tensors, arguments), strict=True):
        assert_same(value, expected)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("seed", range(60))
def test_backend_equals_naive(backend, seed):
    tensors, arguments = make_call(seed, backend=backend)
    fitting(backend, tensors, arguments)
    assert_equals_naive(backend, tensors, arguments)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("seed", range(60, 90))
def test_backend_equals_naive_in_float32(backend, seed):
    tensors, arguments = make_call(seed, torch.float32, backend)
    fitting(backend, tensors, arguments)
    assert_equals_naive(backend, tensors, arguments)


# batch, ci, co, Gi, Go, groups, kernel, size: tiles of 16 and 32 channels, chunks of 64, and what is left of them
TILES = [
    (9, 16, 32, 1, 1, 1, 3, (7, 7)),
    (3, 33, 70, 2, 1, 1, 3, (5, 4)),
    (2, 130, 48, 1, 2, 1, 1, (3, 3)),
    (8, 64, 129, 1, 1, 2, 3, (2, 2)),
    (17, 40, 24, 2, 2, 2, 1, (13,)),
    (1, 72, 80, 1, 1, 1, 2, (4, 3, 5)),
    (2, 20, 9, 2, 3, 2, 1, (19, 21)),
    (1, 130, 37, 1, 2, 1, 1, (300,)),
]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", TILES, ids=str)
def test_tiles(backend, stride, shape):
    batch, ci, co, g_in, g_out, groups, k, size = shape
    dims = len(size)
    x, cells = torch.randn(batch, groups * g_in * ci, *size), torch.randn(5, co, ci, *[1] * dims)
    alpha = torch.randn(batch, k**dims * groups * g_out * g_in, 5)
    tensors = [t.double().requires_grad_() for t in (x, alpha, cells)]
    arguments = [k] * dims, None, *([v] * dims for v in (stride, k // 2, 1)), groups
    fitting(backend, tensors, arguments)
    assert_equals_naive(backend, tensors, arguments)


@pytest.mark.parametrize("backend", [backend for backend in ON_CPU if backend in ("grouped", "depthwise")])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("window", ["taps", "whole"])
@pytest.mark.parametrize("shape", DEPTHWISE, ids=str)
def test_depthwise(backend, last, window, shape):
    batch, channels, multiplier, co, kernel, stride, padding, dilation, size = shape
    x, dims = torch.randn(batch, channels, *size), len(size)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    taps = 1 if window == "whole" else math.prod(kernel)
    cells = torch.randn(5, co, 1, *(kernel if window == "whole" else [1] * dims))
    alpha = torch.randn(batch, taps * channels * multiplier // co, 5)
    tensors = [t.double().requires_grad_() for t in (x, alpha, cells)]
    arguments = (list(kernel), None, list(stride), list(padding), list(dilation), channels)
    assert_equals_naive(backend, tensors, arguments)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one kind of vectors")
@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_every_width_of_vectors(capability, monkeypatch):
    if capability not in ("DEFAULT", torch.backends.cpu.get_cpu_capability(), "AVX2"):
        pytest.skip(f"this processor has no {capability}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert compiled.library("fused.cpp", torch.float64).lanes() == {"DEFAULT": 2, "AVX2": 4, "AVX512": 8}[capability]
    for shape in TILES:
        test_tiles("fused", 1, shape)
        if shape[6] == 3 and len(shape[7]) == 2:
            test_tiles("winograd", 1, shape)
        if shape[6] == 1:
            test_tiles("pointwise", 1, shape)
    for shape in DEPTHWISE:
        test_depthwise("depthwise", shape[2] == 1, "taps", shape)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(15, 15), (7, 7), (3, 2)], ids=str)
@pytest.mark.parametrize("backend", ["depthwise", "pointwise"])
def test_numbers_converted_in_registers(backend, size, last):
    """bfloat16 is read exactly, and an output is rounded as torch rounds the one in float32."""
    depthwise = backend == "depthwise"
    x = torch.randn(3, 40, *size).bfloat16()
    # too large for bfloat16 after the convolution, too small for a normal number, and no numbers at all
    x[0, :, 0] = torch.tensor([3e38, -3e38, 1e-39, math.inf, math.nan]).bfloat16().repeat(8)[:, None]
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    alpha = torch.randn(3, 18 if depthwise else 2, 6).bfloat16()
    cells = torch.randn(6, 20, 1 if depthwise else 40, 1, 1)
    window = ([3, 3], None, [2, 2], [1, 1], [1, 1], 40) if depthwise else ([1, 1], None, [1, 1], [0, 0], [1, 1], 1)
    fitting(backend, (x, alpha, cells), window)
    y = mixture_conv(x, alpha, cells, *window, backend=backend)
    expected = mixture_conv(x.float(), alpha.float(), cells, *window, backend=backend)
    assert expected.isnan().any() and not expected.isnan().all()
    assert y.stride() == expected.stride()
    # the bits, so that signs of zeros count; which NaN it is does not
    y, expected = (torch.where(t.isnan(), math.nan, t.bfloat16()).view(torch.int16) for t in (y, expected))
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("backend", "x", "alpha", "cells", "kernel", "groups"),
    [
        ("fused", (8, 64, 5, 5), (8, 18, 6), (6, 128, 32, 1, 1), 3, 1),
        ("pointwise", (3, 64, 15, 15), (3, 2, 6), (6, 300, 32, 1, 1), 1, 1),
        # every other call goes through the warehouse backwards
        ("streamed", (2, 64, 15, 15), (2, 18, 6), (6, 128, 32, 1, 1), 3, 1),
        ("winograd", (3, 64, 15, 15), (3, 18, 6), (6, 128, 32, 1, 1), 3, 1),
        ("depthwise", (3, 40, 15, 15), (3, 18, 6), (6, 20, 1, 1, 1), 3, 40),
    ],
)
def test_compiled_backend_does_not_depend_on_the_number_of_threads(backend, x, alpha, cells, kernel, groups):
    tensors = [torch.randn(shape, requires_grad=True) for shape in (x, alpha, cells)]
    arguments = ([kernel] * 2, None, 1, kernel // 2, 1, groups)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(with_gradients(mixture_conv, tensors, arguments, backend=backend))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("compiler", "reason"), [(None, ""), ("/bin/false", "non-zero exit status")])
def test_without_a_compiler(compiler, reason, monkeypatch, recwarn):
    importlib.import_module("models.ops.mixture_conv")._plan.cache_clear()
    monkeypatch.setattr(compiled, "compiler", lambda: compiler)
    monkeypatch.setattr(compiled, "FLAGS", [*compiled.FLAGS, "-DNEVER_COMPILED"])
    tensors = [torch.randn(8, 256, 7, 7), torch.randn(8, 9, 20), torch.randn(20, 256, 256, 1, 1)]
    for _ in range(2):
        y = mixture_conv(*tensors, (3, 3), padding=1)
    assert_same(y, mixture_conv_naive(*tensors, (3, 3), padding=1))
    assert len(recwarn) == bool(compiler) and all(reason in str(w.message) for w in recwarn)
    with pytest.raises(ValueError, match="available: grouped, batched, mixed"):
        mixture_conv(*tensors, (3, 3), padding=1, backend="fused")
    importlib.import_module("models.ops.mixture_conv")._plan.cache_clear()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "shape", [(4, 32, 48, 3, 7, 1), (3, 24, 40, 1, 5, 1), (2, 16, 16, 5, 9, 1), (3, 24, 48, 3, 9, 24)], ids=str
)
def test_low_precision_is_as_exact_as_naive(backend, dtype, shape):
    batch, c_in, c_out, k, size, groups = shape
    x, cells = torch.randn(batch, c_in, size, size), torch.randn(12, 8, min(8, c_in // groups), 1, 1)
    alpha = torch.randn(batch, k * k * c_in // groups * c_out // cells[0].numel(), 12) / 12
    arguments = ([k, k], None, [1, 1], [k // 2] * 2, [1, 1], groups)
    fitting(backend, (x, alpha, cells), arguments)
    low = [t.to(dtype).requires_grad_() for t in (x, alpha, cells)]
    exact = definition(low, arguments)
    naive = with_gradients(mixture_conv_naive, low, arguments)
    ours = with_gradients(mixture_conv, low, arguments, backend=backend)
    for value, standard, expected in zip(ours, naive, exact, strict=True):
        assert value.dtype == dtype
        assert difference(value, expected) <= 1.5 * difference(standard, expected) + 1e-3


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 2, 1), (5, 2, 1), (5, 3, 2)])
def test_low_precision_of_kernels_larger_than_the_map(backend, groups, kernel, stride, size):
    """Cells with the kernel's extent, whose weights at the border see only padding: their gradient is zero."""
    x, cells = torch.randn(4, 16, size, size), torch.randn(3, 16, 16 // groups, kernel, kernel)
    tensors = [t.bfloat16().requires_grad_() for t in (x, torch.randn(4, 1, 3), cells)]
    arguments = [kernel] * 2, None, [stride] * 2, [kernel // 2] * 2, [1, 1], groups
    fitting(backend, tensors, arguments)
    assert_equals_naive(backend, tensors, arguments)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("seed", [3, 17, 29, 31])
def test_gradcheck(backend, seed):
    tensors, arguments = make_call(seed, backend=backend)
    fitting(backend, tensors, arguments)
    assert torch.autograd.gradcheck(lambda *t: mixture_conv(*t, *arguments, backend=backend), tensors, fast_mode=True)


@pytest.mark.parametrize("backend", ON_CPU)
def test_only_the_asked_gradients(backend):
    tensors, arguments = make_call(3, backend=backend)
    fitting(backend, tensors, arguments)
    reference = with_gradients(mixture_conv_naive, tensors, arguments)[1:]
    for i in range(3):
        only = [t.detach().requires_grad_(j == i) for j, t in enumerate(tensors)]
        y = mixture_conv(*only, *arguments, backend=backend)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert_same(torch.autograd.grad(y, only[i], dy)[0], reference[i])


@pytest.mark.parametrize("backend", [None, *ON_CPU])
@pytest.mark.parametrize("kernel", [1, 3])
def test_pieces(backend, kernel, monkeypatch):
    """Samples and output channels are worked off in pieces, whose last ones are smaller."""
    monkeypatch.setattr("models.ops.backends.batched.KERNEL_BYTES", 3000)
    monkeypatch.setattr("models.ops.backends.batched.PATCH_BYTES", 9000)
    monkeypatch.setattr("models.ops.backends.pointwise.KERNEL_BYTES", 3000)
    tensors = [torch.randn(5, 6, 5, 4), torch.randn(5, kernel**2 * 3 * 2, 4), torch.randn(4, 7, 3, 1, 1)]
    tensors = [t.double().requires_grad_() for t in tensors]
    arguments = ([kernel] * 2, None, [1, 1], [kernel // 2] * 2, [1, 1], 1)
    fitting(backend, tensors, arguments)
    assert_equals_naive(backend, tensors, arguments)


def test_nothing_assembled_is_kept():
    """The backward pass needs inputs only: a kernel per sample would be 64 times as much."""
    x, alpha = torch.randn(64, 16, 4, 4, requires_grad=True), torch.randn(64, 9, 4, requires_grad=True)
    cells, kept = torch.randn(4, 16, 16, 1, 1, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mixture_conv(x, alpha, cells, (3, 3), padding=1)
    assert sum(t.numel() for t in kept) == x.numel() + alpha.numel() + cells.numel()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("kernel", [1, 3])
def test_layout_of_the_input_is_kept(backend, groups, kernel):
    alpha, cells = torch.randn(2, kernel**2, 4), torch.randn(4, 5, 5 // groups, 1, 1)
    x, arguments = torch.randn(2, 5, 8, 8), ([kernel] * 2, None, [1, 1], [kernel // 2] * 2, [1, 1], groups)
    fitting(backend, (x, alpha, cells), arguments)
    y = mixture_conv(x, alpha, cells, *arguments, backend=backend)
    last = mixture_conv(x.to(memory_format=torch.channels_last), alpha, cells, *arguments, backend=backend)
    assert y.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    assert_same(last, y)


@pytest.mark.parametrize("backend", [None, "naive", *ON_CPU])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_output_may_be_changed_in_place(backend, last, groups, kernel):
    x = torch.randn(2, 8 * groups, 4, 5, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if last else x
    cells = torch.randn(3, 4, 8, kernel, kernel, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, torch.randn(2, 2 * groups, 3, dtype=torch.float64), cells)]
    arguments = (
        [kernel] * 2,
        torch.randn(8 * groups, dtype=torch.float64, requires_grad=True),
        1,
        kernel // 2,
        1,
        groups,
    )
    if backend != "naive":
        fitting(backend, tensors, ([kernel] * 2, None, [1, 1], [kernel // 2] * 2, [1, 1], groups))
    outcomes = []
    for inplace in (False, True):

        def activated(*call, inplace=inplace):
            return torch.nn.functional.silu(mixture_conv(*call, backend=backend), inplace=inplace)

        outcomes.append(with_gradients(activated, tensors, arguments))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    """The fake and autograd registrations agree with what the operator does."""
    x = torch.randn(3, 4, 6, 6, dtype=dtype, requires_grad=True)
    alpha, cells = torch.randn(3, 18, 5, dtype=dtype, requires_grad=True), torch.randn(5, 3, 4, 1, 1, dtype=dtype)
    for sample in (x, x.detach().to(memory_format=torch.channels_last).requires_grad_()):
        for bias in (None, torch.randn(6, dtype=dtype, requires_grad=True)):
            arguments = (sample, alpha, cells, bias, [3, 3], [2, 2], [1, 1], [1, 1], 1, "auto", False)
            torch.library.opcheck(torch.ops.kernelwarehouse.mixture_conv.default, arguments)


def test_autocast_decides_the_data_type():
    x, alpha, cells = torch.randn(2, 4, 5, 5), torch.randn(2, 9, 3), torch.randn(3, 4, 4, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixture_conv(x, alpha, cells, (3, 3), padding=1)
    assert y.dtype == torch.bfloat16
    assert_same(y, mixture_conv_naive(x, alpha, cells, (3, 3), padding=1))


@pytest.mark.parametrize("backend", [None, *ON_CPU])
@pytest.mark.parametrize("groups", [1, 8])
def test_autocast_copies_no_warehouse(backend, groups):
    """Layers that share a warehouse keep the warehouse itself, and its gradient is exact to its own type."""
    x, alpha = torch.randn(2, 8, 5, 5), torch.randn(2, 9 if groups == 1 else 1, 3)
    cells = torch.randn(3, 8, 8, 1, 1) if groups == 1 else torch.randn(3, 8, 1, 3, 3)
    arguments = ((3, 3), None, [1, 1], [1, 1], [1, 1], groups)
    fitting(backend, (x, alpha, cells), arguments)
    kept, low = [], [t.bfloat16().double().requires_grad_() for t in (x, alpha, cells)]
    cells.requires_grad_()
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t),
    ):
        y = mixture_conv(x, alpha, cells, *arguments, backend=backend)
    assert len(kept) == 3
    assert cells.data_ptr() in kept
    y.sum().backward()
    assert cells.grad.dtype == torch.float32
    (expected,) = torch.autograd.grad(mixture_conv_naive(*low, *arguments).sum(), low[2])
    assert_same(cells.grad, expected, torch.bfloat16)


def test_vmap_and_grad_of_functions():
    """Per-sample gradients by torch.func, for shared cells and for cells of each sample."""
    x, alpha, cells = torch.randn(3, 2, 4, 5, 5), torch.randn(3, 2, 9, 3), torch.randn(3, 4, 4, 1, 1)

    def loss(x, alpha, cells, function=mixture_conv):
        return function(x, alpha, cells, (3, 3), padding=1).square().sum()

    def naive(*tensors):
        return loss(*tensors, mixture_conv_naive)

    biases = torch.randn(3, 4)
    expected = torch.func.vmap(lambda *t: mixture_conv_naive(*t[:3], (3, 3), t[3]), (0, 0, None, 0))
    values = torch.func.vmap(lambda *t: mixture_conv(*t[:3], (3, 3), t[3]), (0, 0, None, 0))
    assert_same(values(x, alpha, cells, biases), expected(x, alpha, cells, biases))

    for dims, shared in (((0, 0, None), cells), ((0, 0, 0), torch.stack([cells, 2 * cells, -cells]))):
        values, expected = (torch.func.vmap(f, dims)(x, alpha, shared) for f in (loss, naive))
        assert_same(values, expected)
        gradients = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), dims)(x, alpha, shared)
        for i in range(3):
            each = shared if dims[2] is None else shared[i]
            for value, one in zip(gradients, torch.func.grad(naive, (0, 1, 2))(x[i], alpha[i], each), strict=True):
                assert_same(value[i], one)


def test_second_derivatives_are_refused():
    x, alpha, cells = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(2, 9, 3), torch.randn(3, 4, 4, 1, 1)
    y = mixture_conv(x, alpha, cells, (3, 3), padding=1).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_empty_batch():
    y = mixture_conv(torch.randn(0, 4, 5, 5), torch.randn(0, 9, 3), torch.randn(3, 6, 4, 1, 1), (3, 3), padding=1)
    assert y.shape == (0, 6, 5, 5)


@pytest.mark.parametrize(
    ("x", "alpha", "cells", "groups", "backend", "message"),
    [
        ((2, 4, 5, 5), (2, 9, 3), (4, 4, 4, 1, 1), 1, None, "do not fit"),
        ((2, 5, 5, 5), (2, 9, 3), (3, 4, 4, 1, 1), 1, None, "do not fit"),
        ((2, 4, 5, 5), (2, 8, 3), (3, 4, 4, 1, 1), 1, None, "do not make a kernel"),
        ((2, 4, 5, 5), (2, 9, 3), (3, 4, 4, 1), 1, None, "differ in rank"),
        ((2, 4, 5, 5), (2, 9, 3), (3, 4, 4, 2, 2), 1, None, "wide, like the kernel"),
        ((2, 4, 5, 5), (2, 9, 3), (3, 4, 1, 1, 1), 4, "mixed", "backend 'mixed' cannot .* available: grouped"),
        (
            (2, 4, 5, 5),
            (2, 9, 3),
            (3, 4, 4, 1, 1),
            1,
            "fastest",
            "there is no backend 'fastest'; there are naive, portable, grouped, batched",
        ),
    ],
)
def test_what_does_not_fit_is_refused(x, alpha, cells, groups, backend, message):
    with pytest.raises(ValueError, match=message):
        mixture_conv(
            torch.randn(x), torch.randn(alpha), torch.randn(cells), (3, 3), None, 1, 1, 1, groups, backend=backend
        )


@pytest.mark.parametrize(
    ("batch", "channels", "size", "n", "backend"),
    [(64, 256, 2, 47, "mixed"), (8, 64, 56, 56, "winograd"), (8, 256, 14, 47, "winograd"), (1, 512, 7, 27, "streamed")],
)
def test_backend_of_least_cost(batch, channels, size, n, backend):
    """The backends that measurement found to be fastest by 1.3 to 2 times for 3x3 convolutions of ResNet18."""
    geo = geometry(
        (batch, channels, size, size), (batch, 9, n), (n, channels, channels, 1, 1), [3, 3], [1, 1], [1, 1], [1, 1], 1
    )
    assert cheapest(geo, available_backends(geo, torch.float32, "cpu"), 4, "cpu") == backend


def test_double_precision_rounds_as_the_definition():
    tensors = [torch.randn(8, 64, 7, 7), torch.randn(8, 9, 5), torch.randn(5, 64, 64, 1, 1)]
    tensors = [t.double() for t in tensors]
    assert torch.equal(mixture_conv(*tensors, (3, 3)), mixture_conv(*tensors, (3, 3), backend="grouped"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_empty_batch_has_a_cost(device):
    geo = geometry((0, 4, 5, 5), (0, 9, 3), (3, 6, 4, 1, 1), [3, 3], [1, 1], [1, 1], [1, 1], 1)
    assert cheapest(geo, list(BACKENDS), 4, device) in BACKENDS
