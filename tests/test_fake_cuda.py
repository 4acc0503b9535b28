"""What a GPU would break, found without one: every backend, layer, network and step on fake CUDA tensors."""

import copy

import pytest
import torch
from fake_cuda import GPU, assert_on_gpu, backward, fake_gpu, fake_triton, on_gpu
from helpers import METHODS, METHODS_OF_RUNS
from test_engine import options
from timm.utils import ModelEmaV3
from tolerance import assert_same
from torch import nn

import engine
from models import build_model, set_temperature
from models.methods import LAYERS
from models.ops import mixture_conv, sample_conv
from models.ops.backends import BACKENDS, available_backends
from models.ops.control import forced_backend, observed
from models.ops.geometry import geometry
from models.ops.layout import is_channels_last
from optim_factory import Schedule, create_optimizer
from utils import Process

ON_CPU_ONLY = ("fused", "depthwise", "pointwise", "streamed", "winograd")
ON_GPU = [backend for backend in BACKENDS if backend not in ON_CPU_ONLY]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# x, alpha, cells, kernel, stride, padding, dilation, groups: cells of a tap and of a whole kernel, maps smaller than
# kernels, cropped and strided ones, groups, one and three dimensions
CALLS = {
    "3x3": ((2, 32, 20, 20), (2, 18, 5), (5, 32, 16, 1, 1), (3, 3), 1, 1, 1, 1),
    "3x3 strided": ((2, 16, 9, 9), (2, 9, 5), (5, 24, 16, 1, 1), (3, 3), 2, 1, 1, 1),
    "3x3 on one pixel": ((4, 8, 1, 1), (4, 9, 3), (3, 8, 8, 1, 1), (3, 3), 1, 1, 1, 1),
    "1x1": ((3, 32, 14, 14), (3, 2, 4), (4, 48, 16, 1, 1), (1, 1), 1, 0, 1, 1),
    "1x1 strided": ((3, 16, 7, 7), (3, 1, 4), (4, 8, 16, 1, 1), (1, 1), 2, 0, 1, 1),
    "whole kernel": ((2, 8, 12, 12), (2, 1, 4), (4, 16, 8, 3, 3), (3, 3), 1, 1, 1, 1),
    "groups": ((2, 16, 6, 6), (2, 18, 3), (3, 8, 8, 1, 1), (3, 3), 1, 2, 2, 2),
    "depth-wise": ((2, 16, 8, 8), (2, 1, 3), (3, 16, 1, 3, 3), (3, 3), 1, 1, 1, 16),
    "one dimension": ((2, 8, 30), (2, 5, 3), (3, 8, 8, 1), (5,), 3, 2, 1, 1),
    "three dimensions": ((1, 4, 5, 6, 4), (1, 27, 3), (3, 8, 4, 1, 1, 1), (3, 3, 3), 1, 1, 1, 1),
}


def tensors_of(call, dtype=torch.float32, last=False):
    """Fake tensors of a call, and its geometry and arguments."""
    x, alpha, cells, kernel, *rest = CALLS[call]
    x, alpha, cells = (torch.empty(shape, dtype=dtype, device=GPU) for shape in (x, alpha, cells))
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    dims = len(kernel)
    lists = [[value] * dims for value in rest[:3]]
    shapes = (t.shape for t in (x, alpha, cells))
    return (x, alpha, cells), geometry(*shapes, kernel, *lists, rest[3], is_channels_last(x)), (kernel, None, *rest)


def check_backend(backend, x, alpha, cells, geo):
    """A backend's own forward and backward functions, which the operator itself replaces for fake tensors."""
    functions = BACKENDS[backend]
    y = functions.forward(x, alpha, cells, geo)
    assert_on_gpu(y)
    assert y.shape == (geo.batch, geo.c_out, *geo.out)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        gradients = functions.backward(y, x, alpha, cells, geo, list(needs))
        for value, like, needed in zip(gradients, (x, alpha, cells), needs, strict=True):
            assert (value is not None) == needed
            if needed:
                assert_on_gpu(value)
                assert value.shape == like.shape


@pytest.mark.parametrize(
    "kind", ["bf16 channels_last", pytest.param("fp32 contiguous", marks=pytest.mark.slow, id="fp32 contiguous")]
)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ON_GPU)
def test_backends(backend, call, kind, monkeypatch):
    dtype, last = DTYPES[kind[:4]], kind.endswith("last")
    if backend.startswith("triton"):
        pytest.importorskip("triton")
    with fake_gpu(monkeypatch), fake_triton(monkeypatch) as launched:
        tensors, geo, _ = tensors_of(call, dtype, last)
        if backend not in available_backends(geo, dtype, "cuda"):
            pytest.skip("this backend cannot evaluate such a convolution")
        check_backend(backend, *tensors, geo)
        assert bool(launched) == backend.startswith("triton")


