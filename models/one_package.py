"""One set of classes where this package is imported under both of its names.

It is `models` in a checkout and `kernelwarehouse` where it is installed. Imported twice, each class would exist twice,
and `isinstance` would fail silently. So the package that is imported second becomes another name of the first.
"""

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAMES = ("models", "kernelwarehouse")
DISTRIBUTION = "kernelwarehouse"


def join(package: str, version: str) -> None:
    """Turn a package that is being imported into another name of this one, if this one has been imported already.

    Its `__init__.py` calls this. A package of somebody else that is called `models` is left alone.

    Args:
        package: the name under which it is being imported.
        version: its version.

    Raises:
        ImportError: another version has been imported under the other name.
    """
    if package not in NAMES:
        return
    first = sys.modules.get(NAMES[1 - NAMES.index(package)])
    if getattr(first, "__distribution__", None) != DISTRIBUTION or first.__name__ == package:
        return
    if first.__version__ != version:
        raise ImportError(
            f"{package} {version} ({sys.modules[package].__file__}) and {first.__name__} {first.__version__} "
            f"({first.__file__}) are two versions of one package, and cannot be used in one process; import one of "
            "them, or install the checkout with pip install ."
        )
    finder = _OtherName(package, first.__name__)
    sys.meta_path.insert(0, finder)
    finder.share()


class _OtherName(MetaPathFinder, Loader):
    """Finds `alias.x` as the very module `package.x`."""

    def __init__(self, alias: str, package: str) -> None:
        self.alias, self.package = alias, package

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{self.alias}.") or importlib.util.find_spec(self._own(fullname)) is None:
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        importlib.import_module(self._own(module.__name__))
        # puts the package's module in place of the given one, which is empty
        self.share()

    def share(self) -> None:
        """Enter all modules of the package that are loaded so far under the alias, too.

        After importing a submodule, Python makes it an attribute of its parent. Once more for the alias, this would
        replace an object of the same name that the parent defines, such as the function `ops.mixture_conv`.
        """
        for name, module in sys.modules.copy().items():
            if name == self.package or name.startswith(f"{self.package}."):
                sys.modules[self.alias + name.removeprefix(self.package)] = module

    def _own(self, name: str) -> str:
        return self.package + name.removeprefix(self.alias)
