"""How an update is divided when a run goes on with another number of processes, and the learning rate of its size."""

import argparse
from typing import Any

from models.config import ConfigError
from option_checks import mixes
from utils import log

# batches that would be smaller than this part of the ones asked for are not used
SMALLEST = 4


def divide_update(args: argparse.Namespace, checkpoint: dict[str, Any] | None, path: Any, world: int) -> dict[str, int]:
    """Keep the images of an update when a run goes on with another number of processes.

    The rule: `update_freq` and, where needed, `batch_size` change so that an update has as many images as at the start
    of the run, with the same learning rate. Where no division gives exactly as many, the nearest number of full batches
    is taken, and the learning rate is multiplied by the ratio of the two numbers (the linear scaling rule: Goyal et
    al., Accurate, Large Minibatch SGD, 2017). Who asks for another `batch_size` or `update_freq` gets it as it is.

    Args:
        args: all options; `batch_size`, `update_freq`, `lr` and `min_lr` may change.
        checkpoint: what the run continues from; None: it starts anew.
        path: its path, for the error message.
        world: number of processes.

    Returns:
        "images" of an update, and "target", those at the start of the run.

    Raises:
        ConfigError: the checkpoint's numbers are wrong.
    """
    images = args.batch_size * args.update_freq * world
    own = (checkpoint or {}).get("args")
    saved = (checkpoint or {}).get("images_per_update")
    if not isinstance(saved, dict) or not isinstance(own, dict):
        return {"images": images, "target": images}
    target = saved.get("target")
    if type(target) is not int or not 1 <= target < 2**31 or type(saved.get("images")) is not int:
        raise ConfigError(f"{path}: its number of images per update is wrong; use another copy")
    if any(own.get(name) != getattr(args, name) for name in ("batch_size", "update_freq")) or target == images:
        return {"images": images, "target": images}
    before = f"{args.batch_size} x {args.update_freq} x {world} = {images}"
    found = divided(target, world, args.batch_size, even=mixes(args))
    if found is not None:
        args.batch_size, args.update_freq = found
        log(f"{world} processes: {found[0]} x {found[1]} x {world} = {target} images an update as before, not {before}")
        return {"images": target, "target": target}
    args.update_freq = max(1, round(target / (world * args.batch_size)))
    images = args.batch_size * args.update_freq * world
    args.lr, args.min_lr = args.lr * images / target, args.min_lr * images / target
    log(
        f"{world} processes cannot share {target} images an update evenly: {args.batch_size} x {args.update_freq} x "
        f"{world} = {images} from here on, and the learning rate is {images / target:g} times that of the options"
    )
    return {"images": images, "target": target}


def scale_lr(args: argparse.Namespace, images: int) -> None:
    """Scale the learning rates where --scale_lr asks for it, and note where they are of another number of images.

    Source: the linear scaling rule of Goyal et al., Accurate, Large Minibatch SGD, 2017.

    Args:
        args: all options; `lr` and `min_lr` may change.
        images: of an update, at the start of the run.

    Raises:
        ConfigError: nothing tells how many images the learning rate is for.
    """
    if args.scale_lr and args.lr_batch is None:
        raise ConfigError(
            f"--scale_lr true: nothing tells for how many images per update the learning rate {args.lr:g} is; add "
            "--lr_batch, or take the learning rate of a recipe"
        )
    if args.lr_batch in (None, images):
        return
    ratio, of = images / args.lr_batch, f"{images} images per update, where lr {args.lr:g} is for {args.lr_batch}"
    if args.scale_lr:
        args.lr, args.min_lr = args.lr * ratio, args.min_lr * ratio
        log(f"{of}: lr {args.lr:g} and min_lr {args.min_lr:g} are {ratio:g} times those of the options")
    else:
        log(f"note: {of}, and nothing scales it; --scale_lr true makes it {args.lr * ratio:g}")


def divided(images: int, world: int, batch_size: int, even: bool) -> tuple[int, int] | None:
    """A batch size, at most the given one, and a number of batches that give `images` over `world` processes.

    Args:
        images: of an update.
        world: number of processes.
        batch_size: the largest batch.
        even: batches must be even.

    Returns:
        The fewest batches; None where there is no division, or only one in very small batches.
    """
    if images % world:
        return None
    own = images // world
    for count in range(1, own + 1):
        size, rest = divmod(own, count)
        if size * SMALLEST < min(batch_size, own):
            return None
        if rest == 0 and size <= batch_size and not (even and size % 2):
            return size, count
    return None
