"""Any classification model of this project as the backbone of an mmdetection detector."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from mmdet.models import FasterRCNN, MaskRCNN
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from checkpoints import read
from models import build_model, load_weights, set_temperature, temperature_range, warehouse_layers
from models.config import ConfigError, find_config
from models.pruning import drop_unused

# with fewer images per process, BatchNorm's statistics are too noisy to train with
LEAST_BATCH = 8


@MODELS.register_module()
class ClassificationBackbone(BaseModule):
    """The feature maps of a classification model, from stride 4 on.

    Input [B, 3, H, W]; output a tuple of [B, channels[i], H / stride, W / stride], one map for each of `out_indices`.
    The map of the last stage is the one that the classifier pools (so MobileNetV2's has 1280 channels). The temperature
    is the last one of the training schedule, and stays there.

    Args:
        config: a classification config: a path (may be relative to the project), a dict, or a timm name.
        out_indices: stages whose maps are returned, counted from 0 at stride 4.
        frozen_stages: number of stages to freeze after the stem, with their attentions and every warehouse that they
            use; 0 freezes the stem alone, -1 nothing.
        freeze_warehouses: False leaves the cells of frozen stages trainable, as in the released code of
            KernelWarehouse.
        norm_eval: keep every BatchNorm, also those of attentions, on its running statistics.
        sync_bn: compute BatchNorm's statistics over all processes.
        drop_path: rate of stochastic depth; replaces the classification config's, which is for longer training.
        num_classes: size of the classifier, which is dropped. It matters only where the classifier shares a warehouse
            with other layers.
        init_cfg: dict(type="Pretrained", checkpoint=PATH) with a classification checkpoint of this project or a
            released one; None: random weights.
        overrides: keys that override the config's, such as layer_scale_init_value.

    Raises:
        ConfigError: the model has no such feature maps, or an argument does not fit it.
    """

    def __init__(
        self,
        config: str | Path | dict[str, Any],
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        freeze_warehouses: bool = True,
        norm_eval: bool = False,
        sync_bn: bool = False,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        init_cfg: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(init_cfg)
        if init_cfg is not None and (init_cfg.get("type") != "Pretrained" or set(init_cfg) != {"type", "checkpoint"}):
            raise ConfigError(f"init_cfg {dict(init_cfg)}: use None or dict(type='Pretrained', checkpoint=PATH)")
        model = build_model(_config(config), num_classes, drop_path=drop_path, **overrides)
        set_temperature(model, temperature_range(model)[1])
        self.name = getattr(model, "default_cfg", {}).get("architecture", type(model).__name__)
        stages = _stages(model, self.name)
        out_indices = tuple(out_indices)
        if not out_indices or list(out_indices) != sorted(set(out_indices) & set(range(len(stages)))):
            raise ConfigError(
                f"out_indices {out_indices}: {self.name} has the stages 0 to {len(stages) - 1}, ascending"
            )
        if not -1 <= frozen_stages <= len(stages):
            raise ConfigError(f"frozen_stages {frozen_stages}: {self.name} has {len(stages)} stages")
        chosen = [stages[i] for i in out_indices]
        self.indices = [stage["index"] for stage in chosen]
        self.whole = out_indices[-1] == len(stages) - 1
        self.channels = [stage["num_chs"] for stage in chosen]
        self.strides = [stage["reduction"] for stage in chosen]
        if self.whole:
            self.channels[-1] = model.num_features
        self.norm_eval, self.warned = norm_eval, norm_eval or sync_bn
        self.model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if sync_bn else model
        self.dropped = self._drop_unused()
        self.frozen = self._freeze([stage["module"] for stage in stages], frozen_stages, freeze_warehouses)
        self.train()

    def _features(self, x: torch.Tensor) -> list[torch.Tensor]:
        if not self.whole:
            return self.model.forward_intermediates(x, indices=self.indices, stop_early=True, intermediates_only=True)
        last, features = self.model.forward_intermediates(x, indices=self.indices)
        return [*features[:-1], last]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.training and not self.warned and len(x) < LEAST_BATCH:
            self.warned = True
            if any(isinstance(module, _BatchNorm) and module.training for module in self.modules()):
                warnings.warn(
                    f"BatchNorm of {self.name} is trained on {len(x)} images a process; "
                    f"set norm_eval=True, or sync_bn=True, for fewer than {LEAST_BATCH}",
                    stacklevel=2,
                )
        return tuple(self._features(x))

    def _drop_unused(self) -> list[str]:
        """Drop what no feature map depends on; returns the names of these modules and warehouses."""
        parameter = next(self.model.parameters())
        x = torch.zeros(1, 3, 64, 64, device=parameter.device, dtype=parameter.dtype)
        return drop_unused(self.model, lambda: self._features(x))

    def _freeze(self, stages: list[str], count: int, warehouses: bool) -> list[str]:
        """Freeze the stem and the first stages.

        Args:
            stages: module names of all stages.
            count: number of stages to freeze; below 0: not even the stem.
            warehouses: freeze also the warehouses that the frozen layers use.

        Returns:
            Names of the modules that must stay in evaluation mode.
        """
        if count < 0:
            return []
        # timm registers modules in the order in which they are called
        names = [name for name, _ in self.model.named_modules() if name.split(".")[0] != "warehouses"]
        end = names.index(stages[0])
        if count:
            last = stages[count - 1]
            end = 1 + max(i for i, name in enumerate(names) if name == last or name.startswith(f"{last}."))
        inside = set(names[:end])
        users = warehouse_layers(self.model)
        for name, parameter in self.model.named_parameters():
            if name in users and not warehouses:
                continue
            owners = users[name] if name in users else [name.rpartition(".")[0]]
            if any(owner in inside for owner in owners):
                parameter.requires_grad_(False)
        later = names[end:]
        return [name for name in names[1:end] if not any(other.startswith(f"{name}.") for other in later)]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self.frozen if mode else ():
            self.model.get_submodule(name).eval()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Load the checkpoint of `init_cfg`, without its classifier and otherwise strictly.

        Raises:
            ConfigError: the checkpoint is of another model, or cannot be read.
        """
        if self.init_cfg is None:
            return
        path = self.init_cfg["checkpoint"]
        checkpoint = read(path)
        try:
            load_weights(self.model, checkpoint, without=self.dropped)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: {error}") from None


def _config(config: str | Path | dict[str, Any]) -> str | Path | dict[str, Any]:
    """The config as `build_model` takes it: a timm name becomes a dict, a path may be relative to the project."""
    if not isinstance(config, (str, Path)):
        return config
    if not str(config).endswith(".json"):
        return {"model": str(config)}
    return find_config(config)


def _stages(model: nn.Module, name: str) -> list[dict[str, Any]]:
    """timm's description of every feature map from stride 4 on, each with its `index` among the maps of all strides."""
    if not hasattr(model, "feature_info") or not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"{name} gives no feature maps (timm's forward_intermediates); use another model")
    info = model.feature_info
    info = info.get_dicts() if hasattr(info, "get_dicts") else info
    stages = [{**stage, "index": i} for i, stage in enumerate(info) if stage["reduction"] >= 4]
    strides = [stage["reduction"] for stage in stages]
    if len(set(strides)) < len(strides):
        raise ConfigError(
            f"{name} has feature maps of the strides {strides}; a pyramid needs a different one per stage"
        )
    return stages


class _FitsBackbone:
    """Mixin for a detector: sets the neck's in_channels to the backbone's, so that no config repeats them."""

    def __init__(self, *args: Any, neck: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, neck=None, **kwargs)
        if neck is not None:
            self.neck = MODELS.build({"in_channels": self.backbone.channels, **neck})


@MODELS.register_module()
class FittedFasterRCNN(_FitsBackbone, FasterRCNN):
    """Faster R-CNN on a `ClassificationBackbone`; its neck needs no in_channels."""


@MODELS.register_module()
class FittedMaskRCNN(_FitsBackbone, MaskRCNN):
    """Mask R-CNN on a `ClassificationBackbone`; its neck needs no in_channels."""
