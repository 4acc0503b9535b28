#!/usr/bin/env python
"""Average the weights of several checkpoints of one network.

    python scripts/average_checkpoints.py OUT/checkpoint-297.pth OUT/checkpoint-298.pth OUT/checkpoint-299.pth \\
        --output averaged.pth
    python main.py --eval true --resume averaged.pth --data_path IMAGENET

Every floating-point tensor is the mean over the checkpoints, computed in float64; counters, and the options, are those
of the last one. The statistics of batch norm are averaged, too. The result holds weights alone, without an
optimizer: evaluate it, fine-tune it (--finetune), or take it as the start of a run (--resume).

Refused are checkpoints whose keys, shapes, models or classes differ, and checkpoints of different temperatures, since
the attentions of the one would then meet the kernels of the other: average those after `temp_epoch`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()


import checkpoints
from command_line import Parser
from main import fail
from models.config import ConfigError
from models.messages import printable
from models.options import METHOD_KEYS
from utils import check_not_read

NETWORK = ("model", "block_attention", *sorted(METHOD_KEYS))


def parse_arguments(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="paths or URLs, the newest last")
    parser.add_argument("--output", required=True, help="file to write: .pth or .safetensors")
    parser.add_argument("--ema", action="store_true", help="average what runs with --model_ema true kept as averages")
    args = parser.parse_args(argv)
    if len(args.checkpoints) < 2:
        raise ConfigError(f"{args.checkpoints[0]}: the only checkpoint given; a mean needs two or more")
    args.output = checkpoints.weights_path(args.output)
    check_not_read(args.output, args.checkpoints)
    return args


def check_same(first, other, files):
    """Refuse to average two checkpoints that do not belong together.

    Args:
        first, other: their weights, as of `checkpoints.weights_of`.
        files: their paths.

    Raises:
        ConfigError: names the first difference and both files.
    """
    states = first["model"], other["model"]
    where = f"{files[0]} and {files[1]} cannot be averaged"
    for key in [*states[0], *states[1]]:
        if key not in states[0] or key not in states[1]:
            raise ConfigError(f"{where}: of different models; only {files[key not in states[0]]} has {key}")
        shapes = [list(state[key].shape) for state in states]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"{where}: of different models; {key} is {shapes[0]} in the one, {shapes[1]} in the other"
            )
    if first.get("temperature") != other.get("temperature"):
        values = f"{first.get('temperature')} and {other.get('temperature')}"
        raise ConfigError(f"{where}: their temperatures are {values}; take checkpoints of epochs after temp_epoch")
    options = [weights.get("args", {}) for weights in (first, other)]
    for name in (*NETWORK, "classes"):
        # an earlier checkpoint may lack an option
        values = [own[name] for own in options if name in own]
        if name == "classes":
            # they were not named
            values = [names for names in values if names is not None]
        if len(values) == 2 and values[0] != values[1]:
            raise ConfigError(f'{where}: their "{name}" differs: {values[0]} and {values[1]}'[:500])


def average(paths, ema):
    """The mean of checkpoints, as a checkpoint of weights.

    Raises:
        ConfigError: they do not belong together, or a weight is not finite; names the checkpoint.
    """
    first, sums = None, {}
    for path in paths:
        last = checkpoints.weights_of(checkpoints.read(path), path, ema)
        first = first or last
        check_same(first, last, (paths[0], path))
        for key, value in last["model"].items():
            if value.is_floating_point():
                if not value.isfinite().all():
                    raise ConfigError(f"{path}: {key} is not finite, nor would be the mean; leave this checkpoint out")
                sums[key] = sums.get(key, 0) + value.double()
    means = {key: (value / len(paths)).to(last["model"][key].dtype) for key, value in sums.items()}
    return {**last, "model": {**last["model"], **means}}


def main(argv: list[str] | None = None) -> int:
    """Average with the options of `argv` (None: the command line); returns the exit code."""
    try:
        args = parse_arguments(argv)
        checkpoints.write_weights(args.output, average(args.checkpoints, args.ema))
    except ConfigError as error:
        return fail(error)
    print(f"the mean of {len(args.checkpoints)} checkpoints: {printable(args.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
