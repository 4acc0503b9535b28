#!/usr/bin/env python
"""Read every image of a data set as training does, and name those that are bad.

    python scripts/check_data.py IMAGENET
    python scripts/check_data.py IMAGENET --sha256 imagenet.sha256     # also write a list of checksums
    python scripts/check_data.py IMAGENET --verify imagenet.sha256     # also compare with it

All images in the folder and in those below it are read: train/ and val/ of ImageNet, or any others. Nearly no damage
inside a JPEG shows when it is decoded, since JPEG has no checksums; a list of them finds every changed bit. It is in
the format of sha256sum, with paths relative to the folder.

Exit code 0: all are good. 1: some are bad, missing, changed, or not in the list. 2: a mistake in the options.
"""

import functools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

from command_line import Parser, at_least
from datasets import cores
from loading.checksums import line_of, read_list
from loading.folders import images_in
from loading.images import UnreadableImage, read_image
from main import fail
from models.config import ConfigError
from models.download import sha256_of
from models.messages import printable
from utils import check_not_read, check_target, errors_name, replace_file


def parse_arguments(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a folder of images, with folders in it")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--sha256", metavar="FILE", help="write the checksums of the good images to this file")
    group.add_argument("--verify", metavar="FILE", help="compare the images with the checksums in this file")
    parser.add_argument("--num_workers", type=at_least(1), default=cores(), help="processes; default: one a core")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.folder):
        raise ConfigError(f"{args.folder}: no such folder of images")
    args.sha256 = check_target(args.sha256) if args.sha256 else None
    return args


def check(with_digest, path):
    """What is wrong with an image, or nothing; and its SHA-256, where that is asked for."""
    try:
        read_image(path, path)
        return "", sha256_of(path) if with_digest else ""
    except UnreadableImage as error:
        return str(error), ""
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}", ""


def check_all(files, with_digest, workers):
    """What `check` returns, for each file in turn."""
    try:
        with ProcessPoolExecutor(workers) as pool:
            yield from zip(files, pool.map(functools.partial(check, with_digest), files, chunksize=16), strict=True)
    except BrokenProcessPool:
        raise ConfigError(
            "a process that read images was killed, perhaps for its memory; try fewer --num_workers"
        ) from None


def run(args):
    files = images_in([args.folder], note=functools.partial(print, file=sys.stderr))
    check_not_read(args.sha256, files)
    expected = None if args.verify is None else read_list(args.verify)
    bad, lines = 0, []
    for path, (reason, digest) in check_all(files, bool(args.sha256 or args.verify), args.num_workers):
        name = os.path.relpath(path, args.folder)
        if expected is not None:
            listed = expected.pop(name, None)
            if not reason and listed != digest:
                reason = f"{path}: {'its SHA-256 is not that of' if listed else 'not in'} {args.verify}"
        if reason:
            print(printable(reason), flush=True)
            bad += 1
        else:
            lines.append(line_of(digest, name))
    for name in expected or ():
        print(printable(f"{name}: in {args.verify}, and not in {args.folder}"))
    if args.sha256:
        with errors_name(args.sha256):
            replace_file(args.sha256, lambda file: file.write(os.fsencode("".join(lines))))
    bad += len(expected or ())
    print(f"{len(files)} images, {bad} bad")
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    """Check with the options of `argv` (None: the command line); returns the exit code."""
    try:
        return run(parse_arguments(argv))
    except ConfigError as error:
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
