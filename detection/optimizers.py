"""Layer-wise decay of the learning rate for detectors on ConvNeXt."""

import re
from typing import Any

from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from models import warehouse_stages
from models.config import ConfigError

# groups of the backbone, before the last one, which learns at the full rate and holds everything outside the backbone
GROUPS = 6


def group_of(layer: str) -> int:
    """Group of a layer of ConvNeXt-Tiny, by its name.

    Group 0 is the stem, 1 and 2 are the first two stages, 3 to 5 three blocks each of the third stage, 6 is the fourth.

    Raises:
        ConfigError: ConvNeXt has no such layer.
    """
    if layer.startswith("stem"):
        return 0
    match = re.match(r"stages\.(\d+)\.(?:blocks\.(\d+))?", layer)
    if match is None:
        raise ConfigError(f"layer-wise decay is defined for ConvNeXt; '{layer}' is none of its layers")
    stage, block = int(match[1]), int(match[2] or 0)
    return (1, 2, 3 + min(block // 3, 2), GROUPS)[stage]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecay(DefaultOptimWrapperConstructor):
    """Layer-wise decay: the learning rate of a group k steps before the head is multiplied by decay_rate^k.

    A warehouse belongs to the group of most of its layers. Biases, norms and other 1-d parameters have no weight decay.

    Args:
        optim_wrapper_cfg: mmengine's config of the optimizer.
        paramwise_cfg: dict of `decay_rate` and two settings that are False by default, and True in the released code
            of KernelWarehouse: `warehouses_at_full_rate` takes the warehouses out of the groups, and
            `decay_layer_scale` applies weight decay to layer scales.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Append the parameter groups of a detector to `params`; called by mmengine.

        Raises:
            ConfigError: `paramwise_cfg` lacks `decay_rate` or has an unknown key.
        """
        settings = {"warehouses_at_full_rate": False, "decay_layer_scale": False, **self.paramwise_cfg}
        if set(settings) != {"decay_rate", "warehouses_at_full_rate", "decay_layer_scale"}:
            raise ConfigError(
                f"paramwise_cfg {dict(self.paramwise_cfg)}: LayerDecay needs decay_rate and takes "
                "warehouses_at_full_rate and decay_layer_scale"
            )
        rate, prefix = settings["decay_rate"], "backbone.model."
        warehouses = warehouse_stages(module.backbone.model, group_of)
        groups = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            own = name.removeprefix(prefix)
            step = GROUPS + 1
            if name.startswith(prefix) and not (own in warehouses and settings["warehouses_at_full_rate"]):
                step = warehouses[own] if own in warehouses else group_of(own)
            scale = rate ** (GROUPS + 1 - step)
            plain = parameter.ndim == 1 or name.endswith(".bias")
            plain = plain and not (settings["decay_layer_scale"] and name.endswith(".gamma"))
            decay = 0.0 if plain else self.base_wd
            group = {"params": [], "names": [], "lr": self.base_lr * scale, "weight_decay": decay}
            group = groups.setdefault((step, decay), group)
            group["params"].append(parameter)
            group["names"].append(name)
        params.extend(groups[key] for key in sorted(groups))
