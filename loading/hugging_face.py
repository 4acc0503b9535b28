"""Hugging Face's package `datasets`, which has the name of this project's `datasets.py`.

timm's readers hfds/ and hfids/ import it by that name, so that among the loaded modules it takes the place of this
project's file. What was imported from `datasets.py` before goes on working.
"""

import importlib
import sys
from pathlib import Path

from models.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def import_hugging_face_datasets() -> None:
    """Make `import datasets` find Hugging Face's package.

    Raises:
        ConfigError: it is not installed.
    """
    own, paths = sys.modules.get("datasets"), sys.path
    if hasattr(own, "load_dataset"):
        return
    sys.modules.pop("datasets", None)
    sys.path = [path for path in paths if Path(path or ".").resolve() != ROOT]
    try:
        importlib.import_module("datasets")
    except ImportError:
        sys.modules["datasets"] = own
        raise ConfigError("hfds/ and hfids/ need Hugging Face's package: pip install datasets") from None
    finally:
        sys.path = paths
