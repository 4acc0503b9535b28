"""Replaces layers of any model by dynamic ones."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from .anatomy import heads_of
from .classifier import ResetClassifier
from .methods import method_named
from .methods.method import Method
from .replacement import STATIC, put, refuse_others
from .report import ConversionReport, reasons_of, report_of


def convert(
    model: nn.Module,
    method: str = "kw",
    *,
    layers: str | Sequence[str] | None = None,
    keep_weights: bool = False,
    dry_run: bool = False,
    **settings: Any,
) -> nn.Module | ConversionReport:
    """Replace layers of a model by dynamic ones, in place.

    A layer that cannot be replaced is left static, with a warning: another module reads its weight or has the same, or
    it pads with other values than zeros. Hooks of replaced layers move to the dynamic ones.

    Args:
        model: any model; its attribute `conversion` then maps every replaced layer to its warehouse or method, and
            every other convolution and linear layer to "static: " and the reason.
        method: name of the method.
        layers: one or several words of `anatomy.select` ("all", "1x1", "3x3", "last_N_blocks", "classifier", glob
            patterns of names); None: the method's own choice.
        keep_weights: start from the static kernels, so that the model still computes the same, at every temperature
            ("we": without `standardise`). With a budget below 1, "kw" and "kw_star" have fewer cells than the kernels
            need: they start from the closest, and a warning names the layers that differ most.
        dry_run: change nothing, and return a report of the layers, warehouses, parameters and multiply-adds instead.
        settings: of the method, as in `convert(model, "odconv", kernel_num=4)`; those of "kw" and "kw_star" are
            described in `methods/kernel_warehouse`.

    Returns:
        The model, or the report.

    Raises:
        ValueError: names the layer or warehouse that does not fit; the model is left unchanged.
    """
    make_job = functools.partial(method_named(method), layers=layers, keep_weights=keep_weights, **settings)
    if dry_run:
        return report_of(model, method, make_job, _carry_out)
    return _carry_out(make_job(model), keep_weights)


def _carry_out(job: Method, keep_weights: bool = False) -> nn.Module:
    """Replace the layers of a job's model."""
    model = job.model
    if not isinstance(getattr(model, "conversion", {}), dict):
        raise ValueError(
            "the model has an attribute 'conversion' of its own, but it lists the dynamic layers; rename it"
        )
    with job.prepared():
        names = _without_unfit(job, job.choose())
        modules = dict(model.named_modules(remove_duplicate=False))
        refuse_others([modules[name] for name in names], names, job.layers, job.name)
        put(model, job.make(names), keep_weights)
    others = job.finish(names)
    labels = {name: job.label(name) for name in [*names, *others]}
    earlier = {name: label for name, label in getattr(model, "conversion", {}).items() if not label.startswith(STATIC)}
    static = {name: STATIC + reason for name, reason in reasons_of(model, job.static).items() if name not in labels}
    model.conversion = {**earlier, **labels, **static}
    heads = [name for name in heads_of(model, ()) if name in labels]
    if heads and callable(getattr(model, "reset_classifier", None)):
        model.reset_classifier = ResetClassifier(model, job, heads)
    return model


def _without_unfit(job: Method, names: list[str]) -> list[str]:
    """The chosen layers without those that the method cannot replace in this network.

    Raises:
        ValueError: such a layer was chosen by its full name, or there is no other.
    """
    unfit = job.unfit(names)
    for name, reason in unfit.items():
        if name in job.named():
            raise ValueError(f"{job.name}: layer '{name}' cannot be replaced, since {reason}; leave it out")
    if not unfit:
        return names
    for reason in dict.fromkeys(unfit.values()):
        those = [name for name, own in unfit.items() if own == reason]
        warnings.warn(f"{job.name}: left static, since {reason}: {', '.join(those)}", stacklevel=4)
    job.static.update(unfit)
    return job.leave_static(names, list(unfit))
