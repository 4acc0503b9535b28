"""Attentions of dynamic layers to the first images of an evaluation, and a picture of them for logs."""

import contextlib
import io
import math
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.anatomy import is_dynamic
from models.ops.control import observed

# what is kept at most: layers, and numbers of each
LAYERS = 12
NUMBERS = 1_000_000


class Attentions:
    """Within this context, keeps the attentions that a model has in its first forward pass, which costs no other one.

    Attributes:
        alphas: name of a layer -> attentions [B, m, n] of B images, for m mixtures over n cells or kernels, on the CPU;
            of `LAYERS` layers at most, spread over the network, and as many images as give `NUMBERS` numbers.

    Args:
        model: not compiled. Layers whose method mixes no kernels, such as DCD's, are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.alphas = model, {}
        self._now = ""
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        names = [name for name, module in self.model.named_modules() if is_dynamic(module)]
        if len(names) > LAYERS:
            names = [names[i * len(names) // LAYERS] for i in range(LAYERS)]
        modules = dict(self.model.named_modules())
        self._open.enter_context(observed(self._keep))
        for name in names:
            self._open.callback(modules[name].register_forward_pre_hook(self._begin(name)).remove)
        self._open.callback(self.model.register_forward_hook(lambda *_: self._open.close()).remove)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def _begin(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._now = name

        return hook

    def _keep(self, operator: str, x: Tensor, alpha: Tensor, *_: Any) -> None:
        name, self._now = self._now, ""
        if name and operator == "mixture_conv":
            images = max(1, NUMBERS // alpha[0].numel())
            self.alphas[name] = alpha[:images].detach().float().cpu()


def picture(alphas: dict[str, Tensor]) -> Tensor:
    """Heat maps of attentions, a panel for each layer: [height, width, 3] of bytes.

    With several mixtures a panel shows the mean over the images [m, n], else each image [B, n].

    Args:
        alphas: of `Attentions`; at least one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from PIL import Image

    columns = min(4, len(alphas))
    lines = math.ceil(len(alphas) / columns)
    figure = Figure(figsize=(4 * columns, 3 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = iter(figure.subplots(lines, columns, squeeze=False).flat)
    # the layers first: zip would take a panel too many
    for (name, alpha), axes in zip(alphas.items(), panels):
        single = alpha.shape[1] == 1
        shown = alpha[:, 0] if single else alpha.mean(0)
        # attentions of KernelWarehouse may be negative
        limit = max(shown.abs().max().item(), 1e-6)
        signed = shown.min().item() < 0
        colours = {"cmap": "PuOr", "vmin": -limit, "vmax": limit} if signed else {"cmap": "viridis", "vmin": 0}
        drawn = axes.imshow(shown.numpy(), aspect="auto", interpolation="nearest", **colours)
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("cell or kernel" if single else "cell", fontsize=8)
        axes.set_ylabel("image" if single else "mixture", fontsize=8)
        axes.tick_params(labelsize=7)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(drawn, ax=axes).ax.tick_params(labelsize=7)
    for axes in panels:
        axes.set_axis_off()
    figure.suptitle("attentions; of layers with several mixtures the mean over the images", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return torch.from_numpy(np.array(Image.open(file).convert("RGB")))
