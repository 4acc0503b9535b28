#!/usr/bin/env python
"""Convert many networks with every method, and write what became of them to a CSV and a table.

    python scripts/conversion_table.py --output results/conversion.csv          # goes on where it was
    python scripts/conversion_table.py --networks timm:resnet18 --methods kw    # prints one row

Every network keeps its random static weights (`keep_weights=True`). The error is that of its output, over the largest
output of the static network, in float32 and evaluation mode; KernelWarehouse's temperature is as `convert` leaves it.
"""

import argparse
import copy
import csv
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from startup import before_torch

before_torch()

import torch
from networks import NETWORKS, make
from torch import Tensor

from models import convert, load_weights
from models.anatomy import is_dynamic, layers_of

METHODS = ("kw", "odconv", "dyconv", "dcd", "condconv", "kr")
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


@dataclass
class Row:
    """What a method made of a network.

    Attributes:
        network, method: their names.
        parameters_before, parameters: of the static and of the dynamic network.
        layers, dynamic: convolutions and linear layers, and those of them that are dynamic.
        error: of the output with the weights kept, relative to the largest output of the static network.
        finite: whether every gradient of a training step was finite.
        round_trip: whether a network made anew computes the same with the state dict of this one.
        refused: the message of `convert`; nothing else is known then.
    """

    network: str
    method: str
    parameters_before: int = 0
    parameters: int = 0
    layers: int = 0
    dynamic: int = 0
    error: float = float("nan")
    finite: bool = False
    round_trip: bool = False
    refused: str = ""


def measure(name: str, method: str) -> Row:
    """Convert the network `name` of scripts/networks.py.

    Raises:
        Exception: the converted network fails, which it never should.
    """
    torch.manual_seed(0)
    net, x = make(name)
    with torch.no_grad():
        for layer in layers_of(net).values():
            # the classifiers of some networks start with zeros, so that their outputs would show nothing
            if not layer.weight.any():
                layer.weight.normal_(0, 0.02)
        # LeViT keeps tensors of this pass, and one with a graph could not be copied
        expected = _first(net.eval()(x))
    row = Row(name, method, _parameters(net), layers=len(layers_of(net)))
    with warnings.catch_warnings():
        # on what stays static, which the row counts
        warnings.simplefilter("ignore")
        try:
            warm = convert(copy.deepcopy(net), method, keep_weights=True)
        except ValueError as error:
            row.refused = str(error)
            return row
        other = convert(net, method)
    row.parameters, row.dynamic = _parameters(warm), sum(map(is_dynamic, warm.modules()))
    with torch.no_grad():
        row.error = ((_first(warm.eval()(x)) - expected).abs().max() / expected.abs().max()).item()
    _first(warm.train()(x)).square().mean().backward()
    row.finite = all(p.grad.isfinite().all() for p in warm.parameters() if p.grad is not None)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.save({"model": warm.state_dict()}, f"{folder}/checkpoint.pth")
        load_weights(other, f"{folder}/checkpoint.pth")
        row.round_trip = torch.equal(_first(other.eval()(x)), _first(warm.eval()(x)))
    return row


def _first(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV of this script; none if there is no such file."""
    if not path.is_file():
        return []
    types = {field.name: field.type for field in fields(Row)}
    with path.open(newline="") as file:
        return [
            Row(**{key: text == "True" if types[key] is bool else types[key](text) for key, text in row.items()})
            for row in csv.DictReader(file)
        ]


def table(rows: Iterable[Row]) -> list[str]:
    """A table of networks over methods, and one of the methods' worst errors."""
    found = {(row.network, row.method): row for row in rows}
    methods = [method for method in METHODS if any(key[1] == method for key in found)]
    lines = [f"| network | parameters, M | {' | '.join(methods)} |", "|---|---:|" + "---:|" * len(methods)]
    for network in dict.fromkeys(key[0] for key in found):
        cells = [_cell(found.get((network, method))) for method in methods]
        before = next(row.parameters_before for row in found.values() if row.network == network)
        lines.append(f"| {network} | {before / 1e6:.2f} | {' | '.join(cells)} |")
    lines += ["", "| method | networks | converted | largest error of a warm start | finite gradients | round trip |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for method in methods:
        own = [row for row in found.values() if row.method == method]
        made = [row for row in own if not row.refused]
        counts = [len(own), len(made), f"{max(row.error for row in made):.1e}" if made else ""]
        counts += [sum(row.finite for row in made), sum(row.round_trip for row in made)]
        lines.append(f"| {method} | {' | '.join(map(str, counts))} |")
    return [f"{line}\n" for line in lines]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return "refused" if row.refused else f"{row.parameters / row.parameters_before:.2f}x, {row.dynamic}/{row.layers}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="of scripts/networks.py; default: all")
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--output", type=Path, help="a CSV; the page with the same name and .md gets the table")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = read_rows(args.output) if args.output else []
    done = {(row.network, row.method) for row in rows}
    for name in args.networks:
        for method in args.methods:
            if (name, method) in done:
                continue
            rows.append(measure(name, method))
            print(f"{name} {method}: {rows[-1].refused or _cell(rows[-1])}", file=sys.stderr, flush=True)
            if args.output:
                write(args.output, rows)
    if not args.output:
        print("".join(table(rows)), end="")
    return 0


def write(path: Path, rows: list[Row]) -> None:
    """Write the CSV, and the table into the page beside it, whose other text stays."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) | {"error": f"{row.error:.1e}"} for row in rows)
    page = path.with_suffix(".md")
    head, _, rest = (page.read_text() if page.is_file() else BEGIN + END).partition(BEGIN)
    page.write_text(head + BEGIN + "".join(table(rows)) + END + rest.partition(END)[2])


if __name__ == "__main__":
    sys.exit(main())
