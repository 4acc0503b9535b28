"""What a method is to the rest of the project: a name, layers, settings, and the steps of a conversion."""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ..anatomy import main_layers, select
from ..options import Option
from ..replacement import replacement

_TYPES = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d, "Linear": nn.Linear}


class Setting(NamedTuple):
    """A setting of a method: its default there, and what configs and the command line may give."""

    default: Any
    option: Option


def layer_classes(prefix, namespace):
    """Type of a static layer -> the class that replaces it, for those of `PREFIXConv1d` and so on that there are."""
    return {kind: namespace[prefix + name] for name, kind in _TYPES.items() if prefix + name in namespace}


class Method:
    """A method of dynamic convolution; an instance is one conversion of one model.

    `conversion.convert` calls choose, make and finish, in this order; what they do by default is enough for layers that
    stand alone.

    name: in configs (`NAME_resnet18`) and for `convert`.  aliases: other names of it.
    layers: type of a static layer -> the class that replaces it (`layer_classes`).
    settings: name -> `Setting`; any other setting is refused.
    released_classifier: whether the networks that its authors released draw their classifier as static ones do.
    """

    name: str = ""
    aliases: tuple[str, ...] = ()
    layers: Mapping[type, type] = {}
    settings: Mapping[str, Setting] = {}
    released_classifier = True

    def __init__(self, model, *, layers=None, keep_weights=False, **given):
        """layers: words of `anatomy.select`, or one of them; None: the method's own choice.

        keep_weights: whether the layers are to start from the static weights.
        Raises ValueError for an unknown setting.
        """
        self.model, self.keep_weights = model, keep_weights
        self.words = [layers] if isinstance(layers, str) else layers
        unknown = [key for key in given if key not in self.settings]
        if unknown:
            known = ", ".join(["layers", *self.settings])
            raise ValueError(f"{self.name} has no setting '{unknown[0]}'; it takes {known}")
        self.given = {name: self._value(name, given.get(name)) for name in self.settings}

    def _value(self, name, value):
        """The value of a setting: its default for None, and one value where a config gives a list of one."""
        default, option = self.settings[name]
        if value is None:
            return default
        if option.nargs == "*":
            return [value] if isinstance(value, str) else value
        if option.nargs is None and isinstance(value, (list, tuple)):
            if len(value) != 1:
                raise ValueError(f"{self.name}: {name} has {len(value)} values; only warehouses have one each")
            return value[0]
        return value

    def prepared(self):
        """A context in which the model is as the layers need it; where its body fails, the model is as it was."""
        return contextlib.nullcontext()

    def choose(self):
        """The names of the layers to replace.  Raises ValueError where there are none."""
        names = select(self.model, self.words) if self.words else self.default_layers()
        if not names:
            raise ValueError(f"{self.name}: this model has no layer that it replaces; name them with `layers`")
        return names

    def default_layers(self):
        """The names of the layers to replace where `layers` does not name them, in the model's order."""
        return main_layers(self.model)

    def arguments(self, names):
        """Name -> keyword arguments of the layer's class."""
        return dict.fromkeys(names, self.given)

    def make(self, names):
        """Name -> the layer that replaces it.  Raises ValueError that names the layer."""
        modules, made = dict(self.model.named_modules(remove_duplicate=False)), {}
        for name, arguments in self.arguments(names).items():
            try:
                made[name] = replacement(modules[name], name, self.layers, **arguments)
            except ValueError as error:
                raise ValueError(f"{self.name}: layer '{name}': {error}") from None
        return made

    def finish(self, names):
        """What is left to do once the layers are in their places; the names of other layers that were replaced."""
        return []

    def label(self, name):
        """What `model.conversion` says of a layer."""
        return self.name
