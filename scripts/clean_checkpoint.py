#!/usr/bin/env python
"""Write a checkpoint's weights, with what is needed to use them, to a smaller file to pass on.

    python scripts/clean_checkpoint.py OUT/checkpoint-best.pth --output kw1x_resnet18.safetensors
    python scripts/clean_checkpoint.py OUT/checkpoint-best.pth --output kw1x_resnet18.pth --hash

The file keeps the options of the model, of its training and of the preprocessing, the names of the classes and the
temperature; a safetensors file has them as JSON in its header. It drops the optimizer, the random states, the history
and the paths and devices of the machine. All commands that read a checkpoint read it. Of a checkpoint of another
project the weights alone remain, under their own names, and are used with --kw_config as before.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

import checkpoints
from command_line import Parser
from main import fail
from models.config import ConfigError
from models.download import sha256_of
from models.messages import printable
from utils import check_not_read, errors_name


def parse_arguments(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CKPT", help="path or URL")
    parser.add_argument("--output", required=True, help="file to write: .pth or .safetensors")
    parser.add_argument("--ema", action="store_true", help="keep the averaged weights of a run with --model_ema true")
    parser.add_argument(
        "--hash",
        action="store_true",
        help="add the first 8 digits of the file's SHA-256 to its name, which are checked when it is downloaded",
    )
    args = parser.parse_args(argv)
    args.output = checkpoints.weights_path(args.output)
    check_not_read(args.output, [args.checkpoint])
    return args


def write(weights, output, with_hash):
    """Write the file; returns its path, which may hold its hash, and its SHA-256.

    Raises:
        ConfigError: it cannot be written.
    """
    with errors_name(output), tempfile.TemporaryDirectory(dir=output.parent, prefix=".clean.") as folder:
        written = Path(folder) / f"weights{output.suffix}"
        try:
            checkpoints.write_weights(written, weights)
        except ConfigError as error:
            raise ConfigError(str(error).replace(printable(written), printable(output))) from None
        digest = sha256_of(written)
        if with_hash:
            output = output.with_stem(f"{output.stem}-{digest[:8]}")
        os.replace(written, output)
    return output, digest


def main(argv: list[str] | None = None) -> int:
    """Clean with the options of `argv` (None: the command line); returns the exit code."""
    try:
        args = parse_arguments(argv)
        checkpoint = checkpoints.read(args.checkpoint)
        weights = checkpoints.weights_of(checkpoint, args.checkpoint, args.ema)
        output, digest = write(weights, args.output, args.hash)
    except ConfigError as error:
        return fail(error)
    before = ""
    if os.path.isfile(args.checkpoint):
        before = f"{printable(args.checkpoint)}: {os.path.getsize(args.checkpoint):,} bytes\n"
    print(f"{before}{printable(output)}: {os.path.getsize(output):,} bytes\nSHA-256 {digest}")
    if "args" not in weights:
        print("note: it does not tell its model; give --kw_config wherever it is used")
    return 0


if __name__ == "__main__":
    sys.exit(main())
