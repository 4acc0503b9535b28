"""What the backends in Triton compute, against the definition; `test_triton.py` runs this in a process of its own.

There Triton's interpreter takes the place of a GPU, because TRITON_INTERPRET=1 must be set before Triton is imported.
"""

import functools
import os

import pytest
import torch
from mixture_calls import definition, make_call, with_gradients
from tolerance import assert_same, difference

from gpu_checks.cases import TILES
from models.ops import mixture_conv, mixture_conv_naive
from models.ops.backends import available_backends, triton_calls, triton_kernels
from models.ops.geometry import geometry

pytestmark = pytest.mark.usefixtures("poisoned_memory", "exact_float32")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BACKENDS = ["triton", "triton_fused"]
KERNELS = ["assemble", "convolve", "kernel_gradient", "multiply", "mix_and_convolve"]


@pytest.fixture
def exact_float32():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def place(tensors, dtype=torch.float32):
    return [t.detach().to(DEVICE, dtype).requires_grad_() for t in tensors]


@functools.cache
def in_float64(function, *arguments):
    """A call (tensors, arguments) and its exact result."""
    tensors, arguments = function(*arguments)
    return tensors, arguments, definition(tensors, arguments)


def check(backend, function, *arguments):
    """Output and gradients of a call in float32."""
    tensors, arguments, reference = in_float64(function, *arguments)
    bias = arguments[1] if arguments[1] is None else arguments[1].to(DEVICE)
    values = with_gradients(mixture_conv, place(tensors), (arguments[0], bias, *arguments[2:]), backend=backend)
    for value, expected in zip(values, reference, strict=True):
        assert_same(value.cpu(), expected)


