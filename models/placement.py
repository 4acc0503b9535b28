"""Where the methods of `methods.py` go in a network, and what their layers there are given.

`*_layers`: model -> names of the layers to replace where a config does not name them, in the model's order;
the others: (model, names, settings) -> name -> keyword arguments of the layer's class.
"""

import math

from torch import nn

from .layers import dcd, weightnet
from .layers import kernel_representation as kr
from .layers.odconv import ATTENTIONS
from .layers.relay import Relay
from .plans import (
    block_of,
    family_name,
    has_mlps,
    heads_of,
    is_deep,
    main_layers,
    replaceable,
    residual_units,
    select,
    stem_of,
)
from .replacement import put, refuse_others, replacement


def odconv_layers(model):
    """All convolutions but the first and, as released, those in the short cuts of ResNets."""
    return _without_downsampling(main_layers(model))


def _without_downsampling(names):
    """Without the convolutions in the short cuts of blocks."""
    return [name for name in names if not (block_of(name) and "downsample" in name.split("."))]


def condconv_layers(model):
    """The last blocks but their down-sampling convolutions, and the classifier (ODConv, section 3.1)."""
    blocks = 6 if type(model).__name__ == "EfficientNet" else 3
    names = list(main_layers(model))
    if not any(block_of(name) for name in names):
        raise ValueError("condconv: this model has no blocks that are known; name the layers to replace with `layers`")
    chosen = {*select(model, [f"last_{blocks}_blocks"]), *heads_of(model, names)}
    return _without_downsampling([name for name, _ in model.named_modules() if name in chosen])


def _block_relays(names):
    """Layer -> the relay of the layers of its block, or one of its own."""
    groups = {}
    for name in names:
        groups.setdefault(block_of(name) or name, []).append(name)
    return {name: relay for group in groups.values() for relay in [Relay(group)] for name in group}


def condconv_routings(model, names, settings):
    """One routing for the layers of a block, which its first layer computes from the block's input."""
    relays = _block_relays(names)
    return {name: {**settings, "relay": relays[name], "layer": name} for name in names}


def kr_arguments(model, names, settings):
    """The parts of every unit, and the relay of all: the representation grows from the first one to the classifier."""
    modules = dict(model.named_modules())
    heads = _kr_checked_heads(model, modules, names, settings)
    own = {key: settings[key] for key in ("kernel_num", "fusion_width")} | _kr_coefficients(model, settings)
    passes_on, size = settings["representation"], settings["representation_dim"] or (16 if is_deep(model) else 32)
    whole = Relay([*names, *heads])
    arguments, given = {}, kr.START_SIZE if passes_on else 0
    units = residual_units(names)
    for unit in units:
        layers = [modules[name] for name in unit]
        # nobody reads what the last unit of a model without a classifier would append
        generated = size if passes_on and (heads or unit is not units[-1]) else 0
        try:
            parts = kr.unit_parts(
                [_geometry(layer) for layer in layers],
                **own,
                given=given,
                generated=generated,
                norm=settings["representation_norm"],
                device=layers[0].weight.device,
                dtype=layers[0].weight.dtype,
            )
        except ValueError as error:
            raise ValueError(f"kr: layer '{unit[0]}': {error}") from None
        relay = whole if passes_on else Relay(unit)
        for name, part in zip(unit, parts, strict=True):
            arguments[name] = {"kernel_num": own["kernel_num"], "parts": part, "relay": relay, "layer": name}
        given += generated
    return arguments


def _kr_coefficients(model, settings):
    """The reduction and the kinds of coefficients that are given, or else those of a network's kind.

    The costs in the paper's tables tell them: see `layers/kernel_representation.py`.
    """
    if has_mlps(model):
        fitting = {"reduction": 1 / 8, "attentions": ("filter",), "attention_sharing": False}
    else:
        fitting = {"reduction": 1 / 16, "attentions": ATTENTIONS, "attention_sharing": True}
    if settings["attentions"] is not None and settings["attention_sharing"] is None:
        # named attentions are ODConv's
        fitting["attention_sharing"] = True
    return {key: value if settings[key] is None else settings[key] for key, value in fitting.items()}


