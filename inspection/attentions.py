"""Collect the attentions of a network's dynamic layers over many images, as means, spreads and samples.

Shapes: N images, of which a layer's attention has one value each per entry of its shape. KernelWarehouse's alpha is
[m, n]; ODConv's and KR's are "spatial" [sets, T], "channel" [sets, C], "filter" [sets, O] and "kernel" [K].
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.anatomy import is_dynamic
from models.config import ConfigError

# classes of which the mean attention is kept, in the order in which they come: KR's figures show 20, too
CLASSES = 20
# images of which whole vectors are kept, and the layers among those that have them
SAMPLES, SAMPLED_LAYERS = 1000, 4


@dataclass
class Moments:
    """Sums over images of values of one shape, in double precision.

    Attributes:
        count: number of images.
        total, squares: sums of the values and of their squares.
        of_class: class -> (number of images, sum of the values), of the first `CLASSES` classes.
    """

    count: int = 0
    total: Tensor | None = None
    squares: Tensor | None = None
    of_class: dict[int, tuple[int, Tensor]] = field(default_factory=dict)

    def add(self, values: Tensor, labels: Sequence[int] = ()) -> None:
        """Add the values [B, ...] of a batch, and the classes of its images where they are known."""
        # a large batch is added up where it is
        values = values.detach().double()
        self.total = values.sum(0).cpu() + (0 if self.total is None else self.total)
        self.squares = values.square().sum(0).cpu() + (0 if self.squares is None else self.squares)
        self.count += len(values)
        for value, label in zip(values, labels):
            if label in self.of_class or len(self.of_class) < CLASSES:
                count, total = self.of_class.get(label, (0, 0))
                self.of_class[label] = count + 1, total + value.cpu()

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def deviation(self) -> Tensor:
        """The standard deviation over the images."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0).sqrt()

    @property
    def deviation_of_classes(self) -> Tensor:
        """The standard deviation of the means of the classes, each class weighing the same."""
        means = torch.stack([total / count for count, total in self.of_class.values()])
        return means.std(0, correction=0)


@dataclass
class LayerAttention:
    """The attentions of one layer.

    Attributes:
        module: the layer.
        parts: name of an attention -> its moments.
        entropy: of every mixture or of the layer, relative to that of equal attentions: 0 to 1.
        samples: the attentions of the first images as vectors; empty for layers that are not sampled.
    """

    module: nn.Module
    parts: dict[str, Moments] = field(default_factory=dict)
    entropy: Moments = field(default_factory=Moments)
    samples: list[Tensor] = field(default_factory=list)


def dynamic_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model whose kernels depend on the image, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_dynamic(module) and getattr(module, "per_sample", False) and _source(module) is not None
    }


def require_attentions(model: nn.Module, about: str) -> dict[str, nn.Module]:
    """`dynamic_layers`, of which there is at least one.

    Raises:
        ConfigError: there is none; begins with `about`, what the model is.
    """
    layers = dynamic_layers(model)
    if not layers:
        raise ConfigError(
            f"{about}: its model has no attentions that depend on the image; ask for what a static model has: "
            "--pictures cam features"
        )
    return layers


def _source(layer: nn.Module) -> nn.Module | None:
    """The module of a layer whose output its attentions are; None for a layer that takes those of another."""
    found = (getattr(layer, name, None) for name in ("attention", "routing", "attend"))
    module = next((module for module in found if isinstance(module, nn.Module)), None)
    return None if getattr(module, "names", None) == [] else module


def named_parts(layer: nn.Module, output: Any) -> dict[str, Tensor]:
    """The attentions [B, ...] of a layer by name, from the output of the module that computes them."""
    if isinstance(output, dict):
        return output
    if isinstance(output, tuple) and hasattr(layer, "q"):
        # DCD: the matrix Phi, and the scale of the output channels
        return dict(zip(("matrix", "filter"), output))
    if isinstance(output, tuple):
        # CGC: its layer applies the sigmoid to the sum of both
        return dict(zip(("input gate", "output gate"), (logits.sigmoid() for logits in output)))
    if getattr(layer, "attend", None) is not None:
        # WeightNet's layer applies the sigmoid itself
        return {"kernel": output.sigmoid()}
    return {"mixture" if output.ndim == 3 else "kernel": output}


def relative_entropy(alpha: Tensor) -> Tensor:
    """The entropy of |alpha| [..., n], normalised to add up to 1, over log n: 1 where all n are equal, 0 for one alone.

    Where all are 0 there is nothing to distribute, and the entropy is 0.
    """
    shares = alpha.abs() / alpha.abs().sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.special.entr(shares).sum(-1) / math.log(max(2, alpha.shape[-1]))