def test_compiled_backends_are_for_the_cpu(monkeypatch):
    with fake_gpu(monkeypatch):
        for call in CALLS:
            assert not set(ON_CPU_ONLY) & set(available_backends(tensors_of(call)[1], torch.float32, "cuda"))


@pytest.mark.parametrize("backend", [None, "naive", "portable"])
@pytest.mark.parametrize("call", CALLS)
def test_the_operator(backend, call, monkeypatch):
    with fake_gpu(monkeypatch):
        tensors, geo, arguments = tensors_of(call)
        if backend in BACKENDS and backend not in available_backends(geo, torch.float32, "cuda"):
            pytest.skip("this backend cannot evaluate such a convolution")
        bias = torch.empty(geo.c_out, device=GPU, requires_grad=True)
        leaves = [t.requires_grad_() for t in tensors]
        y = mixture_conv(*leaves, arguments[0], bias, *arguments[2:], backend=backend)
        assert_on_gpu(y)
        y.square().sum().backward()
        assert_on_gpu(*(t.grad for t in (*leaves, bias)))


@pytest.mark.parametrize("backend", [None, "naive", "portable"])
@pytest.mark.parametrize(("kernel", "size", "groups"), [(1, 9, 1), (3, 5, 1), (3, 20, 1), (3, 6, 4)])
def test_kernels_that_a_layer_assembles(backend, kernel, size, groups, monkeypatch):
    with fake_gpu(monkeypatch), forced_backend(backend):
        x = torch.empty(2, 8, size, size, device=GPU, requires_grad=True)
        kernels = torch.empty(2, 12, 8 // groups, kernel, kernel, device=GPU, requires_grad=True)
        y = sample_conv(x, kernels, None, 1, kernel // 2, 1, groups)
        y.sum().backward()
        assert_on_gpu(y, x.grad, kernels.grad)


# --- layers and networks ----------------------------------------------------------------------------------------------


def step(module, x):
    """Training passes, without autocast and under it, and an evaluation pass."""
    for amp in (False, True):
        module.train()
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            y = module(x)
        assert_on_gpu(y)
        y.float().square().mean().backward()
        assert_on_gpu(*(p.grad for p in module.parameters() if p.grad is not None))
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        assert_on_gpu(module.eval()(x))


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, monkeypatch):
    torch.manual_seed(0)
    kind = LAYERS[name]
    if name.startswith(("KW", "NLK")):
        pytest.skip("its cells are a network's; tested with networks")
    linear = name.endswith("Linear")
    dims = 0 if linear else int(name[-2])
    layer = kind(16, 32) if linear else kind(16, 32, 3, padding=1)
    with fake_gpu(monkeypatch):
        x = torch.empty((4, 6, 16) if linear else (4, 16, *[8] * dims), device=GPU)
        step(on_gpu(layer), x)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "naive", "portable"])
@pytest.mark.parametrize("name", METHODS)
def test_networks(name, backend, monkeypatch):
    """A network of every method; its own operators are replaced for fake tensors, and tested in `test_backends`."""
    if backend is not None and name not in ("kw", "odconv", "dcd", "kr", "we"):
        pytest.skip("its layers use no operator, or the same as another method's")
    torch.manual_seed(0)
    model = build_model(METHODS[name], num_classes=5).to(memory_format=torch.channels_last)
    with fake_gpu(monkeypatch), fake_triton(monkeypatch), forced_backend(backend):
        net = on_gpu(model)
        x = torch.empty(4, 3, 32, 32, device=GPU).to(memory_format=torch.channels_last)
        set_temperature(net, 0.5)
        step(net, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_what_networks_ask_of_every_backend(name, monkeypatch):
    """What a network of every method asks of the operator is asked of every backend on a GPU."""
    model, calls = build_model(METHODS[name], num_classes=5).to(memory_format=torch.channels_last), set()

    def note(operator, x, alpha, cells, kernel, bias, *rest):
        if operator == "mixture_conv":
            lists = [tuple([v] * len(kernel) if isinstance(v, int) else v) for v in rest[:3]]
            shapes = (tuple(t.shape) for t in (x, alpha, cells))
            calls.add((*shapes, tuple(kernel), *lists, rest[3], is_channels_last(x)))

    with observed(lambda operator, *arguments: note(operator, *(*arguments, *[None] * 3)[:9])), torch.no_grad():
        model(torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last))
    with fake_gpu(monkeypatch), fake_triton(monkeypatch):
        for shapes in calls:
            x, alpha, cells = (torch.empty(shape, device=GPU) for shape in shapes[:3])
            geo = geometry(*shapes)
            if shapes[-1]:
                x = x.to(memory_format=torch.channels_last)
            for backend in available_backends(geo, x.dtype, "cuda"):
                check_backend(backend, x, alpha, cells, geo)


# --- the training step ------------------------------------------------------------------------------------------------


class Enough(Exception):
    """The loader has given all its batches."""


