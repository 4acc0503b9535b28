"""A GPU without a GPU: tensors that have shapes, types and a device, but no numbers.

PyTorch's fake tensors refuse an operation on tensors of two devices, and one that waits for a number (`.item()`), so
that a tensor, index or buffer that stays on the CPU is found on any machine.
"""

import contextlib
import copy
import itertools

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import BackwardCFunction

from models.ops.backends import triton_calls, triton_support

GPU = torch.device("cuda", 0)


class NoStream:
    """A stream on which nothing runs."""

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


def fused_update(*lists, **settings):
    """Stands for a fused update of an optimizer, which fake tensors do not know, and looks where its tensors are."""
    for value in (*itertools.chain.from_iterable(lists), *settings.values()):
        if isinstance(value, torch.Tensor):
            assert_on_gpu(value)


@contextlib.contextmanager
def fake_gpu(monkeypatch):
    """Inside the context, a GPU of compute capability 9.0 seems to be there; gives the mode of its fake tensors."""
    generator = torch.Generator
    with monkeypatch.context() as patch, FakeTensorMode() as mode:
        # copies of a fake tensor, as of weights for their average, belong to the same mode
        patch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
        # that of a GPU asks the driver
        patch.setattr(torch, "Generator", lambda device=None: generator())
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        for name in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_"):
            patch.setattr(torch, name, fused_update)
        patch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
        patch.setattr(torch.cuda, "Stream", NoStream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", NoStream)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        patch.setattr(torch.Tensor, "backward", backward)
        yield mode


@contextlib.contextmanager
def fake_triton(monkeypatch):
    """Inside the context, Triton's backends are available, and a launch only looks where its tensors are.

    Gives a list of the names of the kernels that were launched.
    """
    from models.ops.backends.triton_tuning import Tuner

    launched, tables = [], triton_calls._tables

    def fake_tables(*arguments):
        # their sizes depend on numbers, which fake tensors do not have
        with unset_fake_temporarily():
            real = tables(*arguments[:-1], torch.device("cpu"))
        return [torch.empty(table.shape, dtype=table.dtype, device=arguments[-1]) for table in real]

    def run(self, *args, grid, warmup, **kwargs):
        for name, value in zip(self.arg_names, args):
            if isinstance(value, torch.Tensor):
                assert value.device == GPU, f"{self.base_fn.__name__}: {name} is on {value.device}"
        launched.append(self.base_fn.__name__)

    with monkeypatch.context() as patch:
        patch.setattr(triton_support, "_works", lambda: True)
        patch.setattr(triton_support, "_failed", False)
        patch.setattr(Tuner, "run", run)
        patch.setattr(triton_calls, "_tables", fake_tables)
        yield launched


def on_gpu(module):
    """A copy of a module of real tensors, whose parameters and buffers are fake ones on the GPU.

    Sharing is kept. A tensor that is neither parameter nor buffer stays where it is, as with `module.to`.
    """

    def fake(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)

    memo = {id(each): torch.nn.Parameter(fake(each), each.requires_grad) for each in module.parameters()}
    memo |= {id(buffer): fake(buffer) for buffer in module.buffers()}
    with unset_fake_temporarily():
        return copy.deepcopy(module, memo)


def assert_on_gpu(*tensors):
    for tensor in tensors:
        assert isinstance(tensor, FakeTensor) and tensor.device == GPU, f"{type(tensor).__name__} on {tensor.device}"


def backward(loss, gradient=None):
    """`loss.backward()` node by node, because PyTorch's engine asks the driver for streams."""
    users, stack, seen = {}, [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            following = [function for function, _ in node.next_functions if function is not None]
            stack += following
            for function in following:
                users[function] = users.get(function, 0) + 1
    gradients = {loss.grad_fn: {loss.output_nr: torch.ones_like(loss) if gradient is None else gradient}}
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        mine = gradients.pop(node, {})
        if hasattr(node, "variable"):
            variable, value = node.variable, mine.get(0)
            if value is not None:
                variable.grad = value.detach() if variable.grad is None else variable.grad + value
            continue
        results = [None] * len(node.next_functions)
        if mine:
            arguments = [mine.get(index) for index in range(len(node._input_metadata))]
            with torch.no_grad():
                # a node of a Python function gives gradients of arguments that are no tensors, too, which come last
                results = node.apply(*arguments) if isinstance(node, BackwardCFunction) else node(*arguments)
        results = results if isinstance(results, (tuple, list)) else (results,)
        for (function, index), value in zip(node.next_functions, results):
            if function is None:
                continue
            if value is not None:
                expected = function._input_metadata[index]
                value = value.sum_to_size(expected.shape).to(expected.dtype)
                slots = gradients.setdefault(function, {})
                slots[index] = slots[index] + value if index in slots else value
            users[function] -= 1
            if not users[function]:
                ready.append(function)
