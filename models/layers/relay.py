"""What a layer hands to the layers after it within one forward pass."""

import threading


class Relay(threading.local):
    """A value that passes from layer to layer, and is gone with the last one.

    Every thread has its own, so that forward passes at the same time do not meet.  Layers hold it as an unregistered
    reference: a copy of the model gets one relay of its own, and nothing of it is saved.
    layers: the names of those that pass it on, in their order.
    """

    def __init__(self, layers=()):
        self.layers = tuple(layers)
        self.clear()

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
