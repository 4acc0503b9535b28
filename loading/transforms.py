"""Transforms of images, in training and in evaluation."""

import argparse
from collections.abc import Callable

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from models.config import ConfigError

# of the side of an image, in pixels, before it is cropped
LARGEST = 1 << 15


def make_transform(args: argparse.Namespace, is_train: bool) -> transforms.Compose:
    """Build the transform of an RGB image to a normalised tensor [in_chans, input_size, input_size].

    - Advanced preprocessing (the papers' 300-epoch recipe): random resized crop, flip, RandAugment or colour jitter,
      and random erasing, bicubic. Evaluation resizes to input_size / crop_pct and crops; from 384 pixels on, it resizes
      to a square and does not crop.
    - Traditional preprocessing: random resized crop and flip, bilinear. Evaluation resizes to 8/7 of the crop.
    - CIFAR at its own size: the crop is taken from a padded image.
    - Digits: moved, rotated and scaled a little, and never flipped.

    `args.data_set` chooses among them; in evaluation `args.trained_on`, where a checkpoint has told its own data set.

    With --in_chans 1 the images are made grey before they are normalised, by the averages over the channels.

    Raises:
        ConfigError: timm does not know the policy of `aa`; `crop_pct` makes images too large.
    """
    transform = _in_colour(args, is_train)
    if args.in_chans == 3:
        return transform
    steps: list[Callable] = []
    for step in transform.transforms:
        if isinstance(step, transforms.Normalize):
            averages = ((sum(map(float, values)) / len(values),) for values in (step.mean, step.std))
            steps += [transforms.Grayscale(), transforms.Normalize(*averages)]
        else:
            steps.append(step)
    return transforms.Compose(steps)


def _in_colour(args: argparse.Namespace, is_train: bool) -> transforms.Compose:
    """`make_transform` for images of three channels."""
    size, imagenet = args.input_size, args.imagenet_default_mean_and_std
    mean = IMAGENET_DEFAULT_MEAN if imagenet else (0.5, 0.5, 0.5)
    std = IMAGENET_DEFAULT_STD if imagenet else (0.5, 0.5, 0.5)
    to_tensor = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
    data_set = args.data_set if is_train else getattr(args, "trained_on", args.data_set)
    small = size <= 32 and data_set.startswith("CIFAR")

    if data_set == "digits":
        moved = transforms.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=bilinear)
        resized = transforms.Resize((size, size), bicubic)
        return transforms.Compose([resized, *([moved] if is_train else []), *to_tensor])
    if not is_train:
        steps = [transforms.Resize((size, size), bicubic)] if small else _resize_and_crop(args)
        return transforms.Compose([*steps, *to_tensor])
    if args.traditional_preprocess and not small:
        crop = transforms.RandomResizedCrop(size, interpolation=bilinear)
        return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *to_tensor])
    if args.traditional_preprocess:
        steps = [transforms.RandomHorizontalFlip(), *to_tensor]
    else:
        try:
            transform = create_transform(
                size, is_training=True, color_jitter=args.color_jitter, auto_augment=args.aa,
                interpolation=args.train_interpolation, re_prob=args.reprob, re_mode=args.remode,
                re_count=args.recount, mean=mean, std=std,
            )  # fmt: skip
        except (AssertionError, KeyError, ValueError, IndexError) as error:
            raise ConfigError(
                f'"aa" must be a policy such as rand-m9-mstd0.5-inc1; got {args.aa!r} ({error})'
            ) from None
        if not small:
            return transform
        steps = transform.transforms[1:]
    padded = [transforms.Resize((size, size), bicubic), transforms.RandomCrop(size, padding=4)]
    return transforms.Compose([*padded, *steps])


def _resize_and_crop(args: argparse.Namespace) -> list[Callable]:
    """The first steps of an evaluation on images larger than CIFAR's."""
    size, bicubic = args.input_size, InterpolationMode.BICUBIC
    if args.traditional_preprocess:
        return [transforms.Resize(round(size * 256 / 224), InterpolationMode.BILINEAR), transforms.CenterCrop(size)]
    if size >= 384:
        return [transforms.Resize((size, size), bicubic)]
    resized = int(size / (args.crop_pct or 224 / 256))
    if resized > LARGEST:
        raise ConfigError(f"crop_pct {args.crop_pct} makes images of {resized} pixels; {LARGEST} are the most")
    return [transforms.Resize(resized, bicubic), transforms.CenterCrop(size)]
