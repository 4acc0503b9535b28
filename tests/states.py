"""Compare the states of two runs."""

import hashlib

import torch


def digest(value):
    """A hash of all that a checkpoint holds."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(str(value.dtype).encode() + value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: digest(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [digest(entry) for entry in value]
    return value


def difference_of(ours, theirs):
    """The entries in which two checkpoints differ; options and the identity of the run may."""
    names = (ours.keys() | theirs.keys()) - {"args", "run"}
    return sorted(name for name in names if digest(ours.get(name)) != digest(theirs.get(name)))