def _geometry(module):
    """(C_in, C_out, taps, groups) of a static layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, 1, 1
    return module.in_channels, module.out_channels, module.weight[0, 0].numel(), module.groups


def _kr_checked_heads(model, modules, names, settings):
    """The names of the classifier's layers.  Raises ValueError for settings and models that do not fit."""
    size, start = settings["representation_dim"], settings["representation_start"]
    if size is not None and size < 1:
        raise ValueError(f"kr: representation_dim {size} is below 1")
    if start not in kr.STARTS:
        raise ValueError(f"kr: unknown representation_start '{start}', choose from {', '.join(kr.STARTS)}")
    if hasattr(model, "kernel_representation"):
        raise ValueError("kr: the model has a kernel representation already; convert all of its layers at once")
    if not settings["representation"]:
        return []
    stem = stem_of(model)
    if start == "frequency" and len(getattr(modules[stem], "kernel_size", ())) != 2:
        raise ValueError(
            f"kr: representation_start 'frequency' needs a 2-d convolution that sees the image, but the first layer, "
            f"'{stem}', is a {type(modules[stem]).__name__}; use 'learned'"
        )
    heads = heads_of(model, names)
    taken = [head for head in heads if head in names]
    if taken:
        raise ValueError(
            f"kr: the classifier '{taken[0]}' takes the last representation; leave it out of `layers`, or set "
            "representation to false"
        )
    refuse_others([modules[head] for head in heads], heads, {nn.Linear: None}, "kr")
    return heads


def kr_finish(model, names, settings, keep_weights):
    """Put the start of the representation at the model's root, and its end into the classifier."""
    if not settings["representation"]:
        return []
    stem, last = model.get_submodule(stem_of(model)), model.get_submodule(names[-1])
    heads = last._relay.layers[len(names) :]
    for head in heads:
        static = model.get_submodule(head)
        kwargs = {"representation": last.generator.out_features, "relay": last._relay, "layer": head}
        layer = replacement(static, head, {nn.Linear: kr.KRClassifier}, **kwargs)
        # what the model's own way to initialise its classifier gave
        layer.weight.data[:, : static.in_features].copy_(static.weight.data)
        put(model, {head: layer}, keep_weights)
    model.kernel_representation = kr.KernelRepresentation(
        last._relay,
        getattr(stem, "in_channels", None),
        settings["representation_start"],
        device=last.weight.device,
        dtype=last.weight.dtype,
    )
    model.kernel_representation.attach(model, stem, last)
    return heads


def dcd_layers(model):
    """Convolutions without groups in blocks, but those in short cuts and the first; 1x1 ones in MobileNetV2; the
    classifier.
    """
    names = _without_downsampling(main_layers(model))
    modules = dict(model.named_modules())
    if family_name(model) == "MobileNetV2":
        names = [name for name in names if hasattr(modules.get(block_of(name)), "conv_pwl")]
    chosen = {name for name in names if getattr(modules[name], "groups", 1) == 1} | set(heads_of(model, names))
    return [name for name in modules if name in chosen]


def dcd_sizes(model, names, settings):
    """The sizes of the released networks: pooling and rank by the kind of block, a classifier of rank 32."""
    modules, name_of_family = dict(model.named_modules()), family_name(model)
    reduction, result = settings["reduction"], {}
    if reduction is None:
        narrow = name_of_family == "MobileNetV2" and model.conv_stem.out_channels < 24
        reduction = 1 / 8 if narrow else 1 / 16
    heads = heads_of(model, main_layers(model))
    for name in names:
        layer, block, own = modules[name], modules.get(block_of(name)), {}
        if name in heads:
            own = {"rank": 32, "hidden": 32}
        elif name_of_family == "MobileNetV2":
            own = dcd.inverted_bottleneck_sizes(layer.in_channels, layer.out_channels)
        elif name_of_family == "ResNet" and block is not None and not hasattr(block, "conv3"):
            own = {"pool": 2}
        result[name] = {"reduction": reduction, **own}
    return result


def cgc_layers(model):
    """All convolutions larger than 1x1, the first one, too."""
    sizes = {name: getattr(module, "kernel_size", ()) for name, module in replaceable(model).items()}
    return [name for name, size in sizes.items() if math.prod(size) > 1 and "se" not in name.split(".")]


def weightnet_blocks(model, names, settings):
    """One reduced input for the layers of a block, which its first layer computes from the block's input."""
    relays, modules = _block_relays(names), dict(model.named_modules())
    result = {}
    for name in names:
        leader = modules[relays[name].layers[0]]
        width = leader.in_features if isinstance(leader, nn.Linear) else leader.in_channels
        hidden = weightnet.hidden_width(width, settings["reduction"])
        result[name] = {**settings, "hidden": hidden, "relay": relays[name], "layer": name}
    return result
