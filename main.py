"""Train and evaluate an image classifier.

    python main.py --kw_config configs/resnet18/kw1x_resnet18.json --data_path IMAGENET --output_dir OUT
    python -m torch.distributed.launch --nproc_per_node=8 main.py ...       (or torchrun, or srun)
    python main.py --kw_config CONFIG --eval true --resume CHECKPOINT --data_path IMAGENET

A mistake in the options, the data or a checkpoint ends the run with one line and exit code 2, before any training.
"""

import argparse
import sys
import time
from collections.abc import Container
from typing import Any

from command_line import make_parser, merged_options, parse_words
from models.config import ConfigError
from option_checks import check_data, check_weights, mixes
from startup import before_torch


def main(argv: list[str] | None = None) -> int:
    """Run with the options of `argv` (None: the command line); returns the exit code."""
    # must come before torch is loaded, and reading the options of methods loads it
    before_torch()
    try:
        asked = parse_words(make_parser(), argv)
        args, given = merged_options(asked)
        if args.dry_run:
            return report(args, given, asked)
        complete(args, given, asked)
    except ConfigError as error:
        return fail(error)

    import torch.distributed as dist

    from engine import NonFiniteLoss
    from loading.images import UnreadableImage

    try:
        run(args, given, asked)
    except ConfigError as error:
        return fail(error)
    except (NonFiniteLoss, UnreadableImage) as error:
        return fail(error, code=1)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def fail(error: Exception, code: int = 2) -> int:
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

        checkpoint = read(args.resume)
        adopt(args, given, checkpoint, args.resume)
        check_size(model_settings(args, given), args.nb_classes, checkpoint, args.resume)


def report(args: argparse.Namespace, given: dict[str, Any], asked: Container[str]) -> int:
    """Print what a dynamic model changes in its static network, for the data of the run; returns the exit code.

    Raises:
        ConfigError: names the option, or the checkpoint.
    """
    check_weights(args, asked)
    take_options(args, given)

    from checkpoints import model_settings
    from datasets import known_classes
    from models import report_model

    classes = args.nb_classes if "nb_classes" in given else known_classes(args.data_set) or args.nb_classes
    print(report_model(model_settings(args, given), num_classes=classes, input_size=args.input_size))
    return 0


