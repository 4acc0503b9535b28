"""The pictures of the backbone of a detector, which sees images as the detector's test does."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loading.folders import images_in
from loading.images import UnreadableImage, read_image
from models.config import ConfigError

from .attentions import Collector, require_attentions
from .cams import COLUMNS, cam_picture, cams_of, resized
from .embedding import Features, kernel_pictures, tsne_picture
from .images import chosen
from .looking import attention_set, check_labels
from .pictures import Picture

OF = "most certain object"


def of_detector(args: argparse.Namespace) -> tuple[str, list[Picture]]:
    """The name of the backbone's model, and its pictures.

    An image counts as one of the class of the object that the detector is most certain of.

    Args:
        args: of `scripts/visualize.py`.

    Raises:
        ConfigError: mmdetection is not installed, or the detector, the images or the options do not fit.
    """
    if not args.images or args.beside or args.kw_config or args.ema:
        raise ConfigError(
            "--detector takes its images from --images, and neither --beside, --kw_config nor --ema: its config tells "
            "the model"
        )
    detector = _open(args)
    backbone = detector.backbone.model
    if {"attentions", "kernels"} & set(args.pictures):
        require_attentions(backbone, args.checkpoint)
    files = images_in(args.images, lambda note: None)
    files = [files[i] for i in chosen(len(files), args.count)]
    names = list(detector.dataset_meta["classes"])
    features, labels = Features(detector.backbone, of_input=False), []
    others = [kind for kind in args.pictures if kind != "cam"]
    if others:
        with torch.no_grad(), features(), Collector(backbone, samples="kernels" in others) as collector:
            for file in files:
                found = detector.test_step(_data(detector, file))[0].pred_instances
                label = int(found.labels[found.scores.argmax()]) if len(found.scores) else len(names)
                collector.add([label])
                labels.append(label)
        check_labels(labels, others, "predicted class")
    names.append("none")
    pictures = attention_set(collector.found) if "attentions" in others else []
    if "features" in others:
        title = "t-SNE of the features of the backbone"
        panels = {"last map, averaged over its positions": features.vectors}
        pictures.append(tsne_picture("tsne-features", title, panels, labels, names, OF))
    if "kernels" in others:
        pictures += kernel_pictures(collector.found, names, OF)
    if "cam" in args.pictures:
        pictures.append(_cams(detector, files[:COLUMNS], names))
    return detector.backbone.name, pictures


def _open(args: argparse.Namespace) -> Any:
    """The detector of a config and a checkpoint, in evaluation mode."""
    try:
        from mmdet.utils import register_all_modules
    except ImportError:
        raise ConfigError("--detector needs mmdetection: bash scripts/setup.sh installs it") from None
    from detection import infer, tools

    tools.require_checkpoint(args.checkpoint)
    options = {"config": args.detector, "launcher": "none", "cfg_options": None, "work_dir": None, "local_rank": 0}
    cfg = tools.read_config(argparse.Namespace(**options))
    register_all_modules()
    detector = infer.load_detector(cfg, args.checkpoint, args.device)
    if not hasattr(detector.backbone, "model"):
        raise ConfigError(f"{args.detector}: its backbone is not a model of this project (ClassificationBackbone)")
    return detector


def _data(detector: Any, file: str) -> dict[str, Any]:
    """An image as the detector's test prepares it.

    Raises:
        UnreadableImage: names the image.
    """
    from mmcv.transforms import Compose
    from mmdet.utils import get_test_pipeline_cfg

    # refuses what OpenCV would decode in part
    read_image(file, f"image '{file}'")
    try:
        data = Compose(get_test_pipeline_cfg(detector.cfg))({"img_path": file, "img_id": 0})
    except Exception as error:
        # OpenCV knows other formats
        reason = str(error) or type(error).__name__
        raise UnreadableImage(f"image '{file}' cannot be prepared ({reason.splitlines()[0][:120]})") from None
    return {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}


def log_odds(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of the probability p of every class [N, classes].

    Unlike that of p or log p, its gradient does not vanish where a class is all but certain.
    """
    own = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    others = logits[:, None, :].masked_fill(own, -torch.inf)
    return logits - others.logsumexp(2)


def _read_map(detector: Any, score: Callable[[], Tensor]) -> str:
    """The module of the feature pyramid whose map has the largest influence on a score.

    The head reads an object from the map that suits its size; coarser maps of the pyramid see only its surroundings.
    """
    names = [f"neck.fpn_convs.{i}" for i in range(len(detector.neck.fpn_convs))]
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: maps.update({name: output})

    handles = [detector.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(score(), [maps[name] for name in names], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return max(zip(names, gradients, strict=True), key=lambda pair: 0 if pair[1] is None else float(pair[1].norm()))[0]


def _box(detector: Any, batch: dict[str, Any]) -> list[float] | None:
    """The box of the most certain object in pixels of the prepared image; None if there is none."""
    with torch.no_grad():
        (result,) = detector.predict(batch["inputs"], batch["data_samples"], rescale=False)
    found = result.pred_instances
    return found.bboxes[found.scores.argmax()].tolist() if len(found.scores) else None


def _cams(detector: Any, files: Sequence[str], names: Sequence[str]) -> Picture:
    """Grad-CAM++ of the class that the detector is most certain of, over the map that its box is read from."""
    batches = [detector.data_preprocessor(_data(detector, file), False) for file in files]

    def scores(batch: dict[str, Any]) -> Tensor:
        # scores of classes [proposals, classes + 1], of which the last is the background
        logits = detector(batch["inputs"], batch["data_samples"], mode="tensor")[0]
        logits = logits[0] if isinstance(logits, tuple) else logits
        return log_odds(logits)[:, :-1].amax(0, keepdim=True)

    def read_map(batch: dict[str, Any]) -> str:
        return _read_map(detector, lambda: scores(batch).max())

    name = detector.backbone.name
    if hasattr(getattr(detector, "neck", None), "fpn_convs"):
        of = "the map of features that the object is read from, of the pyramid made of all stages of the backbone"
        found = cams_of(detector, batches, scores, names, name, torch.sigmoid, read_map)
    else:
        of = "the last map of features of the backbone"
        found = cams_of(detector.backbone.model, batches, scores, names, name, torch.sigmoid)
    preprocessor = detector.data_preprocessor
    images = []
    for i, batch in enumerate(batches):
        image = batch["inputs"][0] * preprocessor.std + preprocessor.mean
        # the right and lower edges are padding
        height, width = batch["data_samples"][0].img_shape[:2]
        images.append((image / 255).clamp(0, 1).permute(1, 2, 0)[:height, :width].cpu().numpy())
        found.maps[i] = resized(found.maps[i], *image.shape[1:])[:height, :width]
    return cam_picture(images, None, [found], [_box(detector, batch) for batch in batches], of)
