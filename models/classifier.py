"""timm's `reset_classifier` of a model whose classifier is dynamic."""

from typing import Any

from torch import nn

from .methods.kernel_warehouse import drop_unused_warehouses
from .methods.method import Method
from .replacement import STATIC, put
from .temperature import get_temperature


class ResetClassifier:
    """Replaces the classifier by one of another size that belongs to the same method.

    It stands in the place of timm's method on one model, and calls it.

    Args:
        model: converted, with timm's `reset_classifier`.
        job: its conversion.
        heads: names of the linear layers of its classifier that are dynamic.
    """

    def __init__(self, model: nn.Module, job: Method, heads: list[str]) -> None:
        self.model, self.job, self.heads = model, job, heads

    def __call__(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Reset the classifier; 0 classes remove it, with the warehouses that it alone used."""
        model, temperature = self.model, get_temperature(self.model)
        type(model).reset_classifier(model, num_classes, *args, **kwargs)
        for name in self.heads:
            static = model.get_submodule(name)
            model.conversion.pop(name, None)
            if not isinstance(static, nn.Linear):
                continue
            dynamic = self.job.renewed(name)
            if dynamic is None:
                model.conversion[name] = f"{STATIC}its warehouse has other layers, so that it cannot take another size"
                continue
            put(model, {name: dynamic}, keep_weights=False)
            if callable(getattr(dynamic, "set_temperature", None)):
                dynamic.set_temperature(temperature)
            model.conversion[name] = self.job.label(name)
        drop_unused_warehouses(model)
