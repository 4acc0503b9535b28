"""What a layer hands to the layers after it within one forward pass."""

import threading

from ..anatomy import block_of
from .layer import global_pool


class Relay(threading.local):
    """A value that passes from layer to layer, and is gone with the last one.

    Every thread has its own, so that forward passes at the same time do not meet.  Layers hold it as an unregistered
    reference: a copy of the model gets one relay of its own, and nothing of it is saved.
    layers: the names of those that pass it on, in their order.
    `enter` begins a pass within another one, which goes on after `leave`.
    """

    def __init__(self, layers=()):
        self.layers, self.outer = tuple(layers), ()
        self.clear()

    def enter(self):
        self.outer = (self.value, self.position, self.outer)
        self.clear()

    def leave(self):
        self.value, self.position, self.outer = self.outer or (None, 0, ())

    def clear(self):
        self.value, self.position = None, 0

    def start(self, value):
        """The value that the first layer finds."""
        self.value, self.position = value, 0

    def take(self, layer):
        """The value for a layer.  Raises RuntimeError where it is not that layer's turn."""
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

    def hand_on(self, value):
        """The value for the next layer; after the last one it is gone."""
        self.position += 1
        if self.position < len(self.layers):
            self.value = value
        else:
            self.clear()

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = Relay(self.layers)
        return copied

    def __reduce__(self):
        return Relay, (self.layers,)


def block_relays(names):
    """Layer -> the relay of the layers of its block, or one of its own."""
    groups = {}
    for name in names:
        groups.setdefault(block_of(name) or name, []).append(name)
    return {name: relay for group in groups.values() for relay in [Relay(group)] for name in group}


class BlockLayer:
    """A layer of a block whose first layer computes, from the block's input, what all of its layers share."""

    def _join(self, relay, layer):
        """relay: of the layers of the block, None for a layer that stands alone; layer: this one's name among them."""
        self.layer = layer
        object.__setattr__(self, "_relay", relay or Relay([layer]))
        self.leads = self._relay.layers[0] == layer

    @property
    def pools(self):
        """Whether this layer pools its input, as the first one of a block does."""
        return self.leads

    def _shared(self, x, compute):
        """What the first layer computes of its pooled input [B, C]."""
        if self.leads:
            self._relay.start(compute(global_pool(x)))
        value = self._relay.take(self.layer)
        self._relay.hand_on(value)
        return value
