"""Checkpoints as safetensors files: the weights, and beside them, as JSON in the header, what is needed to use them.

The header's metadata hold texts only. A checkpoint's other entries (`args`, `temperature`, ...) are one of them.
"""

import json
import os
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

KEY = "kernelwarehouse"


def to_safetensors(state: dict[str, torch.Tensor], metadata: dict[str, Any]) -> bytes:
    """The content of a safetensors file, which `read_safetensors` reads back.

    Args:
        state: state dict of a model.
        metadata: the other entries of a checkpoint: numbers, texts, and lists and dicts of them. Tuples become lists.

    Raises:
        ValueError: an entry of the state dict is no tensor, or the metadata do not fit into JSON.
    """
    others = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"safetensors files hold tensors only, and '{others[0]}' is none; write a .pth file instead")
    try:
        text = json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the metadata do not fit into JSON: {error}") from None
    # safetensors refuses tensors that share memory or have gaps
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    # a single entry: safetensors writes several in a random order, and equal checkpoints must be equal files
    return save(tensors, {KEY: text})


def read_safetensors(path: str | os.PathLike) -> dict[str, Any]:
    """Read a safetensors file.

    Returns:
        A checkpoint, with its weights under `model`, from a file of `to_safetensors`; a bare state dict from another.

    Raises:
        SafetensorError, OSError, ValueError: the file is damaged, or no safetensors file.
    """
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(KEY)
        state = {key: file.get_tensor(key) for key in file.keys()}
    if text is None:
        return state
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise ValueError(f'its header holds no JSON object under "{KEY}"')
    return {**metadata, "model": state}
