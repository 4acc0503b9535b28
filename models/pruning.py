"""Drops the parts of a network that its output does not depend on.

Their parameters would get no gradient, and DistributedDataParallel would stop with an error.
"""

from collections.abc import Callable

import torch
from torch import nn

from .methods.kernel_warehouse import drop_unused_warehouses


def drop_unused(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """Drop the modules that a pass does not call, and the warehouses that no layer uses; returns their names.

    Args:
        model: changed in place; it is left in evaluation mode.
        run: runs the pass.
    """
    called = set()
    hooks = [m.register_forward_hook(lambda module, *_: called.add(id(module))) for m in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            run()
    finally:
        for hook in hooks:
            hook.remove()
    dropped: list[str] = []
    for name, module in list(model.named_modules()):
        if not name or name.split(".")[0] == "warehouses" or name.startswith(tuple(f"{d}." for d in dropped)):
            continue
        if module.state_dict() and not any(id(part) in called for part in module.modules()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
            dropped.append(name)
    return dropped + [f"warehouses.{name}" for name in drop_unused_warehouses(model)]
