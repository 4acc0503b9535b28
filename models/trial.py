"""A forward pass without numbers, which shows what a network does with its layers.

It runs on a copy whose tensors have shapes only, so that it takes no memory and leaves the network unchanged.
"""

import copy
import itertools
import math
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .anatomy import layers_of, stem_of
from .messages import quiet

# heights and widths of images that are tried where a network does not tell its own
SIZES = (224, 64, 32, 28)
# a number that is hardly the size of another dimension, so that the samples are found in those of a layer's input
BATCH = 13


@dataclass
class Trial:
    """What a pass in evaluation mode has shown of the layers of a network.

    All are empty where no input is found that the network accepts.

    Args:
        shape: of the input that the network accepted, with its batch.
        order: names of the layers, once for every time that one ran.
        positions: name -> positions of the layer's output in one sample, of the last time that it ran.
        inputs: name -> shape of the layer's input, of the last time that it ran.
        read: names of the layers whose weight another module read, as by `F.linear(x, self.proj.weight)`. A dynamic
            layer has no such weight: the network would fail, or compute without the layer.
    """

    shape: tuple[int, ...] = ()
    order: list[str] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def has_no_samples(self, name: str) -> bool:
        """Whether the first dimension of a layer's input is not that of samples, as in [tokens, B, C]."""
        return name in self.inputs and self.inputs[name][0] % BATCH != 0

    def has_whole_samples(self, name: str) -> bool:
        """Whether each sample of a layer's input is one of the network, not a part such as a window."""
        return name not in self.inputs or self.inputs[name][0] == BATCH


def without_numbers() -> FakeTensorMode:
    """A mode in which tensors have shapes and devices only; others become such tensors when they are used."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def copy_of(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a network whose tensors have no numbers.

    Hooks that are plain functions are left out: they are not copied, and would keep or print what a trial computes.
    """
    own = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    # tensors of the copy that are named here are not copied
    tensors = itertools.chain(model.parameters(), model.buffers(), own)
    copied = copy.deepcopy(model, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
    for module in copied.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, types.FunctionType)]:
                del hooks[key]
    return copied


def try_out(model: nn.Module, names: Sequence[str]) -> Trial:
    """Run a network on an input without numbers, and record what becomes of the layers of these names."""
    mode, runs, result = without_numbers(), [], Trial()
    try:
        trial = copy_of(model, mode).eval()
    except Exception:
        # a network that cannot be copied cannot be tried
        return result
    modules = dict(trial.named_modules(remove_duplicate=False))
    for name in names:
        modules[name].__class__ = _watched(type(modules[name]), name, runs)
    like = next(model.parameters())
    with mode, torch.no_grad(), quiet():
        for shape in _inputs(model):
            runs.append(Trial(shape))
            try:
                trial(torch.empty(shape, dtype=like.dtype, device=like.device))
            except Exception:
                # the network takes another size or several inputs; it may raise anything
                continue
            runs[-1].read |= result.read
            result = runs[-1]
            if len(shape) > 3:
                # one image is enough; a linear stem may take both vectors and tokens
                break
    return result


def _watched(kind: type[nn.Module], name: str, runs: list[Trial]) -> type[nn.Module]:
    """A subclass of a layer's type that tells the last of the runs what becomes of the layer."""

    class Watched(kind):
        """A layer that tells a use of its own weight from one by another module."""

        def forward(self, *args, **kwargs):
            self.__dict__["is_running"] = True
            try:
                y = super().forward(*args, **kwargs)
            finally:
                self.__dict__["is_running"] = False
            runs[-1].order.append(name)
            runs[-1].positions[name] = _positions(self, y)
            runs[-1].inputs[name] = tuple([*args, *kwargs.values()][0].shape)
            return y

        def __getattr__(self, attribute):
            if attribute == "weight" and not self.__dict__.get("is_running"):
                runs[-1].read.add(name)
            return super().__getattr__(attribute)

    return Watched


def _positions(layer: nn.Module, y: Tensor) -> int:
    return math.prod(y.shape[1:-1] if isinstance(layer, nn.Linear) else y.shape[2:])


def _inputs(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of inputs that a network may take, the likeliest first."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if config.get("input_size"):
        yield (BATCH, *config["input_size"])
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    stem = next((layers_of(model)[name] for name in stem_of(model)), None)
    if stem is None:
        return
    if isinstance(stem, nn.Linear):
        yield (BATCH, stem.in_features)
        yield (BATCH, 16, stem.in_features)
        return
    dims = len(stem.kernel_size)
    if size is not None and dims == 2:
        yield (BATCH, stem.in_channels, *size)
    # a network may register another layer before the first, so images are tried as well
    for channels, side in itertools.product(dict.fromkeys((stem.in_channels, 3, 1)), SIZES):
        # videos of 16 frames
        yield (BATCH, channels, *((16,) if dims == 3 else ()), *(side,) * min(dims, 2))
