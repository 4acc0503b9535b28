"""One epoch of training, the evaluation, and the temperature schedule."""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from checkpoints import EpochProgress
from loading.images import UnreadableImage
from models import set_temperature, temperature_range
from models.ops.dead_taps import WrittenGradients
from progress import Progress
from run_logs import RunLog
from stopping import end_loader_processes
from utils import Process, log, reduce_sum
from watchdog import TookTooLong, Watchdog

if TYPE_CHECKING:
    from timm.data import Mixup
    from timm.utils import ModelEmaV3

    from optim_factory import Schedule


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is NaN or infinite. The message names the epoch and the step."""


class LoaderFailed(RuntimeError):
    """The processes that load images ended, hang, or lack memory. The message is one line, with a remedy."""


class Watch(Protocol):
    """Decides between two updates whether the run is saved, or stops."""

    def planned(self, progress: EpochProgress) -> bool:
        """Whether a save is due by the number of updates, which all processes know."""

    def wishes(self, progress: EpochProgress) -> tuple[bool, bool]:
        """Whether this process wants to stop, and whether it wants to save."""

    def act(self, progress: EpochProgress, stop: bool, save: bool) -> None:
        """Save, and raise `stopping.Stopped`, as any of the processes wished; all of them call it."""


def temperature_at(
    step: int, steps_per_epoch: int, temp_epoch: int, temp_init_value: float, last: float = 0.0
) -> float:
    """Temperature at an optimizer update; it falls linearly from `temp_init_value` to `last` in `temp_epoch` epochs.

    Source: KernelWarehouse, section 3.4 and appendix A.1 (1 to 0); ODConv, appendix A.2 (30 to 1).
    """
    total = temp_epoch * steps_per_epoch
    return last + (temp_init_value - last) * (1 - step / total) if step < total else last


def autocast(args: argparse.Namespace, device: torch.device) -> contextlib.ExitStack:
    """Context of the forward pass: mixed precision where `use_amp` is set, with correct gradients on the CPU."""
    context = contextlib.ExitStack()
    context.enter_context(torch.autocast(device.type, dtype=amp_dtype(args, device), enabled=args.use_amp))
    if args.use_amp and device.type == "cpu":
        context.enter_context(WrittenGradients())
    return context


def amp_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Data type of mixed precision; "auto" is bfloat16 where the device computes in it, else float16."""
    if args.amp_dtype != "auto":
        return getattr(torch, args.amp_dtype)
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def waiting_is_free(device: torch.device) -> bool:
    """Whether numbers on a device can be read without waiting for it: on the CPU only."""
    return device.type == "cpu"


