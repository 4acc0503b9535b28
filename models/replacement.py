"""Puts dynamic layers in the places of static ones."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from .anatomy import is_dynamic, kind_of

# begins the entry of a layer in `model.conversion` that stays static; the reason follows
STATIC = "static: "


def refuse_others(
    modules: Iterable[nn.Module], names: Iterable[str], classes: Collection[type[nn.Module]], method: str
) -> None:
    """Refuse layers that a method cannot replace.

    Args:
        modules: the layers.
        names: of the layers, in the same order.
        classes: types of static layers that the method replaces.
        method: name of the method.

    Raises:
        ValueError: names the first layer that is of another type, or that a method has replaced already.
    """
    for module, name in zip(modules, names, strict=True):
        if kind_of(module) not in classes:
            known = ", ".join(f"torch.nn.{kind.__name__}" for kind in classes)
            dynamic = is_dynamic(module)
            remedy = "is dynamic already; a layer has one method" if dynamic else f"cannot be replaced, only {known}"
            raise ValueError(f"{method}: layer '{name}', a {type(module).__module__}.{type(module).__name__}, {remedy}")


def replacement(
    module: nn.Module, name: str, classes: Mapping[type[nn.Module], type[nn.Module]], **kwargs: Any
) -> nn.Module:
    """Make the dynamic layer that replaces a static one.

    Args:
        module: the static layer.
        name: of the layer, for error messages.
        classes: type of a static layer -> class of the dynamic one.
        kwargs: arguments of that class besides those of the static layer.

    Raises:
        ValueError: the layer pads with other values than zeros, or its arguments do not fit.
    """
    kwargs.update(device=module.weight.device, dtype=module.weight.dtype)
    if isinstance(module, nn.Linear):
        return classes[nn.Linear](module.in_features, module.out_features, module.bias is not None, **kwargs)
    if module.padding_mode != "zeros":
        raise ValueError(f"padding_mode '{module.padding_mode}' is not supported, use zeros")
    return classes[kind_of(module)](
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.bias is not None,
        **kwargs,
    )


def put(model: nn.Module, replaced: Mapping[str, nn.Module], keep_weights: bool) -> None:
    """Put dynamic layers in the places of static ones, with their biases and their training mode.

    Args:
        model: changed in place.
        replaced: name of a static layer -> the dynamic layer. A module that a model holds under several names is
            replaced under all of them.
        keep_weights: start from the static kernels.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = {}
    for path, module in modules.items():
        paths.setdefault(id(module), []).append(path)
    for name, layer in replaced.items():
        static = modules[name]
        if layer.bias is not None:
            layer.bias.data.copy_(static.bias.data)
        if keep_weights:
            layer.keep_weight(static.weight.detach())
        layer.train(static.training)
    # only now: a method that cannot keep the weights raises above, and the model is left unchanged
    for name, layer in replaced.items():
        for path in paths[id(modules[name])]:
            parent, _, child = path.rpartition(".")
            setattr(modules[parent], child, layer)
