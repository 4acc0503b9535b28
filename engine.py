"""One epoch of training, the evaluation, and the temperature schedule."""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from loading.images import UnreadableImage
from models import set_temperature, temperature_range
from models.ops.dead_taps import WrittenGradients
from utils import Process, Progress, RunLog, log, reduce_sum

if TYPE_CHECKING:
    from timm.data import Mixup
    from timm.utils import ModelEmaV3

    from optim_factory import Schedule


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is NaN or infinite. The message names the epoch and the step."""


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
) -> dict[str, float | None]:
    """Train for an epoch.

    An update averages the gradients of `update_freq` batches of every process. Batches at the end of the loader that
    do not fill an update are dropped. A step waits for a GPU only when it logs.

    Args:
        net: the model, bare or in DistributedDataParallel.
        loader: batches of images [B, 3, H, W] and classes [B].
        schedule: learning rate and weight decay at every update.
        criterion: loss of logits [B, classes] and targets (classes [B], or [B, classes] with mixup).
        epoch: counted from 0 over the whole run.
        scaler: enabled for float16 only.
        mixup: mixes images and targets; None: no mixing.
        ema: average of the weights to update; None: none is kept.
        run_log: receives the metrics of the steps that log.

    Returns:
        Averages over the epoch and all processes: `loss` and `acc1` (None with mixup), and the last `lr`,
        `weight_decay`, `temperature` and `grad_norm`.

    Raises:
        NonFiniteLoss: in all processes at the same step. No update was made from such a gradient.
    """
    model = net.module if isinstance(net, DistributedDataParallel) else net
    device, steps = process.device, schedule.steps_per_epoch
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    temperature, (_, final) = None, temperature_range(model)
    # sums of the loss, of correct images and of images, which stay on the device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    first_bad_step = torch.full((), -1.0, device=device)
    progress = Progress(f"epoch {epoch}", steps, args.batch_size * args.update_freq * process.world, device)

    net.train()
    batches = _on_device(loader, device, args.channels_last)
    for update in range(steps):
        step = epoch * steps + update
        lr, weight_decay = schedule.apply(optimizer, step)
        now = temperature_at(step, steps, args.temp_epoch, args.temp_init_value, final)
        if now != temperature:
            temperature = now
            set_temperature(model, temperature)

        loss_of_update = torch.zeros((), device=device)
        for micro in range(args.update_freq):
            images, targets = next(batches)
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
                sums[1] += (logits.detach().argmax(1) == classes).sum()
                sums[2] += len(classes)
        sums[0] += loss_of_update

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
        bad = (~finite).float()
        if dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        first_bad_step = torch.where((first_bad_step < 0) & (bad > 0), float(update), first_bad_step)
        last = update == steps - 1
        logs = (update + 1) % args.log_interval == 0 or last
        # On a CPU, check every update. On a GPU, check only when logging; the optimizer skips bad updates meanwhile.
        if logs or device.type == "cpu":
            _raise_if_bad(first_bad_step, epoch, steps)
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.found_inf = bad
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(model)

        if logs:
            metrics = {
                "loss": loss_of_update.item(),
                "lr": lr,
                "temperature": temperature,
                "grad_norm": grad_norm.item(),
            }
            progress.update(update + 1, "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
            if run_log is not None:
                run_log.step(step + 1, {f"train/{name}": value for name, value in metrics.items()})

    reduce_sum(sums)
    loss, correct, images_seen = sums.tolist()
    return {
        "loss": loss / steps / process.world,
        "acc1": 100 * correct / images_seen if images_seen else None,
        "lr": lr,
        "weight_decay": weight_decay,
        "temperature": temperature,
        "grad_norm": grad_norm.item(),
    }


def _raise_if_bad(first_bad_step: torch.Tensor, epoch: int, steps: int) -> None:
    bad = int(first_bad_step.item())
    if bad >= 0:
        raise NonFiniteLoss(
            f"the loss or the gradient is not finite at step {bad} of epoch {epoch} (step {epoch * steps + bad} of the "
            "run); the last checkpoint is intact. Lower --lr, lengthen --warmup_epochs or set --clip_grad"
        )


def _on_device(loader: Iterable, device: torch.device, channels_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader on the device.

    For a GPU a separate stream copies them, while the GPU still computes the step before.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in loader:
        with torch.cuda.stream(stream):
            batch = _to_device(batch, device, channels_last)
        if stream is not None:
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            for tensor in batch:
                # keep the allocator from giving this memory to the next copy before this step has used it
                tensor.record_stream(current)
        yield batch


def _to_device(batch: Any, device: torch.device, channels_last: bool) -> tuple[Tensor, Tensor]:
    images, targets = batch
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = images.to(device, non_blocking=True, memory_format=memory_format)
    return images, targets.to(device, non_blocking=True)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, *, args: argparse.Namespace, device: torch.device, title: str = ""
) -> dict[str, float]:
    """Top-1 and top-5 accuracy and cross-entropy; prints `* Acc@1 A Acc@5 B loss L`.

    Args:
        model: without DistributedDataParallel, since processes may have different numbers of batches.
        loader: batches of images [B, 3, H, W] and classes [B].
        title: printed before the line.

    Returns:
        `acc1` and `acc5` in percent (with fewer than 5 classes, top that many), `loss`, and the integers `correct1`,
        `correct5` and `count`.

    Raises:
        UnreadableImage: some images to evaluate could not be read.
    """
    model.eval()
    images_seen = 0
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    loss_sum = torch.zeros(1, dtype=torch.float64, device=device)
    for images, targets in _on_device(loader, device, args.channels_last):
        with autocast(args, device):
            logits = model(images)
        logits = logits.float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        counts += torch.stack([top[:, 0].sum(), top.sum()])
        images_seen += len(targets)
        loss_sum += torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
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
