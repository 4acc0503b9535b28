"""What a conversion does to a network: its layers, warehouses, parameters and multiply-adds, before and after."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .anatomy import is_dynamic, layers_of
from .counting import count_layers
from .messages import first_line, quiet
from .methods.kernel_warehouse import warehouse_layers
from .methods.method import Method
from .replacement import STATIC
from .trial import copy_of, without_numbers

# names of static layers that a report lists for every reason
LISTED = 4


@dataclass(frozen=True)
class WarehouseReport:
    """A warehouse of a converted network.

    Args:
        name: of the warehouse.
        layers: names of the layers that take cells from it.
        cells: n.
        mixtures: m_t, those of all of its layers.
        cell: shape of a cell (co, ci, *k).
        cell_parameters: of all cells.
        attention_parameters: of the attentions of its layers.
    """

    name: str
    layers: tuple[str, ...]
    cells: int
    mixtures: int
    cell: tuple[int, ...]
    cell_parameters: int
    attention_parameters: int


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` does to a network; `str(report)` is a page to read.

    Args:
        method: name of the method.
        layers: name of every layer that becomes dynamic -> its warehouse or method.
        static: name of every other convolution and linear layer -> why it stays static.
        warehouses: of KernelWarehouse, otherwise none.
        parameters: of the network, before and after.
        multiply_adds: for one input, before and after; None if no input is found that the network accepts.
        input_shape: of this input, without the batch.
    """

    method: str
    layers: dict[str, str]
    static: dict[str, str]
    warehouses: tuple[WarehouseReport, ...]
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int] | None
    input_shape: tuple[int, ...]

    def __str__(self) -> str:
        lines = [f"{self.method}: {len(self.layers)} of {len(self.layers) + len(self.static)} layers become dynamic"]
        lines.append(_change("parameters", self.parameters))
        if self.multiply_adds:
            shape = "x".join(map(str, self.input_shape))
            lines.append(f"{_change('multiply-adds', self.multiply_adds)}, for an input of {shape}")
        if self.warehouses:
            lines += ["", *_table(self.warehouses)]
        else:
            lines += ["", "dynamic: " + ", ".join(self.layers)]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.static.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            lines.append(f"static, {reason}: {', '.join(names[:LISTED])}{more}")
        return "\n".join(lines)


def _change(what: str, values: tuple[int, int]) -> str:
    before, after = values
    return f"{what}: {before / 1e6:,.2f} M before, {after / 1e6:,.2f} M after (x {after / before:.3f})"


def _table(warehouses: tuple[WarehouseReport, ...]) -> list[str]:
    header = ("warehouse", "layers", "mixtures", "cells", "cell", "in cells", "in attentions")
    rows = [
        (
            house.name,
            str(len(house.layers)),
            str(house.mixtures),
            str(house.cells),
            "x".join(map(str, house.cell)),
            f"{house.cell_parameters:,}",
            f"{house.attention_parameters:,}",
        )
        for house in warehouses
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return ["  ".join(f"{text:{width}s}" for text, width in zip(row, widths, strict=True)) for row in [header, *rows]]


def report_of(
    model: nn.Module, method: str, make_job: Callable[[nn.Module], Method], carry_out: Callable[[Method], nn.Module]
) -> ConversionReport:
    """Report a conversion without making it: a copy that has shapes only is converted instead.

    Args:
        model: is left unchanged.
        method: name of the method.
        make_job: makes the conversion of a model.
        carry_out: carries it out and returns the model.

    Raises:
        ValueError: the network cannot be copied or converted.
    """
    mode = without_numbers()
    trial = make_job(model).trial
    try:
        copied = copy_of(model, mode)
    except Exception as error:
        # a module may refuse to be copied in any way
        raise ValueError(
            f"the network cannot be copied for a report ({first_line(error)}); convert it instead"
        ) from None
    shape = trial.shape[1:]
    with mode, quiet():
        before = _costs(copied, shape)
    job = make_job(copied)
    # that of the original, since the copy has no numbers
    job.__dict__["trial"] = trial
    with mode:
        dynamic = carry_out(job)
    with mode, quiet():
        after = _costs(dynamic, shape)
    modules, warehouses = dict(dynamic.named_modules()), []
    for key, layers in warehouse_layers(dynamic).items():
        name = key.split(".")[1]
        house = dynamic.warehouses[name]
        attentions = sum(p.numel() for layer in layers for p in modules[layer].attention.parameters())
        warehouses.append(
            WarehouseReport(
                name,
                tuple(layers),
                house.n,
                sum(house.mixtures.values()),
                tuple(house.cells.shape[1:]),
                house.cells.numel(),
                attentions,
            )
        )
    entries = dynamic.conversion
    return ConversionReport(
        method=method,
        layers={name: label for name, label in entries.items() if not label.startswith(STATIC)},
        static={name: label.removeprefix(STATIC) for name, label in entries.items() if label.startswith(STATIC)},
        warehouses=tuple(warehouses),
        parameters=(before[0], after[0]),
        multiply_adds=None if before[1] is None or after[1] is None else (before[1], after[1]),
        input_shape=shape,
    )


def _costs(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, int | None]:
    """Parameters, and multiply-adds where there is a shape and the network runs without numbers."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if not shape:
        return parameters, None
    try:
        rows = count_layers(model, shape=shape)
    except Exception:
        # a network may do with numbers what it cannot do with shapes alone
        return parameters, None
    return parameters, sum(row.multiply_adds for row in rows)


def reasons_of(model: nn.Module, known: dict[str, str]) -> dict[str, str]:
    """Name of every static convolution and linear layer of a converted model -> why it stays static.

    Args:
        model: after the conversion.
        known: reasons that the method gave.
    """
    return {
        name: known.get(name, "not among the layers that the method replaces")
        for name, module in layers_of(model).items()
        if not is_dynamic(module)
    }
