"""Every option of a run, in one table.

The command line is generated from it, and config files are checked against it.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "an object"}


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        type: bool, int, float, str, or dict (a JSON object, in config files only).
        default: value where neither the command line nor the config gives one. Where it is None, null is accepted.
        help: one line for `--help`.
        group: heading in `--help`; those of "model" and "method" are what `build_model` reads.
        nargs: None for one value, 2 for exactly two, "+" for one value or a list, "*" for a list that may be empty.
        choices: the accepted values.
        low, high: inclusive bounds.
        above: exclusive lower bound.
        nullable: accepts null (on the command line: none) although the default is not None.
        pattern: regular expression that a string must match in full; with `choices`, an alternative to them.
        hint: what `pattern` accepts, in words.
        entries: of a dict of dicts: what an entry may hold, name -> option.
    """

    type: type
    default: Any
    help: str
    group: str = "run"
    nargs: Any = None
    choices: tuple = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    nullable: bool = False
    pattern: str = ""
    hint: str = ""
    entries: dict | None = None

    def joined(self, other: "Option") -> "Option":
        """What fits this option or the other one of the same name, of another method."""
        nargs = next((n for n in ("*", "+") if n in (self.nargs, other.nargs)), self.nargs)
        return replace(self, nargs=nargs, choices=tuple(dict.fromkeys(self.choices + other.choices)))

    def single(self, default: Any) -> "Option":
        """This option where it takes one value, with another default."""
        return replace(self, nargs=None, default=default)

    def accepts_null(self) -> bool:
        return self.nullable or self.default is None

    def expected(self) -> str:
        """What a valid value looks like, in words."""
        if self.choices:
            text = "one of " + ", ".join(self.choices) + (f", or {self.hint}" if self.hint else "")
        else:
            text = self.hint or _TYPE_NAMES[self.type]
        if self.low is not None and self.high is not None:
            text += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            text += f" of at least {self.low:g}"
        elif self.above is not None:
            text += f" above {self.above:g}" + (f" and at most {self.high:g}" if self.high is not None else "")
        if self.nargs == 2:
            text = f"two values, each {text}"
        elif self.nargs == "+":
            text += ", or a list of such"
        elif self.nargs == "*":
            text += ", or a list of such (it may be empty)"
        return text + (", or null" if self.accepts_null() else "")


def _in_group(group: str, **options: Option) -> dict[str, Option]:
    return {name: replace(option, group=group) for name, option in options.items()}


_SHARE: dict[str, Any] = {"low": 0, "high": 1}

