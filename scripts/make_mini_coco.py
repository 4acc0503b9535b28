#!/usr/bin/env python
"""Write a small data set in the format of COCO for instance segmentation, to try detectors without COCO.

    python scripts/make_mini_coco.py --output mini_coco

The objects are real handwritten digits of scikit-learn, scaled, rotated, coloured and pasted over patches of two
photographs; every digit is a category. Training and validation use different scans. Objects range from small to large
relative to the image; some images have none; some annotations are crowds (iscrowd, RLE). The same seed gives the same
files.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as rle
from sklearn.datasets import load_digits, load_sample_images

CLASSES = tuple("0123456789")
# share of the handwritten digits for training; the others are for validation
TRAINING_SHARE = 0.8
# ranges of the heights of objects, relative to the height of the image
HEIGHTS = ((0.14, 0.22), (0.22, 0.35), (0.35, 0.6))
EMPTY_EVERY, CROWD_EVERY = 20, 10


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("mini_coco"))
    parser.add_argument("--train", type=int, default=600, help="training images; default %(default)s")
    parser.add_argument("--val", type=int, default=150, help="validation images; default %(default)s")
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels; default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.train < 1 or args.val < 1 or args.size < 32:
        parser.error("--train and --val must be at least 1, --size at least 32 pixels")
    return args


def ground(rng, photographs, size):
    """A patch of a photograph, dimmed so that digits stand out: [size, size, 3]."""
    photograph = photographs[rng.integers(len(photographs))]
    shortest = min(photograph.shape[:2])
    side = int(rng.integers(min(size, shortest), shortest + 1))
    top, left = (int(rng.integers(0, extent - side + 1)) for extent in photograph.shape[:2])
    patch = cv2.resize(photograph[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)
    return patch.astype(np.float32) * rng.uniform(0.3, 0.7)


def drawn(rng, digit, height):
    """The ink (0 to 1) of a digit [8, 8] with grey levels 0 to 16, after scaling and rotating it."""
    side = max(8, round(height * 1.1))
    ink = cv2.resize(digit.astype(np.float32) / 16, (side, side), interpolation=cv2.INTER_CUBIC)
    margin = side // 2
    ink = cv2.copyMakeBorder(ink, margin, margin, margin, margin, cv2.BORDER_CONSTANT)
    middle = (ink.shape[1] / 2, ink.shape[0] / 2)
    turn = cv2.getRotationMatrix2D(middle, rng.uniform(-20, 20), 1.0)
    ink = np.clip(cv2.warpAffine(ink, turn, ink.shape[::-1], flags=cv2.INTER_LINEAR), 0, 1)
    rows, columns = np.where(ink > 0.4)
    return ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def polygons(mask):
    """Outlines of a mask, [[x, y, ...], ...], along the edges of its pixels; holes are filled."""
    fine = np.kron(mask.astype(np.uint8), np.ones((4, 4), np.uint8))
    found, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [((contour.reshape(-1) + 0.5) / 4).round(3).tolist() for contour in found]


def as_rle(mask):
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def picture(rng, photographs, digits, size, count, crowd):
    """An image [size, size, 3] and its objects: (label, mask [size, size], whether it is a crowd)."""
    image, objects = ground(rng, photographs, size), []
    taken = np.zeros((size, size), bool)
    for i in range(count + 3 * crowd):
        # a crowd is three digits that do not overlap, under one annotation
        in_crowd = i >= count
        band = HEIGHTS[0] if in_crowd else HEIGHTS[rng.integers(len(HEIGHTS))]
        digit, label = digits[rng.integers(len(digits))]
        ink = drawn(rng, digit, size * rng.uniform(*band))
        height, width = ink.shape
        for _ in range(20):
            top, left = int(rng.integers(0, size - height + 1)), int(rng.integers(0, size - width + 1))
            place = (slice(top, top + height), slice(left, left + width))
            if not taken[place].any():
                break
        else:
            continue
        taken[place] = True
        colour = rng.uniform(150, 255, 3) * rng.uniform(0.7, 1, 3)
        image[place] = image[place] * (1 - ink[..., None]) + colour * ink[..., None]
        mask = np.zeros((size, size), bool)
        mask[place] = ink > 0.4
        if in_crowd and objects and objects[-1][2]:
            objects[-1] = (objects[-1][0], objects[-1][1] | mask, True)
        else:
            objects.append((label, mask, in_crowd))
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8), objects


def write(folder, name, rng, photographs, digits, count, size):
    """Write images to folder/name, and their annotations to folder/annotations."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        objects = 0 if number % EMPTY_EVERY == 0 else int(rng.integers(2, 7))
        image, found = picture(rng, photographs, digits, size, objects, objects and number % CROWD_EVERY == 1)
        file_name = f"{number:06d}.png"
        Image.fromarray(image).save(folder / name / file_name)
        images.append({"id": number, "file_name": file_name, "width": size, "height": size})
        for label, mask, crowd in found:
            outline = as_rle(mask) if crowd else polygons(mask)
            shape = outline if crowd else rle.merge(rle.frPyObjects(outline, size, size))
            rows, columns = np.where(mask)
            left, top = int(columns.min()), int(rows.min())
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top],
                    "area": int(rle.area(shape)),
                    "iscrowd": int(crowd),
                    "segmentation": outline,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))


def main():
    args = parse_arguments()
    data = load_digits()
    digits = list(zip(data.images, map(int, data.target), strict=True))
    split = int(len(digits) * TRAINING_SHARE)
    photographs = load_sample_images().images
    for i, (name, part, count) in enumerate((("train", digits[:split], args.train), ("val", digits[split:], args.val))):
        write(args.output, name, np.random.default_rng([args.seed, i]), photographs, part, count, args.size)
    print(
        f"{args.output}: {args.train} training images, {args.val} validation images, {args.size} x {args.size} pixels"
    )


if __name__ == "__main__":
    main()
