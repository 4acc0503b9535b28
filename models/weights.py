"""Loading weights strictly: this project's, and the released ones of KernelWarehouse and ODConv."""

import torch

from .reader import read_checkpoint
from .released import own_keys


def state_dict_of(checkpoint, model_key="model|module"):
    """The state dict inside a checkpoint: under one of the keys, `state_dict`, or the whole of it."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"a checkpoint is a dict, not {type(checkpoint).__name__}")
    for key in [*model_key.split("|"), "state_dict"]:
        if isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    if not checkpoint or not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise ValueError(
            f"no weights found: the checkpoint has the keys {list(checkpoint)[:6]} and none of {model_key}|state_dict"
        )
    return checkpoint


def _fit_shape(value, like):
    """Released 1x1 convolutions are linear layers here, and layer scales vectors: the same numbers, fewer ones."""
    squeezed = [tuple(size for size in tensor.shape if size != 1) for tensor in (value, like)]
    return value.reshape(like.shape) if value.shape != like.shape and squeezed[0] == squeezed[1] else value


def matched_state(model, state, without=()):
    """A state dict (ours or released) under the model's names; its differences from the model's.

    Returns (state, missing keys, unexpected keys, keys of another shape).
    """
    own = model.state_dict()
    state = own_keys(model, state, without)
    state = {key: _fit_shape(value, own[key]) if key in own else value for key, value in state.items()}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    return state, missing, unexpected, wrong


def load_weights(model, checkpoint, model_key="model|module", without=()):
    """Load a checkpoint into a model, strictly.

    checkpoint: a path, a loaded checkpoint or a bare state dict; this project's or a released one.
    without: names of modules that were taken off the model, and that the checkpoint may still have.
    Returns the model.  Raises ValueError that lists the first keys that differ, and changes nothing then.
    """
    name = "the checkpoint"
    if not isinstance(checkpoint, dict):
        name = f"'{checkpoint}'"
        checkpoint = read_checkpoint(checkpoint)
    state, missing, unexpected, wrong = matched_state(model, state_dict_of(checkpoint, model_key), without)
    if without:
        gone = [key for key in unexpected if key.startswith(tuple(f"{name}." for name in without))]
        state = {key: value for key, value in state.items() if key not in gone}
        unexpected = [key for key in unexpected if key not in gone]
    if missing or unexpected or wrong:
        own = model.state_dict()
        shapes = [f"{key} {list(state[key].shape)} for {list(own[key].shape)}" for key in wrong]
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if keys
        ]
        raise ValueError(f"{name} is of another model: {'; '.join(parts)}. Use the config that it was trained with")
    model.load_state_dict(state)
    return model