def run(args: argparse.Namespace, given: dict[str, Any], asked: Container[str] = ()) -> list[dict[str, Any]]:
    """Train or evaluate a model.

    Args:
        args: all options.
        given: those of them that the command line, the config or the recipe gave.
        asked: names of those on the command line itself.

    Returns:
        With --eval: what `engine.evaluate` returned for the weights, and then for the averaged weights where they are
        evaluated, too, each with the number of `parameters`. After training: nothing.

    Raises:
        ConfigError: options, data or checkpoint do not fit each other.
    """
    import torch
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.utils import ModelEmaV3

    import checkpoints
    import utils
    from datasets import make_loaders
    from engine import amp_dtype, evaluate, train_one_epoch
    from models import build_model, get_temperature, set_temperature, temperature_range
    from optim_factory import Schedule, create_optimizer
    from utils import log

    # distributed
    process = utils.start_processes(args)
    device = process.device
    if args.use_amp and device.type == "cpu" and args.amp_dtype == "float16":
        raise ConfigError("--amp_dtype float16 needs a GPU; take bfloat16 or auto")
    torch.backends.cudnn.benchmark = True
    output = utils.make_folder(args.output_dir) if args.output_dir else None

    # data
    loaders = make_loaders(args, given, process)
    args.nb_classes, args.classes = loaders.nb_classes, loaders.classes

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
    checkpoint, path = checkpoints.find(args, output)
    if checkpoint is not None:
        checkpoints.check_classes(checkpoint, path, loaders.classes)
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

    # optimizer
    steps = len(loaders.train) // args.update_freq
    optimizer = create_optimizer(args, model)
    schedule = Schedule(args, steps)
    scaled = args.use_amp and device.type == "cuda" and amp_dtype(args, device) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    mixup, criterion = None, torch.nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    if mixes(args):
        mixup = Mixup(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
            num_classes=loaders.nb_classes,
        )  # fmt: skip
        criterion = SoftTargetCrossEntropy()
    batch = args.batch_size * args.update_freq * process.world
    log(
        f"{args.batch_size} x {args.update_freq} x {process.world} = {batch} images an update, {steps} updates an epoch"
    )
    if schedule.warmup >= schedule.total:
        log(f"note: the warm-up of {schedule.warmup} updates is as long as the run of {schedule.total}")

    # resume
    ema = None
    if args.model_ema:
        ema_device = torch.device("cpu") if args.model_ema_force_cpu else device
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device=ema_device)
    utils.set_seed(args.seed + process.rank)
    start_epoch, best = args.start_epoch, {"acc1": None, "acc1_ema": None}
    if checkpoint is not None:
        start_epoch, best = checkpoints.restore(checkpoint, path, model, ema, optimizer, scaler, args, process)
    if output is not None and process.is_main:
        checkpoints.remove_stale_files(output)
    if output is not None and args.save_ckpt:
        checkpoints.set_aside(output, start_epoch, fresh=checkpoint is None)
    run_log = utils.RunLog(args, start_epoch)
    if args.compile:
        # compile in place, which changes neither the keys of the state dict nor the EMA's copy of the model
        model.compile()
    net = model
    if process.world > 1:
        net = utils.in_parallel(model, device)

    # train
    started = time.perf_counter()
    for epoch in range(start_epoch, args.epochs):
        loaders.set_epoch(epoch)
        trained = train_one_epoch(
            net, loaders.train, optimizer, schedule, criterion, args=args, epoch=epoch, process=process, scaler=scaler,
            mixup=mixup, ema=ema, run_log=run_log,
        )  # fmt: skip
        temperature = get_temperature(model)
        utils.synchronise_buffers(*[model] + ([ema.module] if ema is not None else []))
        if ema is not None:
            set_temperature(ema.module, temperature)

        metrics = {"epoch": epoch, **{f"train_{name}": value for name, value in trained.items()}}
        improved = []
        evaluated = {"acc1": model, "acc1_ema": ema.module if ema is not None and args.model_ema_eval else None}
        for name, module in evaluated.items():
            if module is None or loaders.evaluation is None:
                continue
            suffix = name.removeprefix("acc1")
            where = next(module.parameters()).device
            result = evaluate(module, loaders.evaluation, args=args, device=where, title="EMA " if suffix else "")
            metrics |= {f"test_{key}{suffix}": result[key] for key in ("loss", "acc1", "acc5")}
            if best[name] is None or result["acc1"] > best[name]:
                best[name] = result["acc1"]
                improved.append(name)
        metrics |= {f"best_{name}": value for name, value in best.items() if value is not None}
        run_log.epoch((epoch + 1) * steps, {**metrics, "n_parameters": parameters})

        if output is not None and args.save_ckpt:
            state = checkpoints.training_state(model, ema, optimizer, scaler, epoch, best, temperature, args, process)
            if (epoch + 1) % args.save_ckpt_freq == 0 or epoch + 1 == args.epochs:
                target = output / f"checkpoint-{epoch}.pth"
                if checkpoints.save_checkpoint(target, state):
                    checkpoints.prune_checkpoints(output, epoch, args.save_ckpt_num)
                    run_log.checkpoint(target)
            if "acc1" in improved:
                checkpoints.save_checkpoint(output / "checkpoint-best.pth", state)
            if "acc1_ema" in improved:
                checkpoints.save_checkpoint(output / "checkpoint-best-ema.pth", checkpoints.ema_state(state))

    # report
    run_log.close()
    log(f"trained {max(0, args.epochs - start_epoch)} epochs in {time.perf_counter() - started:.0f} s")
    for name, value in best.items():
        if value is not None:
            log(f"best {name}: {value:.3f}")
    if output is not None and process.is_main and (output / "log.txt").is_file():
        try:
            utils.plot_curves(output / "log.txt", output / "curves.png")
        except ImportError:
            log("curves.png was not drawn: matplotlib is not installed")
    return []


if __name__ == "__main__":
    sys.exit(main())