def batches(count, size=16):
    for _ in range(count):
        yield torch.empty(4, 3, size, size), torch.zeros(4, dtype=torch.int64)
    raise Enough


class Loader:
    """What the training asks of a loader; it ends before the step that logs, which waits for the GPU."""

    dataset = range(1000)

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return batches(self.count)


def train_steps(monkeypatch, name="kw", steps=2, ema=None, **changes):
    """Steps of `engine.train_one_epoch`, none of which logs."""
    args = options(batch_size=4, num_workers=0, model=METHODS[name]["model"], **changes)
    torch.manual_seed(0)
    model = build_model(METHODS[name], num_classes=5)
    with fake_gpu(monkeypatch):
        monkeypatch.setattr(engine, "_loaded", lambda loader, seconds: iter(loader))
        net = on_gpu(model)
        optimizer = create_optimizer(args, net)
        scaler = torch.amp.GradScaler("cuda", enabled=args.amp_dtype == "float16")
        average = ModelEmaV3(net, decay=0.9, device=GPU) if ema else None
        with pytest.raises(Enough):
            engine.train_one_epoch(
                net, Loader(steps * args.update_freq), optimizer, Schedule(args, 100), nn.CrossEntropyLoss(), args=args,
                epoch=0, process=Process(0, 1, 0, 1, GPU), scaler=scaler, ema=average,
            )  # fmt: skip
        with torch.inference_mode(), engine.autocast(args, GPU):
            assert_on_gpu(net.eval()(torch.empty(4, 3, 16, 16, device=GPU)))
        assert_on_gpu(*net.parameters(), *net.buffers())
        states = [value for state in optimizer.state.values() for value in state.values()]
        assert states or args.opt == "sgd"
        assert_on_gpu(*(value for value in states if isinstance(value, torch.Tensor)))
        if average is not None:
            assert_on_gpu(*average.module.parameters(), *average.module.buffers())


@pytest.mark.parametrize("name", METHODS_OF_RUNS)
def test_the_training_step_of_every_method(name, monkeypatch):
    """An update without a wait for the GPU; a fake tensor refuses to be read."""
    train_steps(monkeypatch, name, steps=1, ema=True, use_amp=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"opt": "sgd"},
        {"opt": "momentum", "clip_grad": 1.0},
        {"opt": "adam", "update_freq": 2},
        {"opt": "adamw", "use_amp": True, "amp_dtype": "float16"},
        {"opt": "adamw", "use_amp": True, "amp_dtype": "bfloat16", "skip_nonfinite": 3, "clip_grad": 5.0},
        {"channels_last": True},
    ],
    ids=str,
)
def test_the_training_step_with_options(changes, monkeypatch):
    train_steps(monkeypatch, "dyconv", **changes)


# --- the tests themselves ---------------------------------------------------------------------------------------------


def test_backward_is_that_of_pytorch():
    """Node by node the gradients are those of PyTorch's engine."""
    torch.manual_seed(0)
    nets = [build_model(METHODS["kw"], num_classes=5).double()]
    nets.append(copy.deepcopy(nets[0]))
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for net, way in zip(nets, (backward, torch.Tensor.backward), strict=True):
        way(net(x).square().sum())
    for mine, expected in zip(*(net.parameters() for net in nets), strict=True):
        assert_same(mine.grad, expected.grad)


class Faulty(nn.Module):
    """A layer with one fault."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.linear = fault, nn.Linear(4, 4)
        self.constant = torch.ones(4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        y = self.linear(x) * self.scale
        if self.fault == "constant":
            return y + self.constant
        if self.fault == "made on the CPU":
            return y + torch.ones(4)
        if self.fault == "mask":
            return torch.where(torch.ones(4) > 0, y, 0)
        if self.fault == "wait":
            return y * float(y.detach().sum())
        return y


@pytest.mark.parametrize("fault", ["", "constant", "made on the CPU", "mask", "wait"])
def test_faults_are_found(fault, monkeypatch):
    layer = Faulty(fault)
    with fake_gpu(monkeypatch):
        layer, x = on_gpu(layer), torch.empty(2, 4, device=GPU)
        if not fault:
            step(layer, x)
            return
        with pytest.raises(Exception, match=r"device|FakeTensor|_local_scalar_dense"):
            step(layer, x)


def test_a_table_of_a_kernel_on_the_cpu_is_found(monkeypatch):
    pytest.importorskip("triton")
    from models.ops.backends import triton_calls

    with fake_gpu(monkeypatch), fake_triton(monkeypatch):
        tables = triton_calls._tables
        monkeypatch.setattr(triton_calls, "_tables", lambda *arguments: tables(*arguments[:-1], torch.device("cpu")))
        tensors, geo, _ = tensors_of("3x3")
        with pytest.warns(UserWarning), pytest.raises(Exception, match=r"assemble: tap_ids is on cpu"):
            check_backend("triton", *tensors, geo)
