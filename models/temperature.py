"""The temperature of the attentions, for all dynamic layers of a model at once.

KernelWarehouse's tau (equation 4) falls from 1 to 0. ODConv and DY-Conv divide logits by T, which falls from 30 to 1.
"""

import math

from torch import nn

from .methods.attention_functions import check_temperature


def _dynamic_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if callable(getattr(module, "set_temperature", None))]


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set the temperature of every dynamic layer; nothing else in the model changes.

    KernelWarehouse takes temperatures in [0, 1] (1: kernels are their own cells, 0: attention alone), a softmax takes
    temperatures above 0.

    Raises:
        ValueError: the attention function of a layer does not take this temperature.
    """
    temperature = float(temperature)
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature} is not a number of at least 0")
    layers = _dynamic_layers(model)
    # check all layers first: a refused temperature leaves the model unchanged
    for function in sorted({layer.schedule for layer in layers}):
        check_temperature(temperature, function)
    for layer in layers:
        layer.set_temperature(temperature)


def get_temperature(model: nn.Module) -> float:
    """The temperature of a model's dynamic layers; 0.0 if none has one. On a GPU it waits for the device."""
    layers = _dynamic_layers(model)
    return float(layers[0].attention.temperature) if layers else 0.0


def temperature_range(model: nn.Module) -> tuple[float, float]:
    """The (first, last) temperature of the training schedule: (1, 0) or (30, 1); (0, 0) if no layer has one.

    Evaluation and fine-tuning use the last one.

    Raises:
        ValueError: the model has layers of several methods, whose ranges differ.
    """
    ranges = {layer.temperatures for layer in _dynamic_layers(model)}
    if len(ranges) > 1:
        raise ValueError(f"the layers of this model disagree on the range of temperatures: {sorted(ranges)}")
    return ranges.pop() if ranges else (0.0, 0.0)
