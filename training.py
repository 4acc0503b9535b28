"""The training of a run: epochs, evaluations, and what is saved when."""

import argparse
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

import checkpoints
import engine
import utils
from attention_log import Attentions
from checkpoints import EpochProgress, Live, Resumed, RunFolder
from closing import where_things_are
from datasets import Loaders
from engine import NonFiniteLoss, amp_dtype, autocast
from models import get_temperature, set_temperature
from optim_factory import Schedule, create_optimizer
from option_checks import mixes
from run_logs import RunLog, plot_curves
from stopping import Stopped, StopSignals
from utils import Process, log


class Trainer:
    """Trains a model, saves it, and stops when it is asked to.

    Args:
        args: all options; `batch_size`, `update_freq` and the learning rates as they are used.
        process: this process among those of the run.
        loaders: the data.
        model: on its device.
        folder: where to save; None: nowhere.
        signals: asked between two updates.
        images_per_update: of `elastic.divide_update`.
        asked: the options of it as they were asked for, which a checkpoint keeps.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        process: Process,
        loaders: Loaders,
        model: torch.nn.Module,
        folder: RunFolder | None,
        signals: StopSignals,
        images_per_update: dict[str, int],
        asked: dict[str, Any],
    ) -> None:
        self.args, self.process, self.loaders, self.model = args, process, loaders, model
        self.folder, self.signals = folder, signals
        device = process.device
        self.steps = len(loaders.train) // args.update_freq
        self.schedule = Schedule(args, self.steps)
        scaled = args.use_amp and device.type == "cuda" and amp_dtype(args, device) == torch.float16
        self.live = Live(
            model, create_optimizer(args, model), torch.amp.GradScaler(device.type, enabled=scaled), args, process,
            images=len(loaders.train.dataset), images_per_update=images_per_update, asked=asked,
        )  # fmt: skip
        self.mixup, self.criterion = _mixing(args, loaders.nb_classes)
        self.resumed = Resumed(args.start_epoch)
        self.run_log: RunLog | None = None
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._saved = time.monotonic()
        # seconds from the last update of an epoch to the first of the next
        self._between = 0.0
        self._every, self._seconds = _interval(args.save_interval)
        each = f"{args.batch_size} x {args.update_freq} x {process.world}"
        log(f"{each} = {images_per_update['images']} images an update, {self.steps} updates an epoch")
        if self.schedule.warmup >= self.schedule.total:
            log(f"note: the warm-up of {self.schedule.warmup} updates is as long as the run of {self.schedule.total}")

    def prepare(self, checkpoint: dict[str, Any] | None, path: str | Path | None) -> None:
        """Continue from a checkpoint, or start; take over the output folder.

        Raises:
            ConfigError: the checkpoint does not fit, or the folder cannot be used.
        """
        args, process, live = self.args, self.process, self.live
        if args.model_ema:
            where = torch.device("cpu") if args.model_ema_force_cpu else process.device
            live.ema = ModelEmaV3(self.model, decay=args.model_ema_decay, device=where)
        utils.set_seed(args.seed + process.rank)
        if checkpoint is not None:
            self.resumed = checkpoints.restore(checkpoint, path, live)
        progress = self.resumed.progress
        if progress is not None:
            # with another number of images per update, as many updates are left as the images that are left have
            left = (live.images - progress.samples) // live.images_per_update["images"]
            progress.update = max(0, self.steps - left)
        if self.folder is not None:
            self.folder.begin(checkpoint, path)
            live.run = self.folder.run
        done = self.resumed.epoch * self.steps + (progress.update if progress else 0)
        self.run_log = RunLog(args, self.resumed.epoch, done)
        if args.compile:
            # compile in place, which changes neither the keys of the state dict nor the EMA's copy of the model
            self.model.compile()
        self.net = self.model
        if process.world > 1:
            self.net = utils.in_parallel(self.model, process.device, args.grad_compression)
            self._settle_buckets()
        elif args.grad_compression != "none":
            log("note: --grad_compression has no effect on one process, which exchanges no gradients")

    def _settle_buckets(self) -> None:
        """Let DistributedDataParallel put the gradients into their final order before the first update.

        It orders them anew after the first backward pass of a process. With three or more processes the order changes
        how sums are rounded, and the first update after a resume would differ from that of the unbroken run.
        """
        args, device = self.args, self.process.device
        if self.process.world < 3 or self.resumed.epoch >= args.epochs:
            return
        generators = checkpoints.rng_state(device)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        # a compiled model is compiled for this shape
        images = torch.zeros(
            args.batch_size if args.compile else min(2, args.batch_size), args.in_chans, *[args.input_size] * 2
        )
        self.net.train()
        with autocast(args, device):
            self.net(images.to(device)).float().sum().backward()
        self.net.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), buffers):
                buffer.copy_(value)
        checkpoints.set_rng_state(generators, device)

    def train(self) -> None:
        """Train to the last epoch.

        Raises:
            NonFiniteLoss, UnreadableImage, LoaderFailed: as `engine.train_one_epoch`.
            Stopped: a signal asked for it; the run was saved.
        """
        started, first = time.perf_counter(), self.resumed.epoch
        self.signals.defer()
        for epoch in range(first, self.args.epochs):
            self._epoch(epoch)
        if self.folder is not None:
            self.folder.wait()
        self.run_log.close()
        log(f"trained {max(0, self.args.epochs - first)} epochs in {time.perf_counter() - started:.0f} s")
        for name, value in self.resumed.best.items():
            if value is not None:
                log(f"best {name}: {value:.3f}")
        if self.process.is_main:
            if self.folder is not None:
                _draw(self.folder.path)
                self._report("finished", examines=True)
            for line in where_things_are(self.args, self.folder and self.folder.path):
                log(line)

    def _epoch(self, epoch: int) -> None:
        args, live, ema = self.args, self.live, self.live.ema
        progress, self.resumed.progress = self.resumed.progress or EpochProgress(epoch), None
        self.loaders.set_epoch(epoch, progress.samples)
        trained = engine.train_one_epoch(
            self.net, self.loaders.train, live.optimizer, self.schedule, self.criterion, args=args, epoch=epoch,
            process=self.process, scaler=live.scaler, mixup=self.mixup, ema=ema, run_log=self.run_log,
            progress=progress, watch=self, between=self._between,
        )  # fmt: skip
        ended = time.perf_counter()
        utils.synchronise_buffers(*live.modules())
        if ema is not None:
            set_temperature(ema.module, get_temperature(self.model))
        self._require_finite(epoch)

        metrics = {"epoch": epoch, **{f"train_{name}": value for name, value in trained.items()}}
        evaluated = self._evaluate(progress)
        improved = []
        best, best_epoch = self.resumed.best, self.resumed.best_epoch
        for name, result in evaluated.items():
            suffix = name.removeprefix("acc1")
            metrics |= {f"test_{key}{suffix}": result[key] for key in ("loss", "acc1", "acc5")}
            if best[name] is None or result["acc1"] > best[name]:
                best[name], best_epoch[name] = result["acc1"], epoch
                improved.append(name)
        metrics |= {f"best_{name}": value for name, value in best.items() if value is not None}
        self.run_log.epoch((epoch + 1) * self.steps, {**metrics, "n_parameters": self.parameters})

        if self.folder is not None and args.save_ckpt:
            due = (epoch + 1) % args.save_ckpt_freq == 0 or epoch + 1 == args.epochs
            if due or improved:
                state = self._state(epoch)
            if due:
                if self.folder.save(state, epoch, best=improved, wait=args.wandb_ckpt):
                    self.run_log.checkpoint(self.folder.path / checkpoints.file_name(epoch))
                self._saved = time.monotonic()
            elif improved:
                self.folder.save_best(state, improved)
        self._between = time.perf_counter() - ended

    def _evaluate(self, progress: EpochProgress) -> dict[str, dict[str, float]]:
        """What the evaluations of an epoch give: of the weights, and of their average where it is evaluated."""
        averages = self.live.ema.module if self.live.ema is not None and self.args.model_ema_eval else None
        results = {}
        for name, module in {"acc1": self.model, "acc1_ema": averages}.items():
            if module is None or self.loaders.evaluation is None:
                continue
            # a compiled model takes no observers
            watched = module is self.model and self.run_log.shows_attentions and not self.args.compile
            with Attentions(module) if watched else nullcontext() as seen:
                result = engine.evaluate(
                    module, self.loaders.evaluation, args=self.args, device=next(module.parameters()).device,
                    title="EMA " if module is averages else "", stops=lambda: bool(self.signals.asked),
                )  # fmt: skip
            if result is not None and seen is not None:
                self.run_log.attentions((progress.epoch + 1) * self.steps, seen.alphas)
            if result is None:
                # the resumed run evaluates again
                self.act(progress, stop=True, save=False)
            results[name] = result
        return results

    def planned(self, progress: EpochProgress) -> bool:
        """Whether a save is due by the number of updates (`engine.Watch`)."""
        return bool(self._every) and (progress.epoch * self.steps + progress.update) % self._every == 0

    def wishes(self, progress: EpochProgress) -> tuple[bool, bool]:
        """Whether this process wants to stop, and whether it wants to save (`engine.Watch`)."""
        # the clock of the first process counts
        due = self.process.is_main and 0 < self._seconds <= time.monotonic() - self._saved
        return bool(self.signals.asked), (due or self.planned(progress)) and not self._saves_nothing()

    def act(self, progress: EpochProgress, stop: bool, save: bool) -> None:
        """Save, and stop, as any of the processes wished (`engine.Watch`)."""
        if not stop and not save:
            return
        about = self._saves_nothing()
        if not about:
            self._require_finite(progress.epoch)
            state = self._state(progress.epoch, progress)
            saved = self.folder.save(state, progress.epoch, progress.update, wait=stop)
            self._saved = time.monotonic()
            about = "the last updates were not saved; the same command continues from the checkpoint before them"
            if saved:
                path = self.folder.path / checkpoints.file_name(progress.epoch, progress.update)
                about = f"saved {path}; the same command continues there"
        if stop:
            self.run_log.close()
            if self.folder is not None and self.process.is_main:
                self._report(f"stopped in epoch {progress.epoch}", examines=False)
            raise Stopped(self.signals.asked or signal.SIGTERM, about)

    def _report(self, state: str, examines: bool) -> None:
        if self.args.report:
            from inspection.record import report

            report(self, state, examines)

    def _saves_nothing(self) -> str:
        """Why nothing is saved within an epoch; empty: it is."""
        if self.folder is None:
            return "nothing was saved, since there is no --output_dir"
        if not self.args.save_ckpt:
            return "nothing was saved, since --save_ckpt is false"
        if not self.loaders.positioned:
            return "nothing was saved, since a stream of images has no positions; the same command repeats the epoch"
        return ""

    def _state(self, epoch: int, progress: EpochProgress | None = None) -> dict[str, Any]:
        best, best_epoch = self.resumed.best, self.resumed.best_epoch
        return checkpoints.training_state(self.live, epoch, get_temperature(self.model), best, best_epoch, progress)

    def _require_finite(self, epoch: int) -> None:
        """Refuse to go on with weights that are not finite, which no checkpoint must hold.

        Raises:
            NonFiniteLoss: on all processes.
        """
        held = [tensor for module in self.live.modules() for tensor in (*module.parameters(), *module.buffers())]
        held += [value for entry in self.live.optimizer.state.values() for value in entry.values()]
        floats = [tensor for tensor in held if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()]
        bad = torch.stack([(~torch.isfinite(tensor)).any().to(self.process.device) for tensor in floats]).any()
        if utils.reduce_sum(bad.float()).item():
            raise NonFiniteLoss(
                f"the weights or the state of the optimizer are not finite in epoch {epoch} (from 0, as in log.txt), "
                "and were not saved; the last checkpoint is intact. Lower --lr, raise --opt_eps or set --clip_grad"
            )


def _mixing(args: argparse.Namespace, nb_classes: int) -> tuple[Mixup | None, torch.nn.Module]:
    """What mixes the images of a batch, or None, and the loss of what it gives."""
    if not mixes(args):
        return None, torch.nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    mixup = Mixup(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
        num_classes=nb_classes,
    )  # fmt: skip
    return mixup, SoftTargetCrossEntropy()


def _interval(text: str) -> tuple[int, float]:
    """Updates and seconds between two saves within an epoch; 0: not counted in this unit."""
    return (0, 60.0 * int(text[:-1])) if text.endswith("m") else (int(text), 0.0)


def _draw(folder: Path) -> None:
    """Draw the curves; a run that has trained does not fail for a picture."""
    if not (folder / "log.txt").is_file():
        return
    try:
        plot_curves(folder / "log.txt", folder / "curves.png")
    except ImportError:
        log("curves.png was not drawn: matplotlib is not installed")
    except Exception as error:
        log(f"warning: curves.png was not drawn ({(str(error) or type(error).__name__).splitlines()[0]})")
