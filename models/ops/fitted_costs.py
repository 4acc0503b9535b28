"""Costs of the backends that were fitted to GPUs, kept in a file beside this one, which `scripts/gpu_check.py` writes.

The file is JSON: compute capability, as "9.0" -> bytes of a number, as "2" -> backend -> costs as in `cost.py`.
"""

import functools
import json
from pathlib import Path

import torch

PATH = Path(__file__).with_name("cuda_costs.json")
Table = dict[str, list[list[float]]]


def capability() -> tuple[int, int]:
    """The lowest compute capability of the visible GPUs; (8, 0) where a program is made for a GPU that is not here."""
    count = torch.cuda.device_count()
    return min((torch.cuda.get_device_capability(index) for index in range(count)), default=(8, 0))


@functools.cache
def fitted_costs(capability: tuple[int, int], item_bytes: int) -> Table | None:
    """The costs that were fitted to GPUs of a compute capability; None if none were."""
    return read_costs(PATH).get("{}.{}".format(*capability), {}).get(str(item_bytes))


def read_costs(path: Path) -> dict[str, dict[str, Table]]:
    """All of a file; empty if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}
