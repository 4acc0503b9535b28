"""Shards that tests make, and the options to read them with."""

import argparse
import io
import json
import tarfile

import numpy as np
import torch
from helpers import quick
from PIL import Image

from models.options import OPTIONS
from utils import Process

CLASSES = 3


def options(root, **changes):
    own = {"data_set": "wds/", "data_path": str(root), "input_size": 16, "num_workers": 0, "batch_size": 2}
    defaults = {name: option.default for name, option in OPTIONS.items()}
    return argparse.Namespace(**{**defaults, **own, **changes})


def process(rank=0, world=1):
    return Process(rank, world, rank, world, torch.device("cpu"))


def png(seed):
    """A picture of its own for each seed."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 9, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def samples(first, count, classes=CLASSES):
    """Files of a shard: the label of image i is i % classes."""
    files = {}
    for index in range(first, first + count):
        files[f"im/{index:04d}.png"] = png(index)
        files[f"im/{index:04d}.cls"] = str(index % classes).encode()
    return files


def write_tar(path, files, tar_format=tarfile.GNU_FORMAT):
    """A tar of files, {name: content, or a tarfile.TarInfo without content}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def make_shards(root, train=(5, 4, 4), val=(3, 4), names=("train-{:04d}.tar", "val-{:04d}.tar")):
    """Shards with so many images each; all images of both splits differ."""
    first = 0
    for name, counts in zip(names, (train, val)):
        for shard, count in enumerate(counts):
            write_tar(root / name.format(shard), samples(first, count))
            first += count
    return root


def make_table(root, train=(5, 4, 4), val=(3, 4), **changes):
    """timm's table of those shards."""
    splits = {}
    for split, name, counts in (("train", "train", train), ("validation", "val", val)):
        files = [f"{name}-{shard:04d}.tar" for shard in range(len(counts))]
        splits[split] = {
            "name": split, "filenames": files, "shard_lengths": list(counts), "num_samples": sum(counts),
        }  # fmt: skip
        splits[split].update(changes)
    (root / "_info.json").write_text(json.dumps({"name": "made", "splits": splits}))
    return root


def independent(paths):
    """(pixels, label) of all samples in the order of the tars, as Python's tarfile reads them."""
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
        for name, label in content.items():
            if name.endswith(".cls"):
                image = Image.open(io.BytesIO(content[name[:-3] + "png"])).convert("RGB")
                found.append((image.tobytes(), int(label)))
    return found


def everything(data):
    data.transform = lambda image: image.tobytes()
    return [data[index] for index in range(len(data))]


def on_shards(root, **changes):
    return quick(**{"data_set": "wds/", "data_path": root, "input_size": 16, "batch_size": 2, "epochs": 1, **changes})
