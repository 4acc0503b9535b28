"""Train and evaluate an image classifier.

    python main.py --kw_config configs/resnet18/kw1x_resnet18.json --data_path IMAGENET --output_dir OUT
    python -m torch.distributed.launch --nproc_per_node=8 main.py ...       (or torchrun, or srun)
    python main.py --kw_config CONFIG --eval true --resume CHECKPOINT --data_path IMAGENET

A mistake in the options, the data or a checkpoint ends the run with one line and exit code 2, before any training.
"""

import argparse
import os
import sys
from collections.abc import Container
from typing import Any

from command_line import config_table, make_parser, merged_options, parse_words
from models.config import ConfigError
from option_checks import check_data, check_weights
from run_lock import RunLock, is_first
from startup import before_torch, continue_stopped, end_with_launcher, outlive_output
from stopping import Stopped, StopSignals


def main(argv: list[str] | None = None) -> int:
    """Run with the options of `argv` (None: the command line); returns the exit code."""
    # must come before torch is loaded, and reading the options of methods loads it
    before_torch()
    end_with_launcher()
    with outlive_output():
        try:
            with StopSignals() as signals:
                return _main(argv, signals)
        except Stopped as stopped:
            if is_first():
                print(stopped, file=sys.stderr, flush=True)
            return stopped.code


def _main(argv: list[str] | None, signals: StopSignals) -> int:
    try:
        asked = parse_words(make_parser(), argv)
        args, given = merged_options(asked)
        if args.print_config or args.dry_run:
            return report(args, given, asked)
        complete(args, given, asked)
        with RunLock(None if args.eval else args.output_dir) as lock:
            if os.path.isdir(args.output_dir):
                # before anything slow is done
                lock.take()
            return run_to_end(args, given, asked, lock, signals)
    except ConfigError as error:
        return fail(error)


def run_to_end(
    args: argparse.Namespace,
    given: dict[str, Any],
    asked: Container[str],
    lock: RunLock,
    signals: StopSignals,
) -> int:
    """`run`, and what can end it; returns the exit code.

    Raises:
        ConfigError: as `run` does.
    """
    import torch.distributed as dist

    from engine import LoaderFailed, NonFiniteLoss, loader_failure
    from loading.images import UnreadableImage
    from utils import leave_processes, lost_processes

    try:
        run(args, given, asked, lock, signals)
    except (NonFiniteLoss, UnreadableImage, LoaderFailed) as error:
        return fail(error, code=1)
    except RuntimeError as error:
        told = lost_processes(error) or loader_failure(error)
        if told is None:
            raise
        continue_stopped()
        return fail(told, code=1)
    except ValueError as error:
        # of torch's BatchNorm
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            f"--batch_size {args.batch_size}: BatchNorm has no statistics of one image whose maps have one position; "
            "take a batch of two or more, or larger images"
        ) from None
    if dist.is_initialized():
        leave_processes()
    return 0


def fail(error: Exception | str, code: int = 2) -> int:
    """Print an error in one line; returns the exit code."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return code


def complete(args: argparse.Namespace, given: dict[str, Any], asked: Container[str] = ()) -> None:
    """Take the options of a run from the checkpoint of --resume where nothing else names a model, and check the paths.

    Args:
        args: all options; extended.
        given: those of them that the command line, the config or the recipe gave; extended.
        asked: names of those on the command line itself, which no config may contradict.

    Raises:
        ConfigError: names the option, or the checkpoint.
    """
    check_weights(args, asked)
    take_options(args, given)
    check_data(args, asked)


def take_options(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Take the options of a run from the checkpoint of --resume where nothing else names a model.

    Raises:
        ConfigError: names the checkpoint.
    """
    if args.resume and "model" not in given:
        # loads torch, so that a mistake in the options is still refused at once
        from checkpoints import adopt, check_size, model_settings, read

        checkpoint, own_lr = read(args.resume), "lr" in given and "lr_batch" not in given
        adopt(args, given, checkpoint, args.resume)
        if own_lr:
            # the checkpoint tells it of its own learning rate
            args.lr_batch = None
            given.pop("lr_batch", None)
        check_size(model_settings(args, given), args.nb_classes, checkpoint, args.resume)


