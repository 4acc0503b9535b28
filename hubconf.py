"""Models for torch.hub, from a folder of this project or its repository.

model = torch.hub.load("PATH_OF_THE_PROJECT", "kernelwarehouse", "kw1x_resnet18", source="local")
"""

import importlib.util
import os
import sys
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import Any as _Any

import torch

dependencies = ["torch", "torchvision", "timm", "safetensors"]


def kernelwarehouse(
    config: str | dict[str, _Any], checkpoint: str | None = None, num_classes: int = 1000, **settings: _Any
) -> torch.nn.Module:
    """A model, with random weights or those of a checkpoint, in training mode.

    Args:
        config: a config, by its path or dict or the name of one of the project's ("kw1x_resnet18"), or the name of a
            model ("od_resnet50").
        checkpoint: path or URL of a checkpoint; its temperature is restored too.
        num_classes: size of the classifier's output; that of the checkpoint, if there is one.
        settings: settings that replace the config's.

    Returns:
        A model with the input [B, 3, H, W] and the output logits [B, num_classes].

    Raises:
        ValueError: the config or the model is unknown, or the checkpoint is not one of this model.
        FileNotFoundError: there is no such checkpoint.
        ImportError: another version of the package has been imported already.
    """
    package = _package()
    if isinstance(config, str):
        path = package.find_config(config)
        config = path if os.path.isfile(path) or config.endswith(".json") else {"model": config}
    model = package.build_model(config, num_classes=num_classes, **settings)
    if checkpoint is not None:
        content = package.read_checkpoint(checkpoint)
        package.load_weights(model, content)
        package.set_temperature(model, content.get("temperature", package.temperature_range(model)[1]))
    return model


def _package() -> _ModuleType:
    """The folder models/ as the package `kernelwarehouse`: `models` may be the name of a package of the caller.

    Raises:
        ImportError: another version of it has been imported.
    """
    name, folder = "kernelwarehouse", _Path(__file__).resolve().parent / "models"
    if name in sys.modules:
        package = sys.modules[name]
        # this file holds the version
        if _Path(package.__file__).read_bytes() != (folder / "__init__.py").read_bytes():
            raise ImportError(
                f"{name} has been imported from {package.__file__}, in another version than that of {folder.parent}; "
                "use one of them in a process"
            )
        return package
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[name]
        raise
    # models/__init__.py puts `models` here, if that is this package
    return sys.modules[name]
