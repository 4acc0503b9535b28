"""The temperature tau of the attention (equation 4), for all dynamic layers of a model at once."""


def _dynamic_layers(model):
    return [module for module in model.modules() if callable(getattr(module, "set_temperature", None))]


def set_temperature(model, temperature):
    """Set tau, 1 (kernels are their own cells) to 0 (attention alone), in every dynamic layer, and nothing else."""
    temperature = float(temperature)
    if not 0.0 <= temperature <= 1.0:
        raise ValueError(f"temperature {temperature} is not in [0, 1]")
    for layer in _dynamic_layers(model):
        layer.set_temperature(temperature)


def get_temperature(model):
    """The tau of a model's dynamic layers; 0.0 for a static model.  Waits for the device."""
    layers = _dynamic_layers(model)
    return float(layers[0].attention.temperature) if layers else 0.0
