"""Layer-wise decay of the learning rate for detectors on ConvNeXt."""

import re

from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.optim import DefaultOptimWrapperConstructor

from models import warehouse_layers
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

    paramwise_cfg: dict(decay_rate=...).  A warehouse is of the group of the last layer that uses it.
    """

    def add_params(self, params, module, **kwargs):
        if set(self.paramwise_cfg) != {"decay_rate"}:
            raise ConfigError(f"paramwise_cfg {dict(self.paramwise_cfg)}: LayerDecay takes decay_rate only")
        rate, prefix = self.paramwise_cfg["decay_rate"], "backbone.model."
        users = warehouse_layers(module.backbone.model)
        groups = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            own = name.removeprefix(prefix)
            step = GROUPS + 1
            if name.startswith(prefix):
                step = max(group_of(layer) for layer in users.get(own, [own]))
            scale = rate ** (GROUPS + 1 - step)
            decay = 0.0 if parameter.ndim == 1 or name.endswith(".bias") else self.base_wd
            group = {"params": [], "names": [], "lr": self.base_lr * scale, "weight_decay": decay}
            group = groups.setdefault((step, decay), group)
            group["params"].append(parameter)
            group["names"].append(name)
        params.extend(groups[key] for key in sorted(groups))