def train_one_epoch(
    net: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    schedule: "Schedule",
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    args: argparse.Namespace,
    epoch: int,
    process: Process,
    scaler: torch.amp.GradScaler,
    mixup: "Mixup | None" = None,
    ema: "ModelEmaV3 | None" = None,
    run_log: RunLog | None = None,
    progress: EpochProgress | None = None,
    watch: Watch | None = None,
    between: float = 0.0,
) -> dict[str, float | None]:
    """Train for an epoch, or for the rest of it.

    An update averages the gradients of `update_freq` batches of every process. Batches at the end of the loader that
    do not fill an update are dropped. A step waits for a GPU only when it logs.

    Args:
        net: the model, bare or in DistributedDataParallel.
        loader: batches of images [B, 3, H, W], classes [B], and, optionally, B texts: why an image could not be read
            that another one stands for, or "". It begins where `progress` ends.
        schedule: learning rate and weight decay at every update.
        criterion: loss of logits [B, classes] and targets (classes [B], or [B, classes] with mixup).
        epoch: counted from 0 over the whole run.
        scaler: enabled for float16 only.
        mixup: mixes images and targets; None: no mixing.
        ema: average of the weights to update; None: none is kept.
        run_log: receives the metrics of the steps that log.
        progress: what of the epoch is done, which is brought up to date; None: nothing.
        watch: asked after every update whether to save or to stop.
        between: seconds that the evaluation and the saves of an epoch took last time, for the time that is left.

    Returns:
        Averages over the epoch and all processes: `loss` and `acc1` (None with mixup), and the last `lr`,
        `weight_decay`, `temperature` and `grad_norm`; `unreadable` and `skipped`, the numbers of images and updates
        that were left out, where there are any.

    Raises:
        NonFiniteLoss: more updates than `skip_nonfinite` had a loss or gradient that was not finite, or the weights
            are not; in all processes at the same step. No update was made from such a gradient.
        UnreadableImage: more than the share `bad_images` of the images cannot be read; in all processes at once.
        LoaderFailed: the loader processes ended or hang.
        stopping.Stopped: `watch` stopped the run.
    """
    model = net.module if isinstance(net, DistributedDataParallel) else net
    device, steps = process.device, schedule.steps_per_epoch
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = list(model.buffers())
    temperature, (_, final) = None, temperature_range(model)
    progress = EpochProgress(epoch) if progress is None else progress
    images_per_update = args.batch_size * args.update_freq * process.world
    # sums of the loss, of correct images and of images, which stay on the device
    fresh = torch.zeros(3, dtype=torch.float64, device=device)
    progress.sums = sums = fresh if progress.sums is None else progress.sums.to(device)
    skipped = torch.full((), float(progress.skipped), device=device)
    first_bad_step = torch.full((), -1.0, device=device)
    reasons: list[str] = []
    # log.txt and the names of checkpoints count from 0; a person reads the first epoch of ten as 1/10
    title, epochs_left = f"epoch {epoch + 1}/{args.epochs}", args.epochs - epoch - 1
    shown = Progress(title, steps, images_per_update, device, progress.update, epochs_left, between)
    if run_log is not None:
        run_log.begin(epoch * steps + progress.update, images_per_update, device)

    net.train()
    # an epoch that only lacks its evaluation loads no image
    batches = _on_device(loader, device, args.channels_last, args.timeout) if progress.update < steps else iter(())
    for update in range(progress.update, steps):
        step = epoch * steps + update
        lr, weight_decay = schedule.apply(optimizer, step)
        now = temperature_at(step, steps, args.temp_epoch, args.temp_init_value, final)
        if now != temperature:
            temperature = now
            set_temperature(model, temperature)
        # an update that is left out must not change the statistics of BatchNorm
        before = [buffer.clone() for buffer in buffers] if args.skip_nonfinite else []

        loss_of_update = torch.zeros((), device=device)
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for micro in range(args.update_freq):
            images, targets, unreadable = next(batches)
            reasons += [reason for reason in unreadable if reason]
            classes = targets
            if mixup is not None:
                images, targets = mixup(images, targets)
            # processes exchange the gradients of an update once, in its last backward pass
            waits = micro < args.update_freq - 1 and isinstance(net, DistributedDataParallel)
            with net.no_sync() if waits else contextlib.nullcontext():
                with autocast(args, device):
                    logits = net(images)
                loss = criterion(logits.float(), targets) / args.update_freq
                scaler.scale(loss).backward()
            loss_of_update += loss.detach()
            if mixup is None:
                counts[0] += (logits.detach().argmax(1) == classes).sum()
                counts[1] += len(classes)

        if scaler.is_enabled():
            scaler.unscale_(optimizer)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        if args.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, args.clip_grad, grad_norm)

        # In float16 the gradient overflows now and then, and the scaler skips that update. Then check the loss alone.
        finite = torch.isfinite(loss_of_update)
        if not scaler.is_enabled():
            finite = finite & torch.isfinite(grad_norm)
        last = update == steps - 1
        logs = (update + 1) % args.log_interval == 0 or last
        progress.update, progress.samples = update + 1, progress.samples + images_per_update
        # On a CPU, look at every update. On a GPU, look to log or save; the optimizer skips bad updates meanwhile.
        looks = logs or waiting_is_free(device) or (watch is not None and watch.planned(progress))
        progress.unreadable += len(reasons) if looks else 0
        stop, save = watch.wishes(progress) if watch is not None and looks else (False, False)
        # one exchange tells every process what the others saw
        told = torch.zeros(4, device=device)
        if looks:
            told = torch.tensor([0.0, stop, save, progress.unreadable], device=device)
        told[0] = (~finite).float()
        reduce_sum(told)
        bad = (told[0] > 0).float()
        skipped += bad
        first_bad_step = torch.where((first_bad_step < 0) & (bad > 0), float(update), first_bad_step)
        if looks:
            progress.skipped = int(skipped.item())
            if progress.skipped > args.skip_nonfinite:
                raise _not_finite(int(first_bad_step.item()), epoch, steps)
            _check_unreadable(int(told[3].item()), reasons, loader, args.bad_images)
            reasons = []
        sums[0] += torch.where(bad > 0, 0.0, loss_of_update)
        sums[1:] += torch.where(bad > 0, 0, counts)
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.found_inf = bad
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(buffers, before):
            buffer.copy_(torch.where(bad > 0, value, buffer))
        if ema is not None:
            ema.update(model)

        if looks:
            metrics = {
                "loss": loss_of_update.item(),
                "lr": lr,
                "temperature": temperature,
                "grad_norm": grad_norm.item(),
            }
            progress.last = {**metrics, "weight_decay": weight_decay}
        shown.update(update + 1, metrics if looks else None, lasting=logs)
        if logs and run_log is not None:
            run_log.step(step + 1, {f"train/{name}": value for name, value in metrics.items()})
        if watch is not None and looks:
            watch.act(progress, *(told[1:3] > 0).tolist())

    shown.close(keep=True)
    totals = torch.cat([sums, sums.new_tensor([progress.unreadable])])
    reduce_sum(totals)
    loss, correct, images_seen, unreadable = totals.tolist()
    left_out = {"unreadable": int(unreadable), "skipped": progress.skipped}
    return {
        "loss": loss / steps / process.world,
        "acc1": 100 * correct / images_seen if images_seen else None,
        **{name: progress.last[name] for name in ("lr", "weight_decay", "temperature", "grad_norm")},
        **{name: count for name, count in left_out.items() if count},
    }


