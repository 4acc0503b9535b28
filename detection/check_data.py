"""Check a COCO data set before any training, and name what is wrong with it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config, ConfigDict
from PIL import Image

from loading.images import readable_formats
from models.config import ConfigError

# Data sets of at most this many images are decoded whole. In larger ones only the header and the end of every file are
# read.
DECODED = 1000
# bytes that end a complete file, by format
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def check_data(cfg: Config, phases: Sequence[str] = ("train", "val")) -> None:
    """Refuse annotations and images that training would fail on or silently leave out.

    Args:
        cfg: config of a detector.
        phases: data loaders to check, each "train", "val" or "test". One that the config lacks is skipped.

    Raises:
        ConfigError: names the file and what is wrong with it.
    """
    for phase in phases:
        loader = cfg.get(f"{phase}_dataloader")
        if loader is None:
            continue
        dataset = loader["dataset"]
        # a wrapper such as RepeatDataset holds the data set in a `dataset` of its own
        while "ann_file" not in dataset and isinstance(dataset.get("dataset"), (dict, ConfigDict)):
            dataset = dataset["dataset"]
        try:
            _check(dataset, phase, _classes_of_head(cfg.model))
        except (KeyError, TypeError, AttributeError) as error:
            where = Path(dataset.get("data_root") or "") / str(dataset.get("ann_file"))
            raise ConfigError(
                f"{where}: an entry is not in the format of COCO: {type(error).__name__} {error}"
            ) from None


def _classes_of_head(model: ConfigDict) -> int | None:
    head = (model.get("roi_head") or {}).get("bbox_head") or {}
    return head.get("num_classes")


def _check(dataset: ConfigDict, phase: str, num_classes: int | None) -> None:
    root = Path(dataset.get("data_root") or "")
    path = root / dataset["ann_file"]
    content = _read(path, phase)
    for key, kind in (("images", "image"), ("annotations", None), ("categories", "category")):
        if not isinstance(content.get(key), list):
            raise ConfigError(f"{path}: no list of '{key}'; it must be in the format of COCO")
        if kind and not content[key]:
            raise ConfigError(f"{path}: it lists no {kind}")
    _check_categories(path, content, dataset, num_classes)
    ids = {image["id"] for image in content["images"]}
    known = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in ids or annotation["category_id"] not in known:
            what = "image" if annotation["image_id"] not in ids else "category"
            raise ConfigError(
                f"{path}: annotation {annotation.get('id')} is of {what} {annotation[f'{what}_id']}, which it does not "
                "list"
            )
    if phase == "train" and not content["annotations"]:
        raise ConfigError(f"{path}: none of its {len(ids)} images has an object to train on")
    folder = root / (dataset.get("data_prefix") or {}).get("img", "")
    for image in content["images"]:
        _check_image(folder / image["file_name"], image, path, whole=len(ids) <= DECODED)


def _read(path: Path, phase: str) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f"{phase} annotations '{path}': no such file; set {phase}_dataloader.dataset.data_root and ann_file"
        )
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: it holds a {type(content).__name__}; it must be in the format of COCO")
    return content


def _check_categories(path: Path, content: dict[str, Any], dataset: ConfigDict, num_classes: int | None) -> None:
    """Compare the categories of a file with the classes of the config, and their number with that of the heads.

    mmdetection leaves out objects of other categories without an error, and numbers labels in the order of the file.
    """
    names = [category["name"] for category in content["categories"]]
    classes = (dataset.get("metainfo") or {}).get("classes") or DATASETS.get(dataset["type"]).METAINFO["classes"]
    classes = [classes] if isinstance(classes, str) else list(classes)
    if names != classes:
        differing = [name for name in names if name not in classes] or [name for name in classes if name not in names]
        what = f"'{differing[0]}' is in one of them only" if differing else "the order differs"
        raise ConfigError(
            f"{path}: its {len(names)} categories are not the {len(classes)} classes of the config ({what}); set "
            "metainfo=dict(classes=...) of the data sets, and num_classes of the heads"
        )
    if num_classes is not None and num_classes != len(classes):
        raise ConfigError(
            f"{path}: {len(classes)} categories, but the heads have num_classes {num_classes}; set it in bbox_head and "
            "mask_head"
        )


def _check_image(path: Path, image: dict[str, Any], annotations: Path, whole: bool) -> None:
    if not path.is_file():
        raise ConfigError(f"image '{path}' is listed in {annotations} and does not exist")
    try:
        with Image.open(path, formats=readable_formats()) as opened:
            size, end = opened.size, ENDS.get(opened.format)
            if whole:
                opened.load()
        if end:
            with path.open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - 1024))
                # some cameras append data after the end marker
                if end not in file.read():
                    raise OSError("it is truncated")
    except Exception as error:
        # image decoders raise exceptions of any type
        raise ConfigError(f"image '{path}' cannot be read: {str(error) or type(error).__name__}") from None
    if size != (image.get("width"), image.get("height")):
        raise ConfigError(
            f"image '{path}' has {size[0]} x {size[1]} pixels, and {image.get('width')} x {image.get('height')} in "
            f"{annotations}"
        )