_OWN: dict[str, Option] = {
    **_in_group(
        "model",
        model=Option(
            str,
            "convnext_tiny",
            "name of a timm model; METHOD_NAME makes it dynamic, as kw_resnet18 or od_resnet50",
            pattern=r"[A-Za-z0-9][A-Za-z0-9_.\-]*",
            hint="a model name",
        ),
        layers=Option(
            str,
            None,
            "layers to replace: all, 1x1, 3x3, last_N_blocks, classifier, patterns of names; null: the method's own",
            nargs="*",
        ),
        block_attention=Option(
            str, None, "attention module of every block of a ResNet, timm's", choices=("se", "cbam", "eca")
        ),
        initialisation=Option(
            str,
            "timm",
            "how a network starts: as timm's, or as the papers' released ResNets and MobileNetV2 (others stay timm's)",
            choices=("timm", "released"),
        ),
        drop_path=Option(float, 0.0, "stochastic depth rate", **_SHARE),
        block_drop_path=Option(
            str, None, "drop path the same in all blocks, or growing with depth", choices=("constant", "linear")
        ),
        dropout=Option(float, 0.0, "dropout before the classifier", **_SHARE),
        head_init_scale=Option(float, 1.0, "factor of the classifier's initial weights", low=0),
        layer_scale_init_value=Option(float, 1e-6, "initial layer scale of ConvNeXt; 0 for none", low=0),
    ),
    **_in_group(
        "temperature",
        temp_epoch=Option(int, 20, "epochs in which the temperature falls linearly to its last value", low=0),
        temp_init_value=Option(
            float,
            1.0,
            "temperature at the start; where not given, 30 for ODConv and DY-Conv",
            low=0,
            high=1000,
        ),
    ),
    **_in_group(
        "training",
        batch_size=Option(int, 64, "images per process and forward pass", low=1),
        epochs=Option(int, 300, "epochs", low=1),
        update_freq=Option(int, 1, "forward passes per optimizer update", low=1),
        input_size=Option(int, 224, "height and width of the input, in pixels", low=1, high=8192),
        seed=Option(int, 0, "seed of everything random", low=0, high=2**31 - 1),
        device=Option(
            str,
            "cuda",
            "device; without a GPU, cuda falls back to cpu",
            pattern=r"cuda(:\d+)?|cpu",
            hint="cuda, cuda:N or cpu",
        ),
        use_amp=Option(bool, False, "automatic mixed precision"),
        amp_dtype=Option(
            str, "auto", "auto: bfloat16 where the device has it, else float16", choices=("auto", "bfloat16", "float16")
        ),
        channels_last=Option(bool, False, "channels-last memory format"),
        compile=Option(bool, False, "compile the model with torch.compile"),
        model_ema=Option(bool, False, "keep an exponential moving average (EMA) of the weights"),
        model_ema_decay=Option(float, 0.9999, "decay of the EMA per update", **_SHARE),
        model_ema_force_cpu=Option(bool, False, "keep the EMA in the CPU's memory; it is then evaluated there"),
        model_ema_eval=Option(bool, False, "evaluate the EMA after every epoch as well"),
    ),
    **_in_group(
        "optimizer",
        opt=Option(
            str,
            "adamw",
            "optimizer; sgd, as nesterov, has Nesterov's momentum, momentum the plain one; weight decay is an L2 "
            "penalty in all but adamw",
            choices=("adamw", "adam", "sgd", "nesterov", "momentum"),
        ),
        opt_eps=Option(float, 1e-8, "epsilon of Adam and AdamW", low=0),
        opt_betas=Option(float, None, "betas of Adam and AdamW; null: 0.9 0.999", nargs=2, low=0, high=1),
        clip_grad=Option(float, None, "greatest norm of the gradient; null: no clipping", above=0),
        momentum=Option(float, 0.9, "momentum of SGD", **_SHARE),
        weight_decay=Option(float, 0.05, "weight decay; none for biases, norms and other 1-d parameters", low=0),
        decay_norm_and_bias=Option(bool, False, "decay these as well, as ODConv's released code does"),
        decay_layer_scale=Option(
            bool, False, "decay the layer scales of ConvNeXt, as KernelWarehouse's released code does in its own"
        ),
        weight_decay_end=Option(float, None, "weight decay at the end, reached by a cosine; null: constant", low=0),
        lr=Option(float, 4e-3, "learning rate for the whole batch, used as given", low=0),
        min_lr=Option(float, 1e-6, "learning rate at the end of the cosine", low=0),
        lr_schedule=Option(str, "cosine", "cosine, or steps between epochs", choices=("cosine", "step")),
        schedule_by=Option(
            str, "update", "the cosine goes down with every update, or once an epoch", choices=("update", "epoch")
        ),
        decay_epochs=Option(int, 30, "epochs between two steps of the step schedule", low=1),
        decay_rate=Option(float, 0.1, "factor of the step schedule", above=0, high=1),
        layer_decay=Option(float, 1.0, "factor of the learning rate per stage away from the output", above=0),
        warmup_epochs=Option(int, 20, "epochs of linear warm-up from 0", low=0),
        warmup_steps=Option(int, -1, "updates of linear warm-up; above 0 it replaces warmup_epochs", low=-1),
    ),
    **_in_group(
        "augmentation",
        traditional_preprocess=Option(bool, False, "random crop and flip only; evaluation resizes to 8/7 and crops"),
        color_jitter=Option(float, 0.4, "colour jitter, used where aa is none", low=0, nullable=True),
        aa=Option(str, "rand-m9-mstd0.5-inc1", "RandAugment or AutoAugment policy in timm's notation", nullable=True),
        smoothing=Option(float, 0.1, "label smoothing", **_SHARE),
        train_interpolation=Option(
            str, "bicubic", "interpolation in training", choices=("bicubic", "bilinear", "random")
        ),
        crop_pct=Option(float, None, "evaluation crop over the resized image; null: 224/256", above=0, high=1),
        reprob=Option(float, 0.25, "probability of random erasing", **_SHARE),
        remode=Option(str, "pixel", "filling of random erasing", choices=("pixel", "rand", "const")),
        recount=Option(int, 1, "greatest number of erased regions", low=1),
        resplit=Option(bool, False, "no random erasing in the first augmentation split (accepted; there is one split)"),
        mixup=Option(float, 0.8, "alpha of mixup; 0: off", low=0),
        cutmix=Option(float, 1.0, "alpha of cutmix; 0: off", low=0),
        cutmix_minmax=Option(
            float, None, "least and greatest side of the cutmix box; replaces its alpha", nargs=2, low=0, high=1
        ),
        mixup_prob=Option(float, 1.0, "probability of mixing", **_SHARE),
        mixup_switch_prob=Option(float, 0.5, "probability of cutmix where both are on", **_SHARE),
        mixup_mode=Option(str, "batch", "mix per batch, pair or element", choices=("batch", "pair", "elem")),
    ),
    **_in_group(
        "data",
        data_set=Option(
            str,
            "IMNET",
            "data set",
            choices=("IMNET", "image_folder", "CIFAR", "CIFAR10", "CIFAR100", "digits", "glyphs"),
            pattern=r"(wds|hfds|hfids|tfds|folder)/.*",
            hint="a timm reader string such as wds/NAME or hfds/NAME",
        ),
        data_path=Option(str, "", "folder of the data; IMNET: with train/ and val/ inside; CIFAR: binary version"),
        eval_data_path=Option(str, None, "folder of the evaluation images of image_folder"),
        nb_classes=Option(int, 1000, "number of classes; taken from the data where not given", low=1),
        imagenet_default_mean_and_std=Option(
            bool, True, "normalise by ImageNet's mean and deviation; else by 0.5 and 0.5"
        ),
        num_workers=Option(int, 10, "loader processes per training process, at most the cores it has", low=0),
        pin_mem=Option(bool, True, "page-locked loader memory, on a GPU"),
    ),
    **_in_group(
        "checkpoints",
        output_dir=Option(str, "", "folder of log.txt and the checkpoints; empty: nothing is written"),
        finetune=Option(str, "", "path or URL of weights to start from; a classifier of another size is left out"),
        model_key=Option(str, "model|module", "entries of the file of --finetune to look for, in this order"),
        model_prefix=Option(str, "", "prefix of the keys of the file of --finetune, taken off"),
        resume=Option(str, "", "path or URL of the checkpoint to continue, or to evaluate"),
        auto_resume=Option(bool, True, "continue from the newest good checkpoint of output_dir"),
        save_ckpt=Option(bool, True, "write checkpoints"),
        save_ckpt_freq=Option(int, 1, "epochs between checkpoints", low=1),
        save_ckpt_num=Option(int, 3, "number of checkpoints to keep", low=1),
        start_epoch=Option(int, 0, "first epoch", low=0),
    ),
    **_in_group(
        "run",
        kw_config=Option(str, None, "config file (JSON); the command line overrides it"),
        recipe=Option(
            str,
            None,
            "settings of configs/recipes/NAME.json, which the config overrides",
            pattern=r"[A-Za-z0-9][A-Za-z0-9_.\-]*",
            hint="the name of a recipe",
        ),
        eval=Option(bool, False, "evaluate only"),
        dist_eval=Option(bool, True, "divide the evaluation among the processes"),
        disable_eval=Option(bool, False, "no evaluation during training"),
        log_dir=Option(str, None, "folder of TensorBoard logs (needs tensorboardX)"),
        log_interval=Option(int, 10, "updates between two log lines", low=1),
        enable_wandb=Option(bool, False, "log to Weights & Biases (needs wandb)"),
        project=Option(str, "convnext", "project name for Weights & Biases"),
        wandb_ckpt=Option(bool, False, "upload the checkpoints to Weights & Biases"),
    ),
    **_in_group(
        "processes",
        world_size=Option(int, 1, "number of processes; the launcher says it", low=1),
        local_rank=Option(int, -1, "index on this machine, as the launcher passes it", low=-1),
        dist_on_itp=Option(bool, False, "read rank and size from Open MPI's environment"),
        dist_url=Option(str, "env://", "address at which the processes meet"),
    ),
}


@functools.cache
def all_options() -> dict[str, Option]:
    """Every option by name, the settings of methods among them (which takes as long as loading torch)."""
    from .methods import method_options

    settings = _in_group("method", **method_options())
    return {**settings, **_OWN}


def __getattr__(name: str) -> Any:
    if name == "OPTIONS":
        return all_options()
    if name == "MODEL_KEYS":
        return frozenset(key for key, option in all_options().items() if option.group in ("model", "method"))
    if name == "METHOD_KEYS":
        return frozenset(key for key, option in all_options().items() if option.group == "method") | {"layers"}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
