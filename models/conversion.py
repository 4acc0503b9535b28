"""Replaces layers of any model by dynamic ones."""

from .methods import method_named
from .replacement import put, refuse_others


def convert(model, method="kw", *, layers=None, keep_weights=False, **settings):
    """Replace layers of a model by dynamic ones, in place, and return the model.

    method: its name.  layers: the words of `anatomy.select` ("all", "1x1", "3x3", "last_N_blocks", "classifier", glob
    patterns of names); None: those that the method replaces by itself.  settings: the method's, as
    `convert(model, "odconv", kernel_num=4)`; those of "kw" and "kw_star" are in `methods/kernel_warehouse`.
    keep_weights: start from the static kernels, so that the model computes what it did before ("kw" and "kw_star": at
    temperature 1, for budgets of 1 and more; "we": without `standardise`).
    `model.conversion` then tells layer -> warehouse or method.
    Raises ValueError for what does not fit, naming the layer or warehouse; the model is left unchanged.
    """
    job = method_named(method)(model, layers=layers, keep_weights=keep_weights, **settings)
    with job.prepared():
        names = job.choose()
        modules = dict(model.named_modules(remove_duplicate=False))
        refuse_others([modules[name] for name in names], names, job.layers, job.name)
        put(model, job.make(names), keep_weights)
    others = job.finish(names)
    model.conversion = {**getattr(model, "conversion", {}), **{name: job.label(name) for name in [*names, *others]}}
    return model
