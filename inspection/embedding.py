"""t-SNE of features, of dynamic kernels and of kernel representations (Kernel Representation, Figures 1 and 4)."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from models.config import ConfigError

from .attentions import CLASSES, SAMPLES, Attentions
from .pictures import COLOURS, MARKERS, Picture, label, new_panels, style

# t-SNE of fewer points shows nothing
LEAST_IMAGES = 10
# of longer vectors, t-SNE gets as many principal components, which is its authors' advice
COMPONENTS = 50


class Features:
    """Keeps what a module gets, or gives, for the first images, as vectors.

    Maps [B, C, H, W] are averaged over their positions, and tokens [B, N, C] over them.

    Args:
        module: whose hook is used.
        of_input: keep its input, else its output (of several maps, the last one).
    """

    def __init__(self, module: nn.Module, of_input: bool) -> None:
        self.module, self.of_input, self.vectors = module, of_input, []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        handle = self.module.register_forward_hook(self._take)
        try:
            yield
        finally:
            handle.remove()

    def _take(self, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        x = inputs[0] if self.of_input else output
        x = x[-1] if isinstance(x, (tuple, list)) else x
        x = x.detach().double()
        x = x.mean(dim=(2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x
        self.vectors += list(x.cpu()[: max(0, SAMPLES - len(self.vectors))])


def classifier_of(model: nn.Module) -> nn.Module:
    """The last layer of a classifier, whose input its features are."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    found = found if isinstance(found, nn.Module) and any(True for _ in found.parameters()) else None
    if found is None:
        found = [module for module in model.modules() if hasattr(module, "in_features")][-1]
    return found


def check_points(labels: Sequence[int]) -> None:
    """Refuse too few images or classes.

    Raises:
        ConfigError: says what is missing.
    """
    if len(labels) < LEAST_IMAGES:
        raise ConfigError(
            f"t-SNE needs at least {LEAST_IMAGES} images, and there are {len(labels)}; give more, or ask for others: "
            "--pictures attentions cam"
        )


def embedded(vectors: Sequence[Tensor]) -> np.ndarray:
    """Points [N, 2] of vectors, by t-SNE from their principal components; the same for the same vectors."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = torch.stack(list(vectors)).numpy()
    x = (x - x.mean(0)) / max(x.std(), 1e-12)
    with warnings.catch_warnings():
        # equal vectors have components without any variance
        warnings.simplefilter("ignore")
        if x.shape[1] > COMPONENTS < len(x):
            x = PCA(COMPONENTS, random_state=0).fit_transform(x)
        return TSNE(perplexity=min(30, (len(x) - 1) / 3), init="random", random_state=0).fit_transform(x)


def tsne_picture(
    name: str, title: str, panels: dict[str, Sequence[Tensor]], labels: Sequence[int], names: Sequence[str], of: str
) -> Picture:
    """Points of images, coloured by class.

    Args:
        name: of the file.
        title: what the points are.
        panels: title of a panel -> vectors of the images.
        labels: classes of the images; those beyond the first `CLASSES` classes are left out.
        names: of the classes.
        of: "class" or "predicted class".
    """
    classes = list(dict.fromkeys(labels))[:CLASSES]
    count = min(len(labels), *(len(vectors) for vectors in panels.values()))
    shown = [i for i in range(count) if labels[i] in classes]
    with style():
        figure, grid = new_panels(len(panels), 2, (3.9, 3.6), (1.6, 0.5))
        for axes, (panel, vectors) in zip(grid, panels.items()):
            points = embedded([vectors[i] for i in shown])
            own = np.array([labels[i] for i in shown])
            for index, cls in enumerate(sorted(classes)):
                at = points[own == cls]
                axes.scatter(
                    at[:, 0], at[:, 1], s=12, color=COLOURS[index % len(COLOURS)], linewidths=0.2, edgecolors="white",
                    marker=MARKERS[index % len(MARKERS)], label=label(names[cls], 24),
                )  # fmt: skip
            axes.set(xticks=[], yticks=[], xlabel="t-SNE dimension 1", ylabel="t-SNE dimension 2")
            axes.set_title(label(panel, 60))
        handles, texts = grid[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside right upper", title=of, frameon=False)
        figure.suptitle(title)
    caption = (
        f"{title}: every point is one of {len(shown)} images, coloured by its {of}. Near points have similar vectors; "
        "distances between groups, and the axes, have no unit."
    )
    return Picture(name, caption, figure)


def kernel_pictures(found: Attentions, names: Sequence[str], of: str) -> list[Picture]:
    """t-SNE of dynamic kernels or attentions, and of KR's representations, at several depths."""
    pictures = []
    sampled = {name: entry for name, entry in found.layers.items() if entry.samples}
    kernels = all(len(entry.parts) == 1 for entry in sampled.values())
    what = "dynamic kernels" if kernels else "attentions that make the dynamic kernels"
    panels = {name: entry.samples for name, entry in sampled.items()}
    pictures.append(tsne_picture("tsne-kernels", f"t-SNE of the {what}", panels, found.labels, names, of))
    if found.representations:
        panels = {f"after {name}": vectors for name, vectors in found.representations.items()}
        title = "t-SNE of the kernel representations"
        pictures.append(tsne_picture("tsne-representations", title, panels, found.labels, names, of))
    return pictures
