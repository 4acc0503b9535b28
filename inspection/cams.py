"""Grad-CAM++ of networks beside each other (Chattopadhyay et al., 2018; ODConv, Figure 5), computed by torchcam."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.anatomy import is_dynamic
from models.config import ConfigError
from models.messages import quiet

from .pictures import COLOURS, Picture, label, new_figure, style

# images in a picture
COLUMNS = 8


@dataclass
class Cams:
    """The maps of one network.

    Attributes:
        title: of the network.
        maps: for every image, [H, W] from 0 to 1 at its size.
        predicted: for every image, the class of which the map is, and its probability.
    """

    title: str
    maps: list[np.ndarray]
    predicted: list[tuple[str, float]]


def target_layer(model: nn.Module, run: Callable[[], Any], about: str) -> str:
    """The module whose map of features is the last of a forward pass.

    Args:
        model: in which it is searched.
        run: makes a forward pass.
        about: what to call the model in an error.

    Raises:
        ConfigError: the last features are no map but tokens, as in a vision transformer.
    """
    last, tokens = "", ""
    handles = []

    def take(name: str, output: Any) -> None:
        nonlocal last, tokens
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            last, tokens = name, ""
        elif isinstance(output, Tensor) and output.ndim == 3:
            tokens = name

    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            # what a dynamic layer computes inside is no map of features
            continue
        inside = (*inside, f"{name}.") if is_dynamic(module) else inside
        handles.append(module.register_forward_hook(lambda _m, _i, output, name=name: take(name, output)))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not last or tokens:
        raise ConfigError(
            f"{about}: Grad-CAM++ needs maps of features, and this model computes tokens or no maps of more than one "
            "position; ask for other pictures: --pictures attentions features kernels"
        )
    return last


def cams_of(
    model: nn.Module,
    inputs: Sequence[Any],
    scores_of: Callable[[Any], Tensor],
    names: Sequence[str],
    about: str,
    probabilities_of: Callable[[Tensor], Tensor] = lambda scores: scores.softmax(1),
    layer_of: Callable[[Any], str] | None = None,
) -> Cams:
    """Grad-CAM++ of the predicted class of every image.

    Args:
        model: whose features are looked at; in evaluation mode.
        inputs: what `scores_of` takes, one for each image.
        scores_of: gives scores [1, classes] of an image, from a forward pass of `model`.
        names: of the classes.
        about: what to call the model.
        probabilities_of: the probabilities of scores.
        layer_of: gives the module whose map of features is looked at, for an image; by default, that of the last map.
    """
    from torchcam.methods import GradCAMpp

    if layer_of is None:
        last = target_layer(model, lambda: scores_of(inputs[0]), about)
    maps, predicted = [], []
    for image in inputs:
        layer = last if layer_of is None else layer_of(image)
        with quiet(), torch.enable_grad(), GradCAMpp(model, layer) as extractor:
            scores = scores_of(image)
            best = int(scores[0].argmax())
            (cam,) = extractor(best, scores)
        maps.append(cam[0].detach().cpu().numpy())
        predicted.append((names[best], float(probabilities_of(scores.detach().double())[0, best])))
    return Cams(about, maps, predicted)


def resized(cam: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map [h, w] at the size of its image."""
    values = torch.from_numpy(cam)[None, None].float()
    return F.interpolate(values, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()


def cam_picture(
    images: Sequence[np.ndarray],
    truths: Sequence[str] | None,
    found: Sequence[Cams],
    boxes: Sequence[Sequence[float] | None] | None = None,
    of: str = "the last map of features",
) -> Picture:
    """A column for every image: the image, and the map of each network over it.

    Args:
        images: [H, W, 3] from 0 to 1.
        truths: names of their classes; None: unknown.
        found: the maps of the networks.
        boxes: (left, top, right, bottom) in pixels of the objects that the maps are of; None: unknown.
        of: which features were looked at.
    """
    images = list(images)[:COLUMNS]
    rows = 1 + len(found)
    with style():
        figure = new_figure(1.35 * len(images) + 1.3, 1.6 * rows + 0.5)
        grid = figure.subplots(rows, len(images), squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        drawn = None
        for column, image in enumerate(images):
            grid[0, column].imshow(image)
            for axes in grid[:, column] if boxes is not None and boxes[column] is not None else ():
                left, top, right, bottom = boxes[column]
                axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="white", linewidth=1)
            if truths is not None:
                grid[0, column].set_title(label(truths[column], 18), fontsize=7)
            # neither black nor white, so that the colours of the map stay those of its scale
            grey = 0.3 + 0.5 * image.mean(axis=2)
            for row, cams in enumerate(found, 1):
                axes = grid[row, column]
                axes.imshow(grey, cmap="gray", vmin=0, vmax=1)
                over = resized(cams.maps[column], *grey.shape)
                drawn = axes.imshow(over, cmap="viridis", vmin=0, vmax=1, alpha=0.55)
                name, probability = cams.predicted[column]
                wrong = truths is not None and name != truths[column]
                text = f"{'wrong: ' if wrong else ''}{label(name, 14)} ({100 * probability:.0f} %)"
                axes.set_title(text, fontsize=7, color=COLOURS[1] if wrong else "black")
        grid[0, 0].set_ylabel("image" if truths is None else "image and\nits class")
        for row, cams in enumerate(found, 1):
            grid[row, 0].set_ylabel(label(cams.title, 26))
        figure.colorbar(drawn, ax=grid, pad=0.01, aspect=30).set_label("Grad-CAM++ (0 to 1 in each image)")
        figure.suptitle("where each network looks for the class that it predicts")
    caption = (
        f"Grad-CAM++ over {of}: how much each place raises the score of the class that the network predicts, which is "
        "named with its probability above each map. Every map is scaled from 0 to 1 by itself."
    )
    if boxes is not None:
        caption += " White: the box of that object."
    return Picture("grad-cam", caption, figure)
