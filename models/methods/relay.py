"""Passes a value from layer to layer within one forward pass."""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..anatomy import blocks_of
from .layer import global_pool


class Relay(threading.local):
    """A value that passes from layer to layer and is dropped after the last one.

    Every thread has a value of its own, so that simultaneous forward passes do not interfere. Layers hold the relay as
    an unregistered reference: a copy of the model gets a relay of its own, and no value is saved with the model.

    Args:
        layers: the names of the layers that pass the value on, in their order.
    """

    def __init__(self, layers: Sequence[str] = ()) -> None:
        self.layers, self.outer = tuple(layers), ()
        self.clear()

    def enter(self) -> None:
        """Begin a pass inside another one, which continues after `leave`."""
        self.outer = (self.value, self.position, self.outer)
        self.clear()

    def leave(self) -> None:
        """End the pass, and return to the one around it."""
        self.value, self.position, self.outer = self.outer or (None, 0, ())

    def clear(self) -> None:
        """Drop the value."""
        self.value, self.position = None, 0

    def start(self, value: Any) -> None:
        """Set the value that the first layer takes."""
        self.value, self.position = value, 0

    def take(self, layer: str) -> Any:
        """The value for a layer.

        Raises:
            RuntimeError: it is not this layer's turn.
        """
        due = self.layers[self.position] if self.value is not None else None
        if layer != due:
            position = self.layers.index(layer)
            before = f"after '{self.layers[position - 1]}'" if position else "after the model's first layer"
            self.clear()
            raise RuntimeError(
                f"layer '{layer}' ran out of order: in every forward pass it runs once, {before}. Run the whole model, "
                "without gradient checkpointing, with its layers registered in the order in which they run"
            )
        return self.value

    def hand_on(self, value: Any) -> None:
        """Set the value for the next layer; after the last layer the value is dropped."""
        self.position += 1
        if self.position < len(self.layers):
            self.value = value
        else:
            self.clear()

    def __deepcopy__(self, memo: dict) -> "Relay":
        memo[id(self)] = copied = Relay(self.layers)
        return copied

    def __reduce__(self) -> tuple:
        return Relay, (self.layers,)


def block_relays(model: nn.Module, names: Iterable[str]) -> dict[str, Relay]:
    """Name of a layer -> the relay that the layers of its block share; a layer outside of blocks has its own.

    `names` are in the order in which the layers run.
    """
    groups, blocks = {}, blocks_of(model)
    for name in names:
        groups.setdefault(blocks.get(name, name), []).append(name)
    return {name: relay for group in groups.values() for relay in [Relay(group)] for name in group}


class BlockLayer:
    """A layer of a block. The block's first layer computes from the block's input a value that all its layers share."""

    def _join(self, relay: Relay | None, layer: str) -> None:
        """Join the layers of a block.

        Args:
            relay: of the layers of the block; None for a layer that stands alone.
            layer: this layer's name in the relay.
        """
        self.layer = layer
        object.__setattr__(self, "_relay", relay or Relay([layer]))
        self.leads = self._relay.layers[0] == layer

    @property
    def pools(self) -> bool:
        """Whether this layer pools its input: the first layer of a block does."""
        return self.leads

    def _shared(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The block's shared value: `compute` of the first layer's pooled input [B, C]."""
        if self.leads:
            self._relay.start(compute(global_pool(x)))
        value = self._relay.take(self.layer)
        self._relay.hand_on(value)
        return value
