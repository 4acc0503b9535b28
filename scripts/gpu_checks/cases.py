"""What is checked: models of every method, networks that are timed, and calls of the operator with odd shapes.

The tests use these cases, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measure import recorded_calls
from models import build_model, read_config
from models.build import PREFIXES
from models.ops.geometry import Geometry, geometry

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KW = {"cell_num_ratio": 1, "cell_inplane_ratio": 1, "cell_outplane_ratio": 1, "reduction": 0.0625}
# prefix of every method -> a small model of it
METHODS = {
    **{prefix: {"model": f"{prefix}_test_resnet"} for prefix in PREFIXES},
    "kw": {"model": "kw_test_resnet", **KW},
    "kw1d2x": {"model": "kw1d2x_mobilenetv2_050"},
}

# --- networks that are timed ------------------------------------------------------------------------------------------

BACKBONES = ("resnet18", "resnet50", "mobilenetv2_100", "convnext_tiny")
_KW_FILES = {
    "resnet18": "resnet18/kw1x_resnet18", "resnet50": "resnet50/kw1x_resnet50",
    "mobilenetv2_100": "mobilenetv2_100/kw1x_mobilenetv2_100", "convnext_tiny": "convnext/kw1x_convnext_tiny",
}  # fmt: skip


def networks(dry: bool) -> dict[str, dict[str, Any]]:
    """Names -> configs of the networks that are timed, the most important ones first; for a dry run, small ones."""
    found = {}
    for method, settings in {
        "KW 1x": None,
        "ODConv 4x": {"model": "od_", "kernel_num": 4},
        "DY-Conv 4x": {"model": "dyconv_", "kernel_num": 4},
        "ODConv 1x": {"model": "od_", "kernel_num": 1},
    }.items():
        for backbone in ("test_resnet",) if dry else BACKBONES:
            if settings is not None:
                config = {**settings, "model": settings["model"] + backbone}
            elif dry:
                config = METHODS["kw"]
            else:
                # not every file names its model
                config = {"model": backbone, **read_config(CONFIGS / f"{_KW_FILES[backbone]}.json")}
            found[f"{backbone}, {method}"] = config
    return found


# --- calls of the operator --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """The shapes of a call of `mixture_conv`, and its arguments after the tensors."""

    x: tuple[int, ...]
    alpha: tuple[int, ...]
    cells: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def arguments(self) -> tuple:
        """The arguments of `mixture_conv` after the cells."""
        return list(self.kernel), None, list(self.stride), list(self.padding), list(self.dilation), self.groups

    def of_batch(self, batch: int) -> "Shapes":
        """The same with another number of samples."""
        return replace(self, x=(batch, *self.x[1:]), alpha=(batch, *self.alpha[1:]))

    def geometry(self, last: bool) -> Geometry:
        """The geometry of the call; `last`: whether channels are innermost in memory."""
        lists = (list(v) for v in (self.kernel, self.stride, self.padding, self.dilation))
        return geometry(self.x, self.alpha, self.cells, *lists, self.groups, last)

    def tensors(self, dtype: torch.dtype, device: str, last: bool) -> list[Tensor]:
        """Random x, alpha and cells, each of a size that keeps the output near 1; the same at every call."""
        generator = torch.Generator(device).manual_seed(sum(self.x))
        scales = (1, 1 / math.sqrt(self.alpha[-1]), 1 / math.sqrt(math.prod(self.kernel) * self.x[1] / self.groups))
        values = [
            torch.randn(shape, generator=generator, device=device) * scale
            for shape, scale in zip((self.x, self.alpha, self.cells), scales, strict=True)
        ]
        values = [value.to(dtype) for value in values]
        if last:
            values[0] = values[0].movedim(1, -1).contiguous().movedim(-1, 1)
        return values

    def __str__(self) -> str:
        """For messages: channels, size of the map, kernel, and what there is besides."""
        size = "x".join(map(str, self.x[2:]))
        text = f"{self.x[0]}x{self.x[1]}x{size}, kernel {'x'.join(map(str, self.kernel))}, cells {list(self.cells)}"
        if set(self.stride) != {1}:
            text += f", stride {self.stride[0]}"
        return text + (f", {self.groups} groups" if self.groups > 1 else "")


def _wide(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


# batch, ci, co, Gi, Go, groups, kernel, size, n, stride, padding, dilation: more rows, columns and cells than a tile of
# a Triton kernel has, and what is left of them
TILES = [
    (2, 33, 70, 1, 1, 1, 1, (8, 9), 5),
    (3, 17, 18, 2, 2, 1, 3, (6, 5), 3, 2, 1),
    (4, 6, 4, 1, 2, 3, 2, (5, 7), 4, 3, 2, 2),
    (9, 20, 8, 1, 1, 1, 1, (5, 5), 2, 2),
    (2, 3, 40, 2, 1, 2, 3, (70,), 4, 2, 2),
    (1, 5, 6, 1, 1, 1, 3, (5, 3, 4), 70, 2, 1),
    (20, 4, 4, 1, 1, 1, 3, (1, 1), 40, 1, 1),
    (1, 1, 1, 1, 1, 1, 1, (1,), 1),
    (2, 9, 10, 2, 1, 1, 3, (7, 6), 6, 1, 1),
]


def tile_shapes(batch, ci, co, g_in, g_out, groups, kernel, size, n, stride=1, padding=0, dilation=1) -> Shapes:
    """The shapes of a row of `TILES`."""
    dims = len(size)
    return Shapes(
        (batch, groups * g_in * ci, *size), (batch, kernel**dims * groups * g_out * g_in, n), (n, co, ci, *[1] * dims),
        *(_wide(value, dims) for value in (kernel, stride, padding, dilation)), groups,
    )  # fmt: skip


# batch, channels, outputs of a channel, outputs of a cell, kernel, stride, padding, dilation, size: maps smaller and
# larger than vectors, rows and columns that no kernel sees, cells with the kernel's extent
DEPTHWISE = [
    (2, 33, 1, 11, (3, 3), (1, 1), (1, 1), (1, 1), (7, 7)),
    (1, 18, 1, 6, (3, 3), (2, 2), (1, 1), (1, 1), (37, 36)),
    (3, 20, 1, 20, (7, 7), (1, 1), (3, 3), (1, 1), (13, 18)),
    (2, 6, 2, 4, (5, 3), (3, 2), (0, 1), (1, 2), (19, 9)),
    (2, 17, 1, 1, (2, 4), (2, 1), (0, 0), (2, 1), (9, 21)),
    (9, 4, 3, 12, (3,), (2,), (0,), (1,), (50,)),
    (1, 40, 1, 8, (1, 1), (3, 3), (0, 0), (1, 1), (10, 11)),
    (9, 19, 1, 19, (2, 1), (3, 2), (0, 0), (2, 1), (5, 2)),
]


def depthwise_shapes(batch, channels, multiplier, co, kernel, stride, padding, dilation, size, whole=False) -> Shapes:
    """The shapes of a row of `DEPTHWISE`; `whole`: cells have the kernel's extent."""
    taps = 1 if whole else math.prod(kernel)
    window = kernel if whole else [1] * len(size)
    return Shapes(
        (batch, channels, *size), (batch, taps * channels * multiplier // co, 5), (5, co, 1, *window),
        kernel, stride, padding, dilation, channels,
    )  # fmt: skip


# own kernels of a layer, as DY-Conv has them
WHOLE = [
    Shapes((3, 12, 9, 8), (3, 1, 4), (4, 20, 12, 3, 3), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    Shapes((2, 12, 5, 5), (2, 2, 3), (3, 5, 6, 5, 5), (5, 5), (1, 1), (2, 2), (1, 1), 2),
    Shapes((4, 16, 1, 1), (4, 1, 3), (3, 16, 16, 3, 3), (3, 3), (2, 2), (1, 1), (1, 1), 1),
]


def odd_shapes(dry: bool) -> list[Shapes]:
    """All of `TILES`, `DEPTHWISE` and `WHOLE`; for a dry run, some of each."""
    if dry:
        return [*(tile_shapes(*TILES[i]) for i in (3, 6, 8)), depthwise_shapes(*DEPTHWISE[0]), WHOLE[1]]
    depthwise = [depthwise_shapes(*row, whole=i % 2 == 1) for i, row in enumerate(DEPTHWISE)]
    return [*(tile_shapes(*row) for row in TILES), *depthwise, *WHOLE]


def layer_shapes(config: dict[str, Any], size: int) -> list[tuple[int, Shapes]]:
    """The calls of `mixture_conv` in a network with one image: (how many layers make it, its shapes), each once."""
    # tensors without data tell the shapes, which takes no time on any device
    model, image = build_model(config).to("meta"), torch.empty(1, 3, size, size, device="meta")
    found = {}
    for count, (x, alpha, cells, kernel, _, stride, padding, dilation, groups) in recorded_calls(model, image):
        lists = (_wide(value, x.ndim - 2) for value in (kernel, stride, padding, dilation))
        shapes = Shapes(tuple(x.shape), tuple(alpha.shape), tuple(cells.shape), *lists, groups)
        found[shapes] = found.get(shapes, 0) + count
    return [(count, shapes) for shapes, count in found.items()]
