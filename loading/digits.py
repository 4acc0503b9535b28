"""scikit-learn's scans of handwritten digits, read from its file without the package around it."""

import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.config import ConfigError

from .images import GreyData

# The split of the figures in results/: train_test_split(range(1797), test_size=360, stratify=labels, random_state=0) of
# scikit-learn, a bit for each scan, which is 1 for those of the test.
OF_THE_TEST = bytes.fromhex(
    "000004883524104000064100934205001a00080100240028062c12001000940a009019120420f8a0028110a000080a882044152449424"
    "0a00a0000004004d80000818020004805c400104008a0100005404800301000020ec409000224840083a8013c20a6980a0000000b08400"
    "804a0184802024041c1008004404684376a810216004480004042a0a4180a5000840b8561c608108008004c80c02004068e00010882008"
    "100380803c008190000100e01008410a0210033282904c044c080680e0102830082008822a6402c24042108a860809081a00c028202421"
    "20138a41500"
)
SCANS = 1797


class DigitsData(GreyData):
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 with 17 grey levels: 1,437 to train, 360 to test.

    The split is stratified and fixed. Source: UCI ML hand-written digits, test set.

    Args:
        is_train: take the part to train on, else the test's.
        transform: applied to every image, an RGB `PIL.Image`.

    Raises:
        ConfigError: scikit-learn is not installed, or has no such file.
    """

    classes = tuple("0123456789")

    def __init__(self, is_train: bool, transform: Callable[[Image.Image], Any]) -> None:
        table = _table()
        chosen = np.unpackbits(np.frombuffer(OF_THE_TEST, np.uint8), count=SCANS) != is_train
        self.images = (table[chosen, :-1] * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)
        self.labels = table[chosen, -1].tolist()
        self.transform = transform


def _table() -> np.ndarray:
    """A row for each scan: its 64 grey levels, 0 to 16, and its label.

    Importing sklearn.datasets would take every process of a run a fifth of the time of its start.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ConfigError("--data_set digits needs scikit-learn: pip install scikit-learn")
    path = Path(package.origin).parent / "datasets/data/digits.csv.gz"
    try:
        with gzip.open(path, "rt") as lines:
            rows = [line.split(",") for line in lines]
        if len(rows) != SCANS:
            raise ValueError(f"{len(rows)} lines, not {SCANS}")
        return np.array(rows, np.int64)
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"--data_set digits: {path} of scikit-learn cannot be read: {error}") from None