def fits(seed):
    tensors, (kernel, _, *rest) = make_call(seed, torch.float32)
    geo = geometry(*(t.shape for t in tensors), kernel, *rest)
    return "triton" in available_backends(geo, torch.float32, DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", list(filter(fits, range(60)))[:5])
def test_backend_equals_naive(backend, seed):
    check(backend, make_call, seed, torch.float32)


def call_of(batch, ci, co, g_in, g_out, groups, kernel, size, n, stride=1, padding=0, dilation=1, last=True):
    """A random call of which everything is said."""
    generator = torch.Generator().manual_seed(batch)
    dims = len(size)
    x = torch.randn(batch, groups * g_in * ci, *size, generator=generator)
    alpha = torch.randn(batch, kernel**dims * groups * g_out * g_in, n, generator=generator) / n
    cells = torch.randn(n, co, ci, *[1] * dims, generator=generator)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    return (x, alpha, cells), ([kernel] * dims, None, stride, padding, dilation, groups)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", TILES, ids=str)
def test_tiles(backend, shape):
    check(backend, call_of, *shape)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_choice_of_tiles(kernel, monkeypatch):
    kernel = getattr(triton_kernels, kernel)
    for config in kernel.configs[1:]:
        monkeypatch.setattr(kernel, "configs", [config])
        check(
            "triton_fused" if "mix" in kernel.base_fn.__name__ else "triton",
            call_of,
            3,
            17,
            18,
            1,
            1,
            1,
            2,
            (5, 4),
            3,
            2,
            1,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces(backend, monkeypatch):
    """Samples, and inner dimensions of products, are worked off in pieces, whose last ones are smaller."""
    monkeypatch.setattr(triton_calls, "PIECE_BYTES", 3 * 9 * 6 * 14 * 4)
    monkeypatch.setattr(triton_calls, "SHARE", 64)
    check(backend, call_of, 7, 6, 14, 1, 1, 1, 3, (4, 3), 4, 1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", [(2, 16, 16, 3, 4), (3, 24, 40, 1, 5)], ids=str)
def test_low_precision_is_as_exact_as_naive(backend, dtype, shape):
    batch, c_in, c_out, k, size = shape
    tensors, arguments = call_of(batch, 8, 8, c_in // 8, c_out // 8, 1, k, (size, size), 12, 1, k // 2)
    low = [t.to(dtype).requires_grad_() for t in tensors]
    exact = definition(low, arguments)
    naive = with_gradients(mixture_conv_naive, low, arguments)
    ours = with_gradients(mixture_conv, place(low, dtype), arguments, backend=backend)
    for value, standard, expected in zip(ours, naive, exact, strict=True):
        assert value.dtype == dtype
        assert difference(value.cpu(), expected) <= 1.5 * difference(standard, expected) + 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_samples_are_not_rounded(backend):
    """Gradients of cells, whose samples cancel out but for what half precision would lose."""
    x, alpha, cells = torch.ones(9, 4, 3, 3), torch.ones(9, 1, 2), torch.ones(2, 4, 4, 1, 1)
    tensors = place([x, alpha, cells], torch.bfloat16)
    dy = torch.ones(9, 4, 3, 3, dtype=torch.bfloat16, device=DEVICE)
    # eight samples' gradients are 9, and the last one's -72.25, which bfloat16 cannot hold
    dy[-1] = 0
    dy[-1, :, 0, 0] = -72
    dy[-1, :, 0, 1] = -0.25
    y = mixture_conv(*tensors, (1, 1), backend=backend)
    assert torch.equal(torch.autograd.grad(y, tensors[2], dy)[0].cpu(), torch.full_like(cells, -0.25).bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_asked_gradients(backend):
    tensors, arguments, reference = in_float64(call_of, *TILES[3])
    for i in range(3):
        only = [t.requires_grad_(j == i) for j, t in enumerate(place(tensors))]
        y = mixture_conv(*only, *arguments, backend=backend)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
        assert_same(torch.autograd.grad(y, only[i], dy)[0].cpu(), reference[i + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_the_input_is_kept(backend):
    (x, alpha, cells), arguments = call_of(2, 5, 6, 1, 1, 1, 3, (8, 8), 4, 1, 1)
    x, alpha, cells = place([x, alpha, cells])
    expected = mixture_conv_naive(x, alpha, cells, *arguments)
    last = mixture_conv(x, alpha, cells, *arguments, backend=backend)
    first = mixture_conv(x.contiguous(), alpha, cells, *arguments, backend=backend)
    assert first.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    assert_same(first, expected), assert_same(last, expected)
    # neither dense nor in a common order, as gradients of sums and slices of tensors are
    every_other = torch.stack([x, x], -1)[..., 0]
    wide = alpha.repeat_interleave(2, 2)[..., ::2]
    y = mixture_conv(every_other, wide, cells, *arguments, backend=backend)
    assert_same(y, expected)
    assert_same(torch.autograd.grad(y.sum(), cells)[0], torch.autograd.grad(expected.sum(), cells)[0])


def test_tables_do_not_depend_on_the_batch():
    """They are on the device once, since copying them there waits for it."""
    tensors = place(call_of(4, 3, 3, 1, 1, 1, 3, (6, 5), 2)[0])
    misses = []
    for batch in (2, 3, 4):
        with_gradients(mixture_conv, [t[:batch] for t in tensors[:2]] + tensors[2:], ((3, 3),), backend="triton")
        misses.append(triton_calls._tables.cache_info().misses)
    assert misses[0] == misses[2]


# --- addresses beyond 32 bits -----------------------------------------------------------------------------------------


class Address:
    """A tensor as a kernel sees it, at another address."""

    def __init__(self, tensor, address):
        self.dtype, self.address = tensor.dtype, address

    def data_ptr(self):
        return self.address


@pytest.fixture
def later(monkeypatch):
    """A function that launches a kernel from a program on, for tensors whose first sample is numbered `first`."""
    if DEVICE != "cpu":
        pytest.skip("only the interpreter can begin at another program")
    from triton.runtime import interpreter

    builder, convert, moved = interpreter.interpreter_builder, interpreter._implicit_cvt, {}
    set_grid_idx, set_grid_dim = builder.set_grid_idx, builder.set_grid_dim

    def at_address(argument):
        if isinstance(argument, torch.Tensor):
            argument = Address(argument, (argument.data_ptr() - moved.get(argument.data_ptr(), 0)) % (1 << 64))
        return convert(argument)

    def launch(kernel, programs, first_program, first, distant, *arguments, **constants):
        moved.clear()
        moved.update({t.data_ptr(): first * t[0].numel() * t.element_size() for t in distant})
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_grid_idx(x + first_program, y, z))
        kernel.fn[(programs,)](*arguments, **constants)

    monkeypatch.setattr(interpreter, "_implicit_cvt", at_address)
    monkeypatch.setattr(builder, "set_grid_dim", lambda x, y, z: set_grid_dim((1 << 31) - 1, y, z))
    return launch


def test_samples_lie_further_apart_than_32_bits(later):
    """Offsets of samples have 64 bits: with 32 the addresses would be others, which hold nothing."""
    batch, c_in, c_out, size, first = 2, 5, 3, 6, 1 << 28
    tensors, arguments = call_of(batch, c_in, c_out, 1, 1, 1, 1, (size, 1), 2)
    x, alpha, cells = place(tensors)
    geo = geometry(*(t.shape for t in tensors), [1, 1], [1, 1], [0, 0], [1, 1], 1)
    call = triton_calls.Call(x, geo)
    index, taps, full, counts, places = call.tables(True)
    source = x.detach().movedim(1, -1).flatten(1, -2).contiguous()
    kernels, y = torch.empty(batch, 1, c_out, c_in), torch.empty(batch, size, c_out)
    assert all(first * t[0].numel() > 1 << 31 for t in (source, kernels, y))
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "PRECISION": "ieee"}

    # the rows of `assemble` lie in blocks of BLOCK_M, which all programs count from the first sample on
    rows = first + batch
    later(
        triton_kernels.assemble, 1, first // 16, first, (alpha, kernels),
        alpha.detach(), cells.detach(), kernels, full, rows, 2, 1, 1, 1, 1, 1, c_out, c_in, 0, **tiles,
    )  # fmt: skip
    expected = torch.einsum("bmn,noc->bmoc", alpha, cells.flatten(2)).detach()
    assert_same(kernels, expected)

    later(
        triton_kernels.convolve, batch, first, first, (source, kernels, y),
        source, kernels, y, index, taps, counts, places, size, size, c_in, c_out, 1, 1, c_in, 1, 1, size,
        1, 0, **tiles,
    )  # fmt: skip
    assert_same(y, torch.einsum("bpc,boc->bpo", source, kernels[:, 0]))

    dkernels = torch.empty(batch, c_out, c_in)
    later(
        triton_kernels.kernel_gradient, batch, first, first, (y, source, dkernels),
        y, source, dkernels, index, size, size, c_out, c_in, 1, 1, c_out, c_in, 0, **tiles,
    )  # fmt: skip
    assert_same(dkernels, torch.einsum("bpo,bpc->boc", y, source))
