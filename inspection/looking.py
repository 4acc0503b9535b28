"""Pass images through a classifier, and make the pictures of what was seen."""

import contextlib
import itertools
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader

from models.config import ConfigError
from trained import Trained

from .attentions import Attentions, Collector, require_attentions
from .cams import COLUMNS, Cams, cam_picture, cams_of
from .embedding import Features, check_points, classifier_of, kernel_pictures, tsne_picture
from .images import Images, shown_image
from .layer_pictures import attention_pictures, entropy_picture
from .pictures import Picture, require
from .warehouse_pictures import heat_map_pictures, overview, usage_picture

KINDS = ("attentions", "cam", "features", "kernels")
MODULES = {"attentions": ["matplotlib"], "cam": ["matplotlib", "torchcam"]}
MODULES |= {kind: ["matplotlib", "sklearn"] for kind in ("features", "kernels")}


def check_kinds(kinds: Sequence[str]) -> None:
    """Check that the libraries for some kinds of pictures are installed.

    Raises:
        ConfigError: names the one that is missing.
    """
    require(*dict.fromkeys(itertools.chain.from_iterable(MODULES[kind] for kind in kinds)))


def check_labels(labels: Sequence[int], kinds: Sequence[str], of: str) -> None:
    """Refuse images that are too few, or of one class, for the kinds of pictures.

    Raises:
        ConfigError: says what is missing.
    """
    if len(labels) < 2 and set(kinds) - {"cam"}:
        raise ConfigError(
            "one image has no spread and no neighbours: give more images, or ask for what one can show: --pictures cam"
        )
    if len(set(labels)) < 2 and set(kinds) - {"cam"}:
        what = "all images are of one class" if of == "class" else "the model predicts one class for all images"
        raise ConfigError(
            f"{what}, and spreads over classes and t-SNE by class need two: give images of other classes, or ask for "
            "what one can show: --pictures cam"
        )
    if {"features", "kernels"} & set(kinds):
        check_points(labels)


@torch.no_grad()
def look(
    trained: Trained, images: Images, kinds: Sequence[str], device: str, batch_size: int, about: str
) -> list[Picture]:
    """The pictures of a classifier, but Grad-CAM++.

    Args:
        trained: the model.
        images: what it looks at.
        kinds: of `KINDS`.
        device: where it computes.
        batch_size: images at once.
        about: what to call the model in an error.

    Raises:
        ConfigError: the model has no attentions, or the images are too few or of one class.
    """
    model = trained.model.to(device)
    if {"attentions", "kernels"} & set(kinds):
        require_attentions(model, about)
    features, labels = Features(classifier_of(model), of_input=True), []
    collector = Collector(model, samples="kernels" in kinds)
    with contextlib.ExitStack() as stack:
        stack.enter_context(features())
        stack.enter_context(collector)
        for batch, own in DataLoader(images.data, batch_size):
            logits = model(batch.to(device))
            if not logits.isfinite().all():
                raise ConfigError(f"{about}: the model's output is not finite")
            own = own.tolist() if images.classes is not None else logits.argmax(1).tolist()
            collector.add(own)
            labels += own
    of = "class" if images.classes is not None else "predicted class"
    check_labels(labels, kinds, of)
    names = images.classes or _names(trained)
    pictures = attention_set(collector.found) if "attentions" in kinds else []
    if "features" in kinds:
        panels = {"input of the classifier": features.vectors}
        title = "t-SNE of the features before the classifier"
        pictures.append(tsne_picture("tsne-features", title, panels, labels, names, of))
    if "kernels" in kinds:
        pictures += kernel_pictures(collector.found, names, of)
    return pictures


def attention_set(found: Attentions) -> list[Picture]:
    """All pictures of attentions that fit what was collected."""
    pictures = []
    if found.warehouses():
        pictures += [overview(found), *heat_map_pictures(found), usage_picture(found)]
    pictures += attention_pictures(found)
    entropy = entropy_picture(found)
    return pictures if entropy is None else [*pictures, entropy]


def _names(trained: Trained) -> list[str]:
    return list(trained.classes or map(str, range(trained.args.nb_classes)))


def grad_cams(networks: dict[str, tuple[Trained, Images]], device: str) -> Picture:
    """Grad-CAM++ of networks beside each other, each with the same images in its own preprocessing.

    Raises:
        ConfigError: a network has no map of features.
    """
    found: list[Cams] = []
    for about, (trained, images) in networks.items():
        model = trained.model.to(device)
        count = min(COLUMNS, len(images.data))
        inputs = [images.data[i][0][None].to(device) for i in range(count)]
        found.append(cams_of(model, inputs, model, _names(trained), about))
    trained, images = next(iter(networks.values()))
    items = [images.data[i] for i in range(min(COLUMNS, len(images.data)))]
    truths = None
    if images.classes is not None and set(images.classes) <= set(_names(trained)):
        truths = [images.classes[label] for _, label in items]
    return cam_picture([shown_image(image, trained.args).numpy() for image, _ in items], truths, found)
