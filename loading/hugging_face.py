"""Import Hugging Face's package `datasets`, which has the same name as this project's `datasets.py`.

timm's readers hfds/ and hfids/ run `import datasets`, so the package must replace this project's file in
`sys.modules`. Names that were imported from `datasets.py` before continue to work.
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
