"""Kernel Representation (KR): its settings, and how a network is converted. The layers are in `layer.py`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...anatomy import has_mlps, heads_of, is_deep, residual_units
from ...options import Option
from ...replacement import put, refuse_others, replacement
from ..method import Method, Setting, layer_classes
from ..odconv import ATTENTIONS, ODConvMethod
from ..relay import Relay
from ..settings import ATTENTION_SHARING, ATTENTIONS_OPTION, KERNEL_NUM, REDUCTION
from . import layer as kr
from .layer import KernelRepresentation, KRClassifier, KRConv1d, KRConv2d, KRConv3d, KRLinear

__all__ = ["KRClassifier", "KRConv1d", "KRConv2d", "KRConv3d", "KRLinear", "KRMethod"]


class KRMethod(Method):
    """KR replaces the layers that ODConv replaces, and the classifier by one that sees the last representation."""

    name = "kr"
    layers = layer_classes("KR", globals())
    settings = {
        "kernel_num": Setting(1, KERNEL_NUM),
        "reduction": Setting(None, REDUCTION),
        "fusion_width": Setting(
            "both",
            Option(
                str,
                None,
                "KR: the reduction is of feature and representation together, or of the feature alone",
                choices=kr.FUSION_WIDTHS,
            ),
        ),
        "attentions": Setting(None, ATTENTIONS_OPTION),
        "attention_sharing": Setting(None, ATTENTION_SHARING),
        "representation": Setting(
            True,
            Option(bool, None, "KR: layers see the representation of those before; false: their input only (Table 6)"),
        ),
        "representation_dim": Setting(
            None,
            Option(
                int,
                None,
                "KR: what a unit adds to the representation; null: 16 or 32 (section 4.1)",
                low=1,
                high=4096,
            ),
        ),
        "representation_start": Setting(
            None,
            Option(
                str,
                None,
                "KR: the first representation: of low frequencies, or learned; null: the former where the network sees "
                "an image",
                choices=tuple(kr.STARTS),
            ),
        ),
        "representation_norm": Setting(True, Option(bool, None, "KR: BatchNorm of representations (Table 6)")),
    }

    default_layers = ODConvMethod.default_layers

    def choose(self) -> list[str]:
        # the representation passes from layer to layer as they run
        return self.in_order(super().choose())

    def unfit(self, names: Sequence[str]) -> dict[str, str]:
        if self.is_known or not self.given["representation"] or not self.trial.order:
            return super().unfit(names)
        runs, found = Counter(self.trial.order), {}
        for name in names:
            if not runs[name]:
                found[name] = "it does not run in evaluation"
            elif runs[name] > 1:
                found[name] = f"it runs {runs[name]} times in a pass"
            elif not self.trial.has_whole_samples(name):
                found[name] = "it takes parts of an image as samples, which have no representation of their own"
        return {**found, **super().unfit(names)}

    def arguments(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Name -> keyword arguments of each layer: its part of its unit, and the relay.

        One relay serves all units, and the representation grows from the first of them up to the classifier.
        """
        modules = dict(self.model.named_modules())
        heads = self._checked_heads(modules, names)
        own = {key: self.given[key] for key in ("kernel_num", "fusion_width")} | self._coefficients()
        passes_on = self.given["representation"]
        size = self.given["representation_dim"] or (16 if is_deep(self.model) else 32)
        whole, units = Relay([*names, *heads]), residual_units(names)
        arguments, given = {}, kr.START_SIZE if passes_on else 0
        for unit in units:
            layers = [modules[name] for name in unit]
            # in a model without a classifier, no layer would read what the last unit appends
            generated = size if passes_on and (heads or unit is not units[-1]) else 0
            try:
                parts = kr.unit_parts(
                    [_geometry(layer) for layer in layers],
                    **own,
                    given=given,
                    generated=generated,
                    norm=self.given["representation_norm"],
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

    def _start(self) -> str:
        """The given kind of the first representation, or the one that fits the network."""
        return self.given["representation_start"] or ("frequency" if self._sees_images() else "learned")

    def _sees_images(self) -> bool:
        return len(getattr(self.model.get_submodule(self.stem()), "kernel_size", ())) == 2

    def _coefficients(self) -> dict[str, Any]:
        """The given reduction and kinds of coefficients; what is not given follows from the kind of the network.

        The costs in the paper's tables show which fit it: see `layer.py`.
        """
        if has_mlps(self.model):
            fitting = {"reduction": 1 / 8, "attentions": ("filter",), "attention_sharing": False}
        else:
            fitting = {"reduction": 1 / 16, "attentions": ATTENTIONS, "attention_sharing": True}
        if self.given["attentions"] is not None and self.given["attention_sharing"] is None:
            # if only the attentions are given, the kernels share them, as in ODConv
            fitting["attention_sharing"] = True
        return {key: value if self.given[key] is None else self.given[key] for key, value in fitting.items()}

    def _checked_heads(self, modules: Mapping[str, nn.Module], names: Sequence[str]) -> list[str]:
        """The names of the classifier's layers. Raises ValueError for settings and models that do not fit."""
        size, start = self.given["representation_dim"], self._start()
        if size is not None and size < 1:
            raise ValueError(f"kr: representation_dim {size} is below 1")
        if start not in kr.STARTS:
            raise ValueError(f"kr: unknown representation_start '{start}', choose from {', '.join(kr.STARTS)}")
        if hasattr(self.model, "kernel_representation"):
            raise ValueError("kr: the model has a kernel representation already; convert all of its layers at once")
        if not self.given["representation"]:
            return []
        stem = self.stem()
        if start == "frequency" and not self._sees_images():
            raise ValueError(
                f"kr: representation_start 'frequency' needs a 2-d convolution that sees the image, but the first "
                f"layer, '{stem}', is a {type(modules[stem]).__name__}; use 'learned'"
            )
        heads = heads_of(self.model, names)
        taken = [head for head in heads if head in names]
        if taken:
            raise ValueError(
                f"kr: the classifier '{taken[0]}' takes the last representation; leave it out of `layers`, or set "
                "representation to false"
            )
        refuse_others([modules[head] for head in heads], heads, {nn.Linear: None}, "kr")
        return heads

    def finish(self, names: Sequence[str]) -> list[str]:
        """Add the start of the representation to the model's root, and replace the classifier.

        Returns the names of the classifier's layers.
        """
        if not self.given["representation"]:
            return []
        stem, last = self.model.get_submodule(self.stem()), self.model.get_submodule(names[-1])
        heads = last._relay.layers[len(names) :]
        for head in heads:
            self.head_settings = {"representation": last.generator.out_features, "relay": last._relay}
            put(self.model, {head: self.renewed(head)}, self.keep_weights)
        self.model.kernel_representation = KernelRepresentation(
            last._relay,
            getattr(stem, "in_channels", None),
            self._start(),
            device=last.weight.device,
            dtype=last.weight.dtype,
        )
        self.model.kernel_representation.attach(self.model, stem, last)
        return list(heads)

    def renewed(self, name: str) -> nn.Module:
        static = self.model.get_submodule(name)
        layer = replacement(static, name, {nn.Linear: KRClassifier}, layer=name, **self.head_settings)
        # the weights that the model's own initialisation gave its classifier
        layer.weight.data[:, : static.in_features].copy_(static.weight.data)
        return layer


def _geometry(module: nn.Module) -> tuple[int, int, int, int]:
    """(C_in, C_out, taps, groups) of a static layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, 1, 1
    return module.in_channels, module.out_channels, module.weight[0, 0].numel(), module.groups
