"""Puts dynamic layers in the places of static ones."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from .anatomy import is_dynamic, kind_of

# begins the entry of a layer in `model.conversion` that stays static; the reason follows
STATIC = "static: "

# what a module keeps its users' hooks in
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_is_full_backward_hook", "_backward_pre_hooks",
)  # fmt: skip


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


def unfit_padding(module: nn.Module) -> str | None:
    """Why no dynamic layer pads as a static one does; None if one does."""
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"it pads in the mode '{module.padding_mode}', not with zeros"
    if getattr(module, "padding", 0) == "same":
        sizes = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(size % 2 for size in sizes):
            return "its padding 'same' is not the same on both sides"
    return None


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
        ValueError: its arguments do not fit.
    """
    kwargs.update(device=module.weight.device, dtype=module.weight.dtype)
    if isinstance(module, nn.Linear):
        return classes[nn.Linear](module.in_features, module.out_features, module.bias is not None, **kwargs)
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
    """Put dynamic layers in the places of static ones, with their biases, their training mode and their hooks.

    Args:
        model: changed in place.
        replaced: name of a static layer -> the dynamic layer. A module that a model holds under several names is
            replaced under all of them.
        keep_weights: start from the static kernels.

    Raises:
        ValueError: the model is a layer itself, or the static weights cannot be kept.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if "" in replaced:
        raise ValueError(
            f"the model is a {type(modules['']).__name__} itself, and only layers inside a model are replaced; put it "
            "into an nn.Sequential"
        )
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
        for hooks in HOOKS:
            # the same dicts, so that a handle still removes its hook
            setattr(layer, hooks, getattr(static, hooks))
    # only now: a method that cannot keep the weights raises above, and the model is left unchanged
    for name, layer in replaced.items():
        for path in paths[id(modules[name])]:
            parent, _, child = path.rpartition(".")
            setattr(modules[parent], child, layer)
