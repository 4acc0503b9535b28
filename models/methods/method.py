"""The interface of a method to the rest of the project: a name, layers, settings, and the steps of a conversion."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..anatomy import family_name, is_dynamic, layers_of, main_layers, select, stem_of, tied
from ..options import Option
from ..replacement import replacement, unfit_padding
from ..trial import Trial, try_out

_TYPES = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d, "Linear": nn.Linear}


class Setting(NamedTuple):
    """A setting of a method.

    Args:
        default: its value in this method if none is given.
        option: what configs and the command line may give.
    """

    default: Any
    option: Option


def layer_classes(prefix: str, namespace: Mapping[str, Any]) -> dict[type[nn.Module], type[nn.Module]]:
    """Map the type of a static layer to the class that replaces it, found by its name.

    Args:
        prefix: of the classes' names, as "KW" in `KWConv1d`, `KWConv2d`, `KWConv3d` and `KWLinear`.
        namespace: where to look for them; those that do not exist are left out.
    """
    return {kind: namespace[prefix + name] for name, kind in _TYPES.items() if prefix + name in namespace}


class Method:
    """A method of dynamic convolution; an instance is one conversion of one model.

    `conversion.convert` enters the context `prepared` and calls `choose`, `make` and, after the context, `finish`.
    Their defaults suffice for layers that do not depend on each other.

    Attributes of a subclass:
        name: in configs (`NAME_resnet18`) and for `convert`.
        aliases: other names of the method.
        layers: type of a static layer -> the class that replaces it (see `layer_classes`).
        settings: name -> `Setting`; any other setting is refused.
        released_classifier: whether the networks that the method's authors released initialise their classifier as
            released static networks do.

    Args:
        model: the model to convert.
        layers: one or several words of `anatomy.select`; None: the method's own choice.
        keep_weights: whether the layers start from the static weights.
        given: settings of the method.

    Attributes of an instance:
        static: name of a layer that the method leaves static -> why.

    Raises:
        ValueError: a setting is unknown.
    """

    name: str = ""
    aliases: tuple[str, ...] = ()
    layers: Mapping[type, type] = {}
    settings: Mapping[str, Setting] = {}
    released_classifier = True

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | Sequence[str] | None = None,
        keep_weights: bool = False,
        **given: Any,
    ) -> None:
        self.model, self.keep_weights = model, keep_weights
        self.words = [layers] if isinstance(layers, str) else layers
        unknown = [key for key in given if key not in self.settings]
        if unknown:
            known = ", ".join(["layers", *self.settings])
            raise ValueError(f"{self.name} has no setting '{unknown[0]}'; it takes {known}")
        self.given = {name: self._value(name, given.get(name)) for name in self.settings}
        self.static: dict[str, str] = {}

    def _value(self, name: str, value: Any) -> Any:
        """The value of a setting: its default for None, and the only item where a config gives a list of one."""
        default, option = self.settings[name]
        if value is None:
            return default
        if option.nargs == "*":
            return [value] if isinstance(value, str) else value
        if option.nargs is None and isinstance(value, (list, tuple)):
            if len(value) != 1:
                raise ValueError(f"{self.name}: {name} has {len(value)} values; only warehouses take one value each")
            return value[0]
        return value

    @functools.cached_property
    def trial(self) -> Trial:
        """What a pass shows of the static layers."""
        layers = layers_of(self.model).items()
        return try_out(self.model, [name for name, module in layers if not is_dynamic(module)])

    @functools.cached_property
    def is_known(self) -> bool:
        """Whether the model is of a family that needs no trial, which takes a second and more."""
        return family_name(self.model) != "other"

    def stem(self) -> str:
        """The name of the layer that sees the input."""
        ran = [] if self.is_known else self.trial.order
        modules = dict(self.model.named_modules())
        convolutions = [name for name in ran if hasattr(modules[name], "kernel_size")]
        return next(iter([*convolutions, *ran, *stem_of(self.model)]), "")

    def in_order(self, names: Sequence[str]) -> list[str]:
        """The names in the order in which the layers first run; those that did not run in the trial come last."""
        if self.is_known:
            return list(names)
        order = dict.fromkeys(name for name in self.trial.order if name in set(names))
        return [*order, *(name for name in names if name not in order)]

    def unfit(self, names: Sequence[str]) -> dict[str, str]:
        """Those of the chosen layers that the method cannot replace in this network -> why."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        found = {name: reason for name in names if (reason := unfit_padding(modules[name]))}
        found |= dict.fromkeys(tied(self.model, names), "another module has the same weight")
        if self.is_known:
            return found
        read = "another module of the network reads its weight"
        elsewhere = "the first dimension of its input is not that of the samples"
        found |= {name: elsewhere for name in names if self.trial.has_no_samples(name)}
        return found | {name: read for name in names if name in self.trial.read}

    def prepared(self) -> contextlib.AbstractContextManager[None]:
        """A context that changes the model as the layers need it, and undoes the changes if its body fails."""
        return contextlib.nullcontext()

    def choose(self) -> list[str]:
        """The names of the layers to replace.

        Raises:
            ValueError: there are none.
        """
        names = select(self.model, self.words) if self.words else self.default_layers()
        if not names:
            raise ValueError(f"{self.name}: this model has no layer that it replaces; name them with `layers`")
        return names

    def named(self) -> Sequence[str]:
        """The words that name layers in what the user gave: patterns, or full names."""
        return self.words or ()

    def leave_static(self, names: Sequence[str], static: Sequence[str]) -> list[str]:
        """The names of the chosen layers without those that must stay static.

        Raises:
            ValueError: none is left.
        """
        left = [name for name in names if name not in static]
        if not left:
            reasons = "; ".join(f"'{name}', since {self.static[name]}" for name in static[:3])
            raise ValueError(f"{self.name}: all layers of this model that it replaces must stay static: {reasons}")
        return left

    def default_layers(self) -> list[str]:
        """The names of the layers to replace if `layers` is not given, in the model's order."""
        return main_layers(self.model)

    def arguments(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Name of a layer -> keyword arguments of its class, besides those of the static layer."""
        return dict.fromkeys(names, self.given)

    def make(self, names: Sequence[str]) -> dict[str, nn.Module]:
        """Name of a layer -> the dynamic layer that replaces it.

        Raises:
            ValueError: names the layer whose arguments do not fit.
        """
        modules, made = dict(self.model.named_modules(remove_duplicate=False)), {}
        for name, arguments in self.arguments(names).items():
            try:
                made[name] = replacement(modules[name], name, self.layers, **arguments)
            except ValueError as error:
                raise ValueError(f"{self.name}: layer '{name}': {error}") from None
        return made

    def finish(self, names: Sequence[str]) -> list[str]:
        """Complete the model once the layers are in their places; returns the names of other layers replaced here."""
        return []

    def renewed(self, name: str) -> nn.Module | None:
        """The dynamic layer for the classifier of this name, which a static one of another size has replaced.

        None: it stays static.
        """
        return self.make([name])[name]

    def label(self, name: str) -> str:
        """The entry of `model.conversion` for a layer."""
        return self.name