def _not_finite(bad: int, epoch: int, steps: int) -> NonFiniteLoss:
    return NonFiniteLoss(
        f"the loss or the gradient is not finite at step {bad} of epoch {epoch} (step {epoch * steps + bad} of the "
        "run), counted from 0 as in log.txt; the last checkpoint is intact. Lower --lr, lengthen --warmup_epochs or "
        "set --clip_grad"
    )


def _check_unreadable(count: int, reasons: list[str], loader: DataLoader, share: float) -> None:
    """Print why images could not be read.

    Args:
        count: of such images in the epoch, in all processes.
        reasons: those of this process that were not printed yet.
        loader: whose data set they are of.
        share: of its images that may be unreadable.

    Raises:
        UnreadableImage: there are more.
    """
    if count and count > share * len(loader.dataset):
        first = f"{reasons[0]}; " if reasons else ""
        raise UnreadableImage(
            f"{first}{count} of {len(loader.dataset)} training images cannot be read, more than the share {share:g} of "
            "--bad_images; scripts/check_data.py lists all of them"
        )
    for reason in reasons:
        print(f"warning: left out: {reason}", file=sys.stderr, flush=True)


def _on_device(
    loader: Iterable, device: torch.device, channels_last: bool, seconds: float
) -> Iterator[tuple[Tensor, Tensor, tuple[str, ...]]]:
    """The batches of a loader on the device, each with its texts about images that could not be read.

    For a GPU a separate stream copies them, while the GPU still computes the step before.

    Args:
        loader: of images, classes, and, optionally, texts.
        device: where the images are needed.
        channels_last: their memory format there.
        seconds: to wait for a batch.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for images, targets, *about in _loaded(loader, seconds):
        with torch.cuda.stream(stream):
            batch = _to_device((images, targets), device, channels_last)
        if stream is not None:
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            for tensor in batch:
                # keep the allocator from giving this memory to the next copy before this step has used it
                tensor.record_stream(current)
        yield *batch, tuple(about[0]) if about else ()


def _loaded(loader: Iterable, seconds: float) -> Iterator[Any]:
    """The batches of a loader.

    Raises:
        LoaderFailed: its processes ended, hang for so many seconds, or lack shared memory or open files.
    """
    batches, watchdog = None, Watchdog(seconds)
    try:
        while True:
            with watchdog:
                batches = iter(loader) if batches is None else batches
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
    except UnreadableImage:
        raise
    except (RuntimeError, OSError, EOFError, TookTooLong) as error:
        failed = loader_failure(error)
        if failed is None:
            raise
        raise failed from None
    finally:
        watchdog.close()


def loader_failure(error: Exception) -> LoaderFailed | None:
    """What to raise for an error of the processes that load images, which are ended; None for another error.

    torch raises an error wherever the run is when one of them is killed.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    remedy = next((remedy for words, remedy in _LOADER_FAULTS.items() if words in text), None)
    if remedy is None and isinstance(error, RuntimeError):
        return None
    end_loader_processes()
    remedy = remedy or "look at the messages above, and at the disk of the data"
    return LoaderFailed(f"loading images failed ({text[:200]}); {remedy}. The same command continues")


