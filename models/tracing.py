"""Writes a model down as a program of PyTorch's own operators, in which all that can be static is.

Shapes: images are [B, 3, H, W], with any B; H and W are those of the trace unless they were made dynamic.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .anatomy import layers_of, stem_of
from .config import ConfigError
from .messages import first_line, quiet
from .methods.layer import DynamicLayer, Linear
from .ops import conv
from .ops.control import forced_backend


def images_of(model: nn.Module, batch: int, height: int, width: int) -> Tensor:
    """Reproducible images [batch, 3, height, width] to trace and to compare a model with; grey ones have 1 channel."""
    layers = layers_of(model)
    channels = 1 if any(getattr(layers[name], "in_channels", 3) == 1 for name in stem_of(model)) else 3
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def traced(model: nn.Module, size: int, dynamic_size: bool = False) -> torch.export.ExportedProgram:
    """The model as a program of PyTorch's own operators, for any batch.

    Args:
        model: takes images, in evaluation mode.
        size: their height and width.
        dynamic_size: accept other heights and widths, too.

    Raises:
        ConfigError: the model cannot be traced, or not at other sizes.
    """
    dims = {0: torch.export.Dim("batch", min=1)}
    if dynamic_size:
        dims.update({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC})
        try:
            model(images_of(model, 1, *other_size(size)))
        except Exception as error:
            raise ConfigError(f"the model takes images of {size}x{size} only; leave out --dynamic_size") from error
    images = images_of(model, 2, size, size)
    model = _with_static_layers(model)
    try:
        with forced_backend("portable"), quiet(), without_source_lines():
            program = torch.export.export(model, (images,), dynamic_shapes=(dims,), strict=False)
    except Exception as error:
        # the tracer raises exceptions of any type
        hint = "; leave out --dynamic_size" if dynamic_size else ""
        raise ConfigError(f"the model cannot be traced ({first_line(error)}){hint}") from error
    for node in program.graph.nodes:
        # lines of source code, with the folders of this machine
        node.meta.pop("stack_trace", None)
    _drop_casts(program)
    _fold_norms(program)
    return program


@contextlib.contextmanager
def without_source_lines() -> Iterator[None]:
    """Inside the context, programs do not keep the lines of source code of their nodes, which takes long to collect."""
    config = torch.fx.config
    before, config.do_not_emit_stack_traces = config.do_not_emit_stack_traces, True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before


class _StaticLayer(nn.Module):
    """The static layer that a dynamic one computes, if its kernel [O, I, *k] is the same for every input."""

    def __init__(self, layer: DynamicLayer, kernel: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.geometry = nn.Parameter(kernel), layer.bias, layer._geometry()
        self.over_tokens = isinstance(layer, Linear)

    def forward(self, x: Tensor) -> Tensor:
        if self.over_tokens:
            return F.linear(x, self.weight.flatten(1), self.bias)
        return conv(x, self.weight, self.bias, *self.geometry)


def _with_static_layers(model: nn.Module) -> nn.Module:
    """The model, or a copy with static layers where kernels do not depend on the input, which has the same tensors."""
    dynamic = {name: layer for name, layer in model.named_modules() if isinstance(layer, DynamicLayer)}
    kernels = {name: kernel for name, layer in dynamic.items() if (kernel := layer.constant_kernel()) is not None}
    if not kernels:
        return model
    if "" in kernels:
        return _StaticLayer(model, kernels[""]).eval()
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for name, kernel in kernels.items():
        model.set_submodule(name, _StaticLayer(dynamic[name], kernel))
    return model.eval()


def _drop_casts(program: torch.export.ExportedProgram) -> None:
    """Take out casts to the type that a tensor already has, and the checks of it, which exporters carry along."""
    aten, nodes = torch.ops.aten, program.graph.nodes
    for node in [node for node in nodes if node.target is aten._assert_tensor_metadata.default]:
        program.graph.erase_node(node)
    for node in [node for node in nodes if node.target is aten.to.dtype]:
        # further arguments ask for a copy, and a program's outputs are known by their names
        is_plain = len(node.args) == 2 and not node.kwargs and all(user.op != "output" for user in node.users)
        if is_plain and node.args[0].meta["val"].dtype == node.args[1]:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)


def _fold_norms(program: torch.export.ExportedProgram) -> None:
    """Make BatchNorm a part of the static convolution before it, where nothing else reads that convolution."""
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    aten, state = torch.ops.aten, program.state_dict
    for norm in list(program.graph.nodes):
        if norm.op != "call_function" or norm.target != aten.batch_norm.default:
            continue
        convolution, (weight, bias, mean, variance), is_training, epsilon = (
            norm.args[0], norm.args[1:5], norm.args[5], norm.args[7],
        )  # fmt: skip
        if is_training:
            continue
        if convolution.target not in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
            continue
        kernel, own_bias = (*convolution.args, None)[1:3]
        changed = [kernel, bias] if own_bias is None else [kernel, own_bias]
        constants = [node for node in (*changed, weight, bias, mean, variance) if node is not None]
        # a kernel that is computed, or read by another layer as well, stays as it is
        if None in (weight, bias, mean, variance) or any(node.name not in names for node in constants):
            continue
        if any(len(node.users) > 1 for node in (convolution, *changed)):
            continue
        values = [None if node is None else state[names[node.name]] for node in (kernel, own_bias, mean, variance)]
        fused = fuse_conv_bn_weights(*values, epsilon, *(state[names[node.name]] for node in (weight, bias)))
        # new entries: the old ones are the model's own parameters
        state.update(zip((names[node.name] for node in changed), fused, strict=True))
        convolution.args = (*convolution.args[:2], changed[1], *convolution.args[3:])
        norm.replace_all_uses_with(convolution)
        program.graph.erase_node(norm)
    program.graph_module.recompile()


def other_size(size: int) -> tuple[int, int]:
    """A height and a width that differ from `size`, to trace and to compare a model of dynamic size with."""
    return size + 32, size + 64
