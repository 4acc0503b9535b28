"""Layer-wise decay of the learning rate for detectors on ConvNeXt."""

import re

from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.optim import DefaultOptimWrapperConstructor

from models import warehouse_stages
from models.config import ConfigError

# of the backbone; whatever is not in it learns at the full rate
GROUPS = 6


def group_of(layer):
    """Group, from 0, of a layer of ConvNeXt-Tiny by its name: stem, stages 1 and 2, the third in threes, the fourth."""
    if layer.startswith("stem"):
        return 0
    match = re.match(r"stages\.(\d+)\.(?:blocks\.(\d+))?", layer)
    if match is None:
        raise ConfigError(f"layer-wise decay is defined for ConvNeXt; '{layer}' is none of its layers")
    stage, block = int(match[1]), int(match[2] or 0)
    return (1, 2, 3 + min(block // 3, 2), GROUPS)[stage]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecay(DefaultOptimWrapperConstructor):
    """A group k steps before the head learns decay_rate^k as fast; biases, norms and other 1-d parameters do not decay.

    paramwise_cfg: dict(decay_rate=...).  A warehouse is of the group of most of its layers.  As the released code of
    KernelWarehouse does: warehouses_at_full_rate=True takes them out of the groups, decay_layer_scale=True lets layer
    scales decay.
    """

    def add_params(self, params, module, **kwargs):
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