# part of an error of torch's loader -> what to do
_LOADER_FAULTS = {
    "nothing came for": "a loader process hangs: look at the disk of the data, or raise --timeout",
    "shared memory": "lower --num_workers or --batch_size, or give /dev/shm more memory",
    "No space left on device": "lower --num_workers or --batch_size, or give /dev/shm more memory",
    "torch_": "lower --num_workers or --batch_size, or give /dev/shm more memory",
    "Too many open files": "raise the limit (ulimit -n), or lower --num_workers",
    "DataLoader worker": "a loader process was killed, often for lack of memory: lower --num_workers",
}


def _to_device(batch: Any, device: torch.device, channels_last: bool) -> tuple[Tensor, Tensor]:
    images, targets = batch
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = images.to(device, non_blocking=True, memory_format=memory_format)
    return images, targets.to(device, non_blocking=True)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    *,
    args: argparse.Namespace,
    device: torch.device,
    title: str = "",
    stops: Callable[[], bool] | None = None,
) -> dict[str, float] | None:
    """Top-1 and top-5 accuracy and cross-entropy; prints `* Acc@1 A Acc@5 B loss L`.

    Args:
        model: without DistributedDataParallel, since processes may have different numbers of batches.
        loader: batches of images [B, 3, H, W] and classes [B].
        title: printed before the line.
        stops: whether this process was asked to stop; None: no process ever is.

    Returns:
        None if any process was asked to stop. Otherwise `acc1` and `acc5` in percent (with fewer than 5
        classes, top that many), `loss`, and the integers `correct1`, `correct5` and `count`.

    Raises:
        UnreadableImage: some images to evaluate could not be read.
    """
    model.eval()
    images_seen = 0
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    loss_sum = torch.zeros(1, dtype=torch.float64, device=device)
    together = dist.get_world_size() if args.dist_eval and dist.is_initialized() else 1
    shown = Progress(f"{title}evaluation", len(loader), (getattr(loader, "batch_size", None) or 1) * together, device)
    for number, (images, targets, _) in enumerate(_on_device(loader, device, args.channels_last, args.timeout), 1):
        with autocast(args, device):
            logits = model(images)
        logits = logits.float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        counts += torch.stack([top[:, 0].sum(), top.sum()])
        images_seen += len(targets)
        loss_sum += torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        shown.update(number)
        if stops is not None and stops():
            break
    shown.close(keep=False)
    if stops is not None and reduce_sum(torch.tensor([float(stops())], device=device)).item():
        return None
    counts = torch.cat([counts, counts.new_tensor([images_seen])])
    if args.dist_eval:
        reduce_sum(counts)
        reduce_sum(loss_sum)
    correct1, correct5, count = counts.tolist()
    expected = getattr(loader.dataset, "total", None) or count
    if count == 0 or count != expected:
        raise UnreadableImage(f"{count} of {expected} images to evaluate could be read; repair the data set")
    result = {"acc1": 100 * correct1 / count, "acc5": 100 * correct5 / count, "loss": loss_sum.item() / count}
    log(f"{title}* Acc@1 {result['acc1']:.3f} Acc@5 {result['acc5']:.3f} loss {result['loss']:.3f}")
    if not math.isfinite(result["loss"]):
        log("warning: the loss of the evaluation is not finite")
    return {**result, "correct1": correct1, "correct5": correct5, "count": count}
