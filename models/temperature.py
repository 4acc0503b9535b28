"""The temperature of the attentions, for all dynamic layers of a model at once.

KernelWarehouse's tau (equation 4) goes from 1 to 0; the T that ODConv and DY-Conv divide logits by from 30 to 1.
"""

import math

from .methods.attention_functions import check_temperature


def _dynamic_layers(model):
    return [module for module in model.modules() if callable(getattr(module, "set_temperature", None))]


def set_temperature(model, temperature):
    """Set the temperature of every dynamic layer, and nothing else.

    Raises ValueError where a layer's attention function does not take it: KernelWarehouse's is in [0, 1] (1: kernels
    are their own cells, 0: attention alone), that of a softmax above 0.
    """
    temperature = float(temperature)
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature} is not a number of at least 0")
    layers = _dynamic_layers(model)
    # all of them first: a temperature that is refused leaves the model unchanged
    for function in sorted({layer.schedule for layer in layers}):
        check_temperature(temperature, function)
    for layer in layers:
        layer.set_temperature(temperature)


def get_temperature(model):
    """The temperature of a model's dynamic layers; 0.0 where none has one.  Waits for the device."""
    layers = _dynamic_layers(model)
    return float(layers[0].attention.temperature) if layers else 0.0


def temperature_range(model):
    """(first, last) temperature of the training schedule: (1, 0) or (30, 1); (0, 0) where no layer has one.

    The last one is that of evaluation and fine-tuning.  Raises ValueError for a model of several methods that disagree.
    """
    ranges = {layer.temperatures for layer in _dynamic_layers(model)}
    if len(ranges) > 1:
        raise ValueError(f"the layers of this model disagree on the range of temperatures: {sorted(ranges)}")
    return ranges.pop() if ranges else (0.0, 0.0)
