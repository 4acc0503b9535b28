"""The names that other repositories give to the same weights: the released checkpoints, and torchvision's.

A released model names its layers after torchvision (MobileNetV2) or the original repository (ConvNeXt), and numbers
its warehouses; timm's names are used here.
"""

import re

_MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)


def _mobilenetv2_name(name):
    """torchvision's `features.4.conv.1.0` -> timm's `blocks.2.0.conv_dw`."""
    if match := re.match(r"classifier\.1\.?(?:conv\.)?(.*)", name):
        return f"classifier.{match[1]}"
    match = re.match(r"features\.(\d+)\.(.*)", name)
    if match is None:
        return None
    index, rest = int(match[1]), match[2]
    last = 1 + sum(_MOBILENET_BLOCKS)
    if index in (0, last):
        conv, norm = ("conv_stem", "bn1") if index == 0 else ("conv_head", "bn2")
        return re.sub(r"^0\.", conv + ".", re.sub(r"^1\.", norm + ".", rest))
    index -= 1
    for stage, count in enumerate(_MOBILENET_BLOCKS):
        if index < count:
            break
        index -= count
    parts = {
        "conv.0.0": "conv_dw" if stage == 0 else "conv_pw",
        "conv.0.1": "bn1",
        "conv.1.0": "conv_dw",
        "conv.1.1": "bn2",
        "conv.2": "conv_pwl",
        "conv.3": "bn3",
    }
    if stage == 0:
        parts = {"conv.0.0": "conv_dw", "conv.0.1": "bn1", "conv.1": "conv_pw", "conv.2": "bn2"}
    for part, ours in parts.items():
        if rest.startswith(part + "."):
            return f"blocks.{stage}.{index}.{ours}{rest[len(part) :]}"
    return None


_CONVNEXT_RULES = (
    (r"downsample_layers\.0\.(\d+)\.", r"stem.\1."),
    (r"downsample_layers\.(\d+)\.(\d+)\.", r"stages.\1.downsample.\2."),
    (r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _convnext_name(name):
    for pattern, ours in _CONVNEXT_RULES:
        name = re.sub(pattern, ours, name, count=1)
    return name


def _rename_of(keys):
    """The function that turns the names of a state dict's family into timm's."""
    if any(key.startswith("features.") for key in keys):
        return _mobilenetv2_name
    if any(key.startswith("downsample_layers.") for key in keys):
        return _convnext_name
    return lambda name: name


def own_keys(model, state, without=()):
    """A state dict of a released model under this project's names; a key that the model has itself stays as it is.

    model: the model to load into, whose own names and the order of whose warehouses count.
    without: names of modules that were taken off it.
    """
    own = set(model.state_dict())
    # DistributedDataParallel's prefix
    state = {key if key in own else key.removeprefix("module."): value for key, value in state.items()}
    rename = _rename_of([key for key in state if key not in own])
    # of the whole model, also where its classifier was taken off
    warehouses = list(dict.fromkeys(getattr(model, "conversion", {}).values()))
    taken_off = tuple(f"{name}." for name in without)
    result = {}
    for key, value in state.items():
        if match := re.fullmatch(r"warehouse_manager\.weights\.(\d+)", key):
            index = int(match[1])
            ours = f"warehouses.{warehouses[index]}.cells" if index < len(warehouses) else key
        else:
            ours = rename(key)
        known = ours in own or (ours is not None and ours.startswith(taken_off))
        result[ours if key not in own and known else key] = value
    return result
