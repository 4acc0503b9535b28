"""Puts dynamic layers in the places of static ones."""

from torch import nn

from .anatomy import is_dynamic, kind_of


def refuse_others(modules, names, classes, method):
    """Raises ValueError for a layer that the classes cannot replace, or that another method has replaced."""
    for module, name in zip(modules, names, strict=True):
        if kind_of(module) not in classes:
            known = ", ".join(f"torch.nn.{kind.__name__}" for kind in classes)
            dynamic = is_dynamic(module)
            remedy = "is dynamic already; a layer has one method" if dynamic else f"cannot be replaced, only {known}"
            raise ValueError(f"{method}: layer '{name}', a {type(module).__module__}.{type(module).__name__}, {remedy}")


def replacement(module, name, classes, **kwargs):
    """The dynamic layer that takes the place of a static one."""
    kwargs.update(device=module.weight.device, dtype=module.weight.dtype)
    if isinstance(module, nn.Linear):
        return classes[nn.Linear](module.in_features, module.out_features, module.bias is not None, **kwargs)
    if module.padding_mode != "zeros":
        raise ValueError(f"padding_mode '{module.padding_mode}' of '{name}' is not supported, use zeros")
    return classes[type(module)](
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


def put(model, replaced, keep_weights):
    """Put layers, by name, in the places of static ones: in all of them, where a module stands in several."""
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
    # a method that cannot keep weights has left the model unchanged
    for name, layer in replaced.items():
        for path in paths[id(modules[name])]:
            parent, _, child = path.rpartition(".")
            setattr(modules[parent], child, layer)
