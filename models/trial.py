"""A forward pass without numbers, which shows what a network does with its layers.

It runs on a copy whose tensors have shapes only, so that it takes no memory and leaves the network unchanged.
"""

import copy
import itertools
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .anatomy import layers_of, stem_of

# heights and widths of images that are tried where a network does not tell its own
SIZES = (224, 64, 32)


def weights_read(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the layers whose weight is read by another module, as by `F.linear(x, self.proj.weight)`.

    A dynamic layer has no such weight, so that the network would fail, or compute without the layer. The list is empty
    where no input is found that the network accepts.
    """
    mode, read = FakeTensorMode(allow_non_fake_inputs=True), set()
    try:
        # tensors of the copy that are named here are not copied
        tensors = itertools.chain(model.parameters(), model.buffers())
        trial = copy.deepcopy(model, {id(tensor): mode.from_tensor(tensor) for tensor in tensors}).eval()
    except Exception:
        # a network that cannot be copied cannot be tried
        return []
    modules = dict(trial.named_modules(remove_duplicate=False))
    for name in names:
        modules[name].__class__ = _watched(type(modules[name]), name, read)
    like = next(model.parameters())
    with mode, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for shape in _inputs(model):
            before = frozenset(read)
            try:
                trial(torch.empty(shape, dtype=like.dtype, device=like.device))
            except Exception:
                # the network takes another size or several inputs; it may raise anything
                read &= before
                continue
            if len(shape) > 3:
                # one image is enough; a linear stem may take both vectors and tokens
                break
    return [name for name in names if name in read]


def _watched(kind: type[nn.Module], name: str, read: set[str]) -> type[nn.Module]:
    """A subclass of a layer's type that adds `name` to `read` when its weight is read outside of its own forward."""

    class Watched(kind):
        """A layer that tells a use of its own weight from one by another module."""

        def forward(self, *args, **kwargs):
            self.__dict__["is_running"] = True
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.__dict__["is_running"] = False

        def __getattr__(self, attribute):
            if attribute == "weight" and not self.__dict__.get("is_running"):
                read.add(name)
            return super().__getattr__(attribute)

    return Watched


def _inputs(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of inputs that a network may take, the likeliest first."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if config.get("input_size"):
        yield (2, *config["input_size"])
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    stem = layers_of(model)[stem_of(model)]
    if isinstance(stem, nn.Linear):
        yield (2, stem.in_features)
        yield (2, 16, stem.in_features)
        return
    dims = len(stem.kernel_size)
    if size is not None and dims == 2:
        yield (2, stem.in_channels, *size)
    for side in SIZES:
        # videos of 16 frames
        yield (2, stem.in_channels, *((16,) if dims == 3 else ()), *(side,) * min(dims, 2))
