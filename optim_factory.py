"""Parameter groups, optimizers, and the schedules of the learning rate and the weight decay."""

import argparse
import math
from typing import Any

import torch
from timm.models._manipulate import group_with_matcher

from models import warehouse_layers, warehouse_stages
from models.config import ConfigError


def parameter_groups(
    model: torch.nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    decay_norm_and_bias: bool = False,
    decay_layer_scale: bool = False,
) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and by learning-rate scale.

    Biases, norms and other 1-d parameters, and those that the model itself names in `no_weight_decay`, have no weight
    decay; the cells of warehouses do.

    Args:
        model: any timm model, dynamic or not.
        weight_decay: weight decay of the parameters that are decayed.
        layer_decay: a factor d. The learning rate of a stage k stages before the output is multiplied by d^k; a
            warehouse belongs to the stage of most of its layers.
        decay_norm_and_bias: decay all parameters (the released code of ODConv).
        decay_layer_scale: decay the layer scales of ConvNeXt, which the released code of KernelWarehouse keeps as
            [1, C, 1, 1] in its dynamic networks.

    Returns:
        Groups for a torch optimizer, with `weight_decay`, `decayed`, `lr_scale` and the `names` of the parameters.

    Raises:
        ConfigError: `layer_decay` is not 1, and the model does not tell its stages.
    """
    skipped = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    scales = _stage_scales(model, layer_decay) if layer_decay != 1.0 else {}
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not name.endswith(".bias") and name not in skipped
        decayed |= decay_norm_and_bias or (decay_layer_scale and name.endswith(".gamma"))
        scale = scales.get(name, 1.0)
        decay = weight_decay if decayed else 0.0
        new = {"params": [], "names": [], "weight_decay": decay, "decayed": decayed, "lr_scale": scale}
        group = groups.setdefault((decayed, scale), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _stage_scales(model: torch.nn.Module, layer_decay: float) -> dict[str, float]:
    """Factor of the learning rate by parameter name."""
    if not hasattr(model, "group_matcher"):
        raise ConfigError("--layer_decay needs a model that tells its stages (timm's group_matcher); leave it at 1")
    users = warehouse_layers(model)
    # a layer may have no parameter of its own, so its stage is looked up by the name of a stand-in
    stand_ins = {layer: f"{layer}.weight" for layers in users.values() for layer in layers}
    names = [name for name, _ in model.named_parameters() if name not in users]
    names = dict.fromkeys(names + list(stand_ins.values()))
    stages = group_with_matcher([(name, name) for name in names], model.group_matcher(coarse=True), reverse=True)
    stages |= warehouse_stages(model, lambda layer: stages[stand_ins[layer]])
    # a kernel representation is computed from the image, so it belongs to the stage of the stem
    for name in stages:
        if name.startswith("kernel_representation."):
            stages[name] = 0
    last = max(stages.values())
    return {name: layer_decay ** (last - stage) for name, stage in stages.items()}


def create_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make AdamW, Adam, or SGD with momentum, over `parameter_groups`.

    As in the released code, "sgd" means the same as "nesterov", SGD with Nesterov's momentum; "momentum" means SGD with
    plain momentum.

    AdamW shrinks the weights by lr x weight decay; Adam and SGD add weight decay x weight to the gradient.

    All are torch's fused versions, which can skip an update by a flag that stays on the device (`found_inf`).
    """
    groups = parameter_groups(
        model, args.weight_decay, args.layer_decay, args.decay_norm_and_bias, args.decay_layer_scale
    )
    for group in groups:
        group["lr"] = args.lr * group["lr_scale"]
    if args.opt in ("sgd", "nesterov", "momentum"):
        # without momentum both are plain SGD, and torch refuses nesterov=True
        nesterov = args.opt != "momentum" and args.momentum > 0
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, nesterov=nesterov, fused=True)
        # Torch leaves the momentum uninitialised where the first update is skipped. Momentum that starts from zeros is
        # the same otherwise.
        for group in groups if args.momentum else ():
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    betas = tuple(args.opt_betas or (0.9, 0.999))
    kind = torch.optim.Adam if args.opt == "adam" else torch.optim.AdamW
    return kind(groups, lr=args.lr, betas=betas, eps=args.opt_eps, fused=True)


class Schedule:
    """Learning rate and weight decay at every optimizer update, counted from 0 over the whole run.

    The learning rate rises linearly from 0 to `lr` during the warm-up. Then it either follows half a cosine down to
    `min_lr` (at the update after the last), or is multiplied by `decay_rate` every `decay_epochs` epochs. The weight
    decay follows half a cosine to `weight_decay_end`, where that is given.

    With `schedule_by` "epoch" the learning rate after the warm-up changes at the first update of every epoch only, as
    in the released code of ODConv.

    Args:
        args: the options of the optimizer.
        steps_per_epoch: optimizer updates in an epoch.
    """

    def __init__(self, args: argparse.Namespace, steps_per_epoch: int) -> None:
        self.args, self.steps_per_epoch = args, steps_per_epoch
        self.total = args.epochs * steps_per_epoch
        self.warmup = args.warmup_steps if args.warmup_steps > 0 else args.warmup_epochs * steps_per_epoch

    def lr(self, step: int) -> float:
        """Learning rate at an update."""
        args = self.args
        if step < self.warmup:
            return args.lr * step / max(1, self.warmup - 1)
        if args.lr_schedule == "step":
            return args.lr * args.decay_rate ** (step // self.steps_per_epoch // args.decay_epochs)
        if args.schedule_by == "epoch":
            # the epoch in which the warm-up ends has the rate at the end of the warm-up
            step = max(step // self.steps_per_epoch * self.steps_per_epoch, self.warmup)
        return _cosine(args.lr, args.min_lr, (step - self.warmup) / max(1, self.total - self.warmup))

    def weight_decay(self, step: int) -> float:
        """Weight decay at an update."""
        end = self.args.weight_decay_end
        if end is None:
            return self.args.weight_decay
        return _cosine(self.args.weight_decay, end, step / self.total)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> tuple[float, float]:
        """Set the learning rate and the weight decay of an update in the optimizer; returns them."""
        lr, weight_decay = self.lr(step), self.weight_decay(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if group["decayed"]:
                group["weight_decay"] = weight_decay
        return lr, weight_decay


def _cosine(start: float, end: float, share: float) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))
