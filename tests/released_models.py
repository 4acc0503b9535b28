"""What the released implementations computed, and the weights for which they did.

tests/data/*.json.gz hold, for each of the 20 released configs of KernelWarehouse and 10 released models of ODConv, the
keys and shapes of its state dict, and loss, logits and gradient norms in float64 for weights that `fill.py` makes from
the keys.
"""

import gzip
import json
from pathlib import Path

import fill
import torch


def _recorded(name):
    return json.loads(gzip.decompress((Path(__file__).parent / f"data/{name}.json.gz").read_bytes()))


KW, OD = _recorded("kernelwarehouse"), _recorded("odconv")
for record in OD.values():
    record["config"] = {key: record[key] for key in ("model", "kernel_num", "reduction")}
RELEASED = {**KW, **OD}


def released_state(record):
    """The state dict of a record, in float32."""
    shapes = {
        key: torch.empty(shape, dtype=torch.int64 if key.endswith("num_batches_tracked") else torch.float32)
        for key, shape in record["keys"].items()
    }
    return fill.fill_(shapes, record["seed"])