@dataclass
class Attentions:
    """What was collected.

    Attributes:
        layers: name -> the attentions of the layer, in the order of the model.
        labels: the classes of the images of which samples are kept.
        representations: name of a layer of KR -> representations of the first images.
        count: number of images.
    """

    layers: dict[str, LayerAttention]
    labels: list[int] = field(default_factory=list)
    representations: dict[str, list[Tensor]] = field(default_factory=dict)
    count: int = 0

    def parts(self, *names: str) -> dict[str, dict[str, Moments]]:
        """Name of an attention -> name of a layer -> its moments, of those of the names that there are."""
        found = {}
        for name in names:
            layers = {layer: entry.parts[name] for layer, entry in self.layers.items() if name in entry.parts}
            if layers:
                found[name] = layers
        return found

    def warehouses(self) -> dict[str, dict[str, LayerAttention]]:
        """Name of a warehouse -> its layers, in the order in which it knows them."""
        found: dict[str, dict[str, LayerAttention]] = {}
        for name, entry in self.layers.items():
            house = getattr(entry.module, "warehouse", None)
            if house is not None and entry.parts:
                found.setdefault(house.name, {})[name] = entry
        return found


def spread_evenly(names: Sequence[str], count: int) -> list[str]:
    """At most `count` of some names, from the first to the last."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


class Collector:
    """Collects the attentions of a model's forward passes within the context.

    Args:
        model: in evaluation mode.
        samples: keep the vectors of `SAMPLED_LAYERS` layers for the first `SAMPLES` images.

    Call `add(labels)` after every forward pass.
    """

    def __init__(self, model: nn.Module, samples: bool = True) -> None:
        self.layers = dynamic_layers(model)
        self.found = Attentions({name: LayerAttention(module) for name, module in self.layers.items()})
        self._generators = {
            name: module.generator
            for name, module in self.layers.items()
            if isinstance(getattr(module, "generator", None), nn.Module)
        }
        self._sampled = set(spread_evenly(list(self.layers), SAMPLED_LAYERS)) if samples else set()
        self._told = set(spread_evenly(list(self._generators), SAMPLED_LAYERS)) if samples else set()
        self._pass: dict[str, dict[str, Tensor]] = {}
        self._representations: dict[str, Tensor] = {}

    def __enter__(self) -> "Collector":
        with contextlib.ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.enter_context(_hook(_source(layer), functools.partial(self._take, name)))
            for name in self._told:
                stack.enter_context(_hook(self._generators[name], functools.partial(self._take_representation, name)))
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _take(self, name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        self._pass[name] = named_parts(self.layers[name], output)

    def _take_representation(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._representations[name] = output

    def add(self, labels: Sequence[int]) -> None:
        """Add what the last forward pass gave; `labels` are the classes of its images."""
        found = self.found
        room = max(0, SAMPLES - len(found.labels))
        for name, parts in self._pass.items():
            entry = found.layers[name]
            for part, values in parts.items():
                entry.parts.setdefault(part, Moments()).add(values, labels)
            mixed = parts.get("mixture", parts.get("kernel"))
            if mixed is not None:
                entry.entropy.add(relative_entropy(mixed.detach().double()))
            if name in self._sampled and room:
                entry.samples += list(kernel_vectors(entry.module, parts)[:room])
        for name, values in self._representations.items():
            if room:
                found.representations.setdefault(name, []).extend(values[:room].detach().double().cpu())
        found.labels += list(labels)[:room]
        found.count += len(labels)
        self._pass, self._representations = {}, {}


@contextlib.contextmanager
def _hook(module: nn.Module, call: Any) -> Iterator[None]:
    handle = module.register_forward_hook(call)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def kernel_vectors(layer: nn.Module, parts: dict[str, Tensor]) -> Tensor:
    """Vectors [B, D] whose distances are those of the dynamic kernels, or of the attentions, of the images.

    A kernel that is a sum alpha E of cells E has the Gram matrix alpha (E E') alpha', so alpha L with L L' = E E' has
    the kernels' distances in few dimensions. The product of several attentions has no such form: then the attentions
    themselves are returned.
    """
    alpha = next(iter(parts.values()))
    cells = layer.warehouse.cells if hasattr(layer, "warehouse") else getattr(layer, "weight", None)
    if len(parts) == 1 and set(parts) <= {"mixture", "kernel"} and alpha.shape[-1] == len(cells):
        gram = cells.detach().flatten(1).double()
        values, vectors = torch.linalg.eigh(gram @ gram.T)
        alpha = alpha.double() @ (vectors * values.clamp_min(0).sqrt())
        return alpha.flatten(1).cpu()
    return torch.cat([part.detach().double().flatten(1) for part in parts.values()], dim=1).cpu()
