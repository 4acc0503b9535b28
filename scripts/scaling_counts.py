#!/usr/bin/env python
"""Count what a training step computes, moves and exchanges, for the simulation of scripts/scaling.py.

    python scripts/scaling_counts.py --csv results/scaling_models.csv

Every row of Table 2 of KernelWarehouse runs one forward and backward pass on the device "meta", which has shapes but no
data, in bfloat16. Dynamic layers compute in the naive order: assemble a kernel for every sample, and convolve in
groups. Its operations are those of eager PyTorch without any fusion. For each, the operations of products and the bytes
of inputs and outputs are counted. Both grow linearly with the batch, so that two batch sizes give a line.

A bucket of gradients (DistributedDataParallel's 25 MiB, the first 1 MiB) can be sent once its last gradient is ready.
`buckets` lists "MiB of float32 gradients @ share of the backward pass's operations that are done then". A warehouse is
ready only after the first of its layers, hence late.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from models import build_model, read_config
from models.ops.control import forced_backend

BATCHES = (16, 32)
SIZE = 224
# of DistributedDataParallel
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
FIELDS = (
    "config", "parameters", "flops_per_image", "product_bytes_per_image", "product_bytes_per_step",
    "other_bytes_per_image", "other_bytes_per_step", "buckets",
)  # fmt: skip


class Counter(TorchDispatchMode):
    """Sums over the operations inside the context.

    Attributes:
        flops: two for every multiply-add of convolutions and matrix products.
        product_bytes: that these read and write.
        other_bytes: that all other operations read and write; views cost nothing.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.product_bytes = self.other_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if getattr(func, "is_view", False) or func.namespace != "aten":
            return out
        tensors = [value for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if func._overloadpacket is torch.ops.aten.convolution_backward:
            # torch's own count takes a convolution in groups for a full one
            self.flops += sum(args[10][:2]) * convolution_flops(args[0], args[2])
            self.product_bytes += moved
        elif (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
            self.product_bytes += moved
        elif func._schema.name not in _FREE:
            self.other_bytes += moved
        return out


def convolution_flops(out, weight):
    """Two for every multiply-add of a convolution, or of one of its two gradients, from its output and its weight."""
    return 2 * weight.numel() * out.shape[0] * math.prod(out.shape[2:])


# operations that only make a tensor, or another view of one
_FREE = {"aten::_unsafe_view", "aten::detach", "aten::empty", "aten::empty_like", "aten::empty_strided"}


def pass_of(model, batch):
    """Counts of a forward and backward pass on `batch` images; and the parameters as their gradients become ready.

    Returns:
        The counter; its flops in the forward pass; and a list of (bytes of a float32 gradient, flops until then).
    """
    ready = []
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p: ready.append((4 * p.numel(), counter.flops)))
        for parameter in model.parameters()
    ]
    model.zero_grad(set_to_none=True)
    x = torch.empty(batch, 3, SIZE, SIZE, device="meta", dtype=torch.bfloat16)
    with forced_backend("naive"), Counter() as counter:
        loss = model(x).sum()
        forward = counter.flops
        loss.backward()
    for handle in handles:
        handle.remove()
    return counter, forward, ready


def buckets(ready, first=FIRST_BUCKET, cap=BUCKET):
    """Gather gradients in the order of (bytes, time) into buckets: a list of (bytes, time), as torch's reducer does.

    A bucket is closed by the gradient with which it reaches its capacity: `first` bytes, and `cap` from the second on.
    """
    result, size = [], 0
    for count, time in ready:
        size += count
        if size >= (cap if result else first):
            result.append((size, time))
            size = 0
    return result + ([(size, ready[-1][1])] if size else [])


def counted(path):
    """The row of a config."""
    with torch.device("meta"):
        model = build_model(read_config(path), num_classes=1000)
    model = model.to("meta", torch.bfloat16).train()
    passes = [pass_of(model, batch) for batch in BATCHES]
    (low, _, _), (high, forward, ready) = passes
    span = BATCHES[1] - BATCHES[0]

    def line(name):
        slope = (getattr(high, name) - getattr(low, name)) / span
        return slope, getattr(high, name) - slope * BATCHES[1]

    backward = high.flops - forward
    sent = buckets([(size, (flops - forward) / backward) for size, flops in ready])
    product, other = line("product_bytes"), line("other_bytes")
    return {
        "config": str(path),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_image": round(line("flops")[0]),
        "product_bytes_per_image": round(product[0]),
        "product_bytes_per_step": round(product[1]),
        "other_bytes_per_image": round(other[0]),
        "other_bytes_per_step": round(other[1]),
        "buckets": " ".join(f"{size / 2**20:.2f}@{share:.3f}" for size, share in sent),
    }


def table_2(path):
    """The rows of KernelWarehouse's Table 2, and of ConvNeXt-Tiny as released, in the papers' tables."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["recipe"].startswith("advanced") and row["config"]]
    return [row for row in rows if row["source"] == "KW T2" or row["setting"] == "1x (released)"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=Path("results/scaling_models.csv"), help="default: %(default)s")
    args = parser.parse_args()
    rows = [counted(row["config"]) for row in table_2("configs/tables.csv")]
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{args.csv}: {len(rows)} models, {math.fsum(row['parameters'] for row in rows) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