def report(args: argparse.Namespace, given: dict[str, Any], asked: dict[str, Any]) -> int:
    """Print what --print_config or --dry_run asks for, on the first process; returns the exit code.

    Raises:
        ConfigError: names the option, the checkpoint or the data.
    """
    check_weights(args, asked)
    take_options(args, given)
    if not is_first():
        return 0

    if args.print_config:
        print(config_table(args, given, asked))
    if args.dry_run:
        from dry_run import dry_run

        dry_run(args, given, asked)
    return 0


def run(
    args: argparse.Namespace,
    given: dict[str, Any],
    asked: Container[str] = (),
    lock: RunLock | None = None,
    signals: StopSignals | None = None,
) -> list[dict[str, Any]]:
    """Train or evaluate a model.

    Args:
        args: all options.
        given: those of them that the command line, the config or the recipe gave.
        asked: names of those on the command line itself.
        lock: of the output folder, for training.
        signals: asked between two updates whether to stop.

    Returns:
        With --eval: what `engine.evaluate` returned for the weights, and then for the averaged weights where they are
        evaluated, too, each with the number of `parameters`. After training: nothing.

    Raises:
        ConfigError: options, data or checkpoint do not fit each other.
        NonFiniteLoss, UnreadableImage, LoaderFailed, Stopped: see `training.Trainer.train`.
    """
    import torch

    import checkpoints
    import utils
    from datasets import make_loaders
    from elastic import divide_update, scale_lr
    from engine import evaluate
    from models import build_model, set_temperature, temperature_range
    from training import Trainer
    from utils import log

    # distributed
    process = utils.start_processes(args)
    device = process.device
    if args.use_amp and device.type == "cpu" and args.amp_dtype == "float16":
        raise ConfigError("--amp_dtype float16 needs a GPU; take bfloat16 or auto")
    torch.backends.cudnn.benchmark = True
    output = utils.make_folder(args.output_dir) if args.output_dir else None
    if output is not None and not args.eval:
        (lock or RunLock(output)).take()

    # what the run continues
    checkpoint, path = checkpoints.find(args, output)
    asked_for = {name: getattr(args, name) for name in ("batch_size", "update_freq", "lr", "min_lr")}
    if checkpoint is not None:
        checkpoints.compare(checkpoint, path, args, given)
    if not args.eval:
        images_per_update = divide_update(args, checkpoint, path, process.world)
        scale_lr(args, images_per_update["target"])

    # data
    loaders = make_loaders(args, given, process)
    args.nb_classes, args.classes = loaders.nb_classes, loaders.classes
    if checkpoint is not None:
        checkpoints.check_classes(checkpoint, path, loaders.classes)

    # model: every process makes the same initial weights, and later gets a random stream of its own
    utils.set_seed(args.seed)
    config = checkpoints.model_settings(args, given)
    try:
        model = build_model(config, num_classes=loaders.nb_classes, init_static=args.init_static).to(device)
        first, last = temperature_range(model)
        args.temp_init_value = args.temp_init_value if "temp_init_value" in given else first
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        set_temperature(model, args.temp_init_value)
    except ValueError as error:
        raise ConfigError(f"--temp_init_value of {args.model}: {error}") from None
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.finetune:
        checkpoints.finetune(model, args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{parameters / 1e6:.2f} M parameters, {loaders.nb_classes} classes"
    log(f"{args.model}: {size}, on {process.world} x {device}")

    # evaluate
    if args.eval:
        if checkpoint is None and not (args.finetune or args.init_static):
            raise ConfigError("--eval needs a checkpoint: give --resume, or the --output_dir of a run")
        set_temperature(model, last)
        if checkpoint is not None:
            checkpoints.load(model, checkpoint, path)
        averaged = None
        if args.model_ema_eval:
            averaged = checkpoints.averaged(checkpoint, path, asked="model_ema_eval" in asked)
        results = [evaluate(model, loaders.evaluation, args=args, device=device)]
        if averaged is not None:
            checkpoints.load(model, averaged, path)
            results.append(evaluate(model, loaders.evaluation, args=args, device=device, title="EMA "))
        return [{**result, "parameters": parameters} for result in results]

    # train
    folder = checkpoints.RunFolder(output, args.save_ckpt_num) if output is not None else None
    trainer = Trainer(args, process, loaders, model, folder, signals or StopSignals(), images_per_update, asked_for)
    trainer.prepare(checkpoint, path)
    trainer.train()
    return []


if __name__ == "__main__":
    sys.exit(main())
