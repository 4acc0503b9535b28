"""Registers all dynamic networks with timm, under the names that configs use. Importing this module does it.

    import timm
    import models.timm_models

    model = timm.create_model("kw_resnet18", num_classes=10, in_chans=1)
    features = timm.create_model("od_resnet50", features_only=True, out_indices=(1, 2, 3, 4), kernel_num=4)
    timm.list_models("kw_convnext*")

Beside timm's arguments they take the settings of the method. They have no pretrained weights of their own: with
`pretrained=True`, give a checkpoint as `pretrained_cfg_overlay={"file": PATH}`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from timm.models import register_model
from timm.models._features import FeatureGetterNet
from torch import nn

from .build import BACKBONES, PREFIXES, REGISTERED
from .conversion import convert
from .options import METHOD_KEYS
from .pruning import drop_unused
from .trial import try_out
from .weights import load_trained


class _Names(set):
    """The names of a module, which timm fills: it looks for each before it appends it, which takes a list too long."""

    append = set.add


__all__ = _Names()


def create(prefix: str, backbone: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a dynamic network as `timm.create_model` does.

    Args:
        prefix: one of `PREFIXES` that names a method.
        backbone: name of a network of timm's or of `BACKBONES`.
        pretrained: load the file that `pretrained_cfg` or `pretrained_cfg_overlay` names, strictly but for a
            classifier of another size, with the temperature that it tells.
        kwargs: arguments of `timm.create_model`, and settings of the method.

    Raises:
        ValueError: settings do not fit; the network has no feature maps; there is no file of weights.
    """
    method = PREFIXES[prefix][0]
    settings = {name: kwargs.pop(name) for name in list(kwargs) if name in METHOD_KEYS}
    path = _file_of(kwargs.get("pretrained_cfg"), kwargs.pop("pretrained_cfg_overlay", None)) if pretrained else None
    if pretrained and path is None:
        raise ValueError(
            f"{prefix}_{backbone} has no pretrained weights; give the path of a checkpoint as "
            "pretrained_cfg_overlay={'file': PATH}"
        )
    kwargs = {**kwargs, "pretrained_cfg": None} if isinstance(kwargs.get("pretrained_cfg"), dict) else kwargs
    name, own = BACKBONES.get(backbone, (backbone, {}))
    own = dict(own)
    stem_pool = own.pop("stem_pool", True)

    def finish(model: nn.Module) -> nn.Module:
        if not stem_pool:
            model.maxpool = nn.Identity()
        model = convert(model, method, **settings)
        if path is not None:
            load_trained(model, path)
        return model

    if kwargs.get("features_only"):
        # timm calls this with the whole static model, which names its layers as the classifier's checkpoints do
        return timm.create_model(name, **{**own, **kwargs, "feature_cls": functools.partial(_features, finish)})
    return finish(timm.create_model(name, **{**own, **kwargs}))


def _features(
    finish: Callable[[nn.Module], nn.Module], model: nn.Module, out_indices: Sequence[int], **_: Any
) -> FeatureGetterNet:
    """Feature maps [B, C, H, W] of a model that is converted whole; layers and warehouses after them are dropped."""
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{type(model).__name__} has no forward_intermediates, and so no features_only")
    shape = try_out(model, []).shape
    found = FeatureGetterNet(finish(model), out_indices=out_indices)
    parameter = next(found.parameters())
    if shape:
        drop_unused(found.model, lambda: found(torch.zeros(1, *shape[1:]).to(parameter)))
    return found.train()


def _file_of(*configs: Any) -> str | None:
    return next((config["file"] for config in configs if isinstance(config, dict) and config.get("file")), None)


def _register() -> None:
    networks = [*timm.list_models(), *BACKBONES]
    for prefix, (method, _) in PREFIXES.items():
        if method is None:
            continue
        for backbone in networks:
            name = f"{prefix}_{backbone}"
            # KW (1/2x) is for MobileNetV2 alone
            if (method == "kw1d2x" and not backbone.startswith("mobilenetv2_")) or timm.is_model(name):
                continue
            entry = functools.partial(create, prefix, backbone)
            entry.__name__, entry.__module__ = name, __name__
            register_model(entry)
            REGISTERED.add(name)


_register()
# timm finds the networks in its own registry; none of them is an attribute here
__all__ = ["create"]
