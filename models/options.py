"""The table of all options of a run.

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
        default: value if neither the command line nor the config gives one. If it is None, null is accepted.
        help: one line for `--help`.
        group: heading in `--help`; `build_model` reads the options of the groups "model" and "method".
        nargs: None for one value, 2 for exactly two, "+" for one value or a list, "*" for a list that may be empty.
        choices: the accepted values.
        low, high: inclusive bounds.
        above: exclusive lower bound.
        nullable: accepts null (on the command line: none) although the default is not None.
        pattern: regular expression that a string must match in full; with `choices`, an alternative to them.
        hint: what `pattern` accepts, in words.
        entries: for a dict of dicts: the options that each entry may hold, by name.
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
        """An option that accepts the values of both: this one, and another method's option of the same name."""
        nargs = next((n for n in ("*", "+") if n in (self.nargs, other.nargs)), self.nargs)
        return replace(self, nargs=nargs, choices=tuple(dict.fromkeys(self.choices + other.choices)))

    def single(self, default: Any) -> "Option":
        """A copy of this option that takes one value and has the given default."""
        return replace(self, nargs=None, default=default)

    def limits(self) -> str:
        """The choices or the range, for `--help`; empty where every value of the type is accepted."""
        if not self.choices:
            return " ".join(filter(None, (self.hint, self._bounds().removeprefix("of "))))
        return ", ".join(self.choices) + (f", or {self.hint}" if self.hint else "")

    def _bounds(self) -> str:
        if self.low is not None and self.high is not None:
            return f"from {self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"of at least {self.low:g}"
        if self.above is not None:
            return f"above {self.above:g}" + (f" and at most {self.high:g}" if self.high is not None else "")
        return ""

    def accepts_null(self) -> bool:
        return self.nullable or self.default is None

    def expected(self) -> str:
        """What a valid value looks like, in words."""
        if self.choices:
            text = "one of " + ", ".join(self.choices) + (f", or {self.hint}" if self.hint else "")
        else:
            text = self.hint or _TYPE_NAMES[self.type]
        text += f" {self._bounds()}" if self._bounds() else ""
        if self.nargs == 2:
            text = f"two values, each {text}"
        elif self.nargs == "+":
            text += ", or a list of such values"
        elif self.nargs == "*":
            text += ", or a list of such values (it may be empty)"
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
            "name of a timm model; METHOD_NAME makes it dynamic, as in kw_resnet18 or od_resnet50",
            pattern=r"[A-Za-z0-9][A-Za-z0-9_.\-]*",
            hint="a model name",
        ),
        in_chans=Option(
            int,
            3,
            "channels of the images: 3, or 1, for which they are made grey; in Python any number",
            low=1,
            high=2**16,
        ),
        layers=Option(
            str,
            None,
            "layers to replace: all, 1x1, 3x3, last_N_blocks, classifier, patterns of names; null: the method's choice",
            nargs="*",
        ),
        block_attention=Option(
            str, None, "timm's attention module to add to every block of a ResNet", choices=("se", "cbam", "eca")
        ),
        initialisation=Option(
            str,
            "timm",
            "initialisation: timm's, or that of the papers' released ResNets and MobileNetV2 (other networks: timm's)",
            choices=("timm", "released"),
        ),
        drop_path=Option(float, 0.0, "stochastic depth rate", **_SHARE),
        block_drop_path=Option(
            str,
            None,
            "drop path rate: equal in all blocks, or growing with depth; null: constant for ResNets, else linear",
            choices=("constant", "linear"),
        ),
        dropout=Option(float, 0.0, "dropout rate before the classifier", **_SHARE),
        head_init_scale=Option(float, 1.0, "factor of the classifier's initial weights, for ConvNeXt", low=0),
        layer_scale_init_value=Option(float, 1e-6, "initial layer scale of ConvNeXt; 0: no layer scale", low=0),
    ),
    **_in_group(
        "temperature",
        temp_epoch=Option(int, 20, "epochs over which the temperature falls linearly to its last value", low=0),
        temp_init_value=Option(
            float,
            1.0,
            "temperature at the start of training; if not given, 30 for ODConv and DY-Conv",
            low=0,
            high=1000,
        ),
    ),
    **_in_group(
        "training",
        batch_size=Option(int, 64, "images per process and forward pass", low=1),
        epochs=Option(int, 300, "number of epochs", low=1),
        update_freq=Option(int, 1, "forward passes per optimizer update", low=1),
        input_size=Option(int, 224, "height and width of the input, in pixels", low=1, high=8192),
        seed=Option(int, 0, "seed of all random numbers", low=0, high=2**31 - 1),
        device=Option(
            str,
            "cuda",
            "device to run on; without a GPU, cuda falls back to cpu",
            pattern=r"cuda(:\d+)?|cpu",
            hint="cuda, cuda:N or cpu",
        ),
        use_amp=Option(bool, False, "use automatic mixed precision"),
        amp_dtype=Option(
            str,
            "auto",
            "type of mixed precision; auto: bfloat16 if the device supports it, else float16",
            choices=("auto", "bfloat16", "float16"),
        ),
        channels_last=Option(bool, False, "use the channels-last memory format"),
        compile=Option(bool, False, "compile the model with torch.compile"),
        grad_compression=Option(
            str,
            "none",
            "round the gradients to this type before processes exchange them, for slow networks; none: send float32",
            choices=("none", "bf16"),
        ),
        model_ema=Option(bool, False, "keep an exponential moving average (EMA) of the weights"),
        model_ema_decay=Option(float, 0.9999, "decay of the EMA per update", **_SHARE),
        model_ema_force_cpu=Option(bool, False, "keep the EMA in the CPU's memory and evaluate it there"),
        model_ema_eval=Option(bool, False, "evaluate the EMA after every epoch as well"),
    ),
    **_in_group(
        "optimizer",
        opt=Option(
            str,
            "adamw",
            "optimizer; sgd and nesterov: SGD with Nesterov's momentum; momentum: SGD with plain momentum; weight "
            "decay is an L2 penalty except in adamw",
            choices=("adamw", "adam", "sgd", "nesterov", "momentum"),
        ),
        opt_eps=Option(float, 1e-8, "epsilon of Adam and AdamW", low=0),
        opt_betas=Option(float, None, "betas of Adam and AdamW; null: 0.9 0.999", nargs=2, low=0, high=1),
        clip_grad=Option(float, None, "clip the gradient to this norm; null: no clipping", above=0),
        momentum=Option(float, 0.9, "momentum of SGD", **_SHARE),
        weight_decay=Option(float, 0.05, "weight decay; not applied to biases, norms and other 1-d parameters", low=0),
        decay_norm_and_bias=Option(
            bool,
            False,
            "apply weight decay to biases, norms and other 1-d parameters too, as ODConv's released code does",
        ),
        decay_layer_scale=Option(
            bool,
            False,
            "apply weight decay to ConvNeXt's layer scales too, as KernelWarehouse's released code does",
        ),
        weight_decay_end=Option(
            float, None, "weight decay at the end of training, reached along a cosine; null: constant", low=0
        ),
        lr=Option(float, 4e-3, "learning rate for the whole batch; --scale_lr rescales it", low=0),
        min_lr=Option(float, 1e-6, "learning rate at the end of the cosine", low=0),
        lr_batch=Option(
            int,
            None,
            "images per update that lr and min_lr are for, as recipes tell; of no other lr than theirs",
            low=1,
        ),
        scale_lr=Option(
            bool,
            False,
            "multiply lr and min_lr by the images per update (processes x batch_size x update_freq) over lr_batch",
        ),
        lr_schedule=Option(
            str, "cosine", "learning rate: a cosine, or steps between epochs", choices=("cosine", "step")
        ),
        schedule_by=Option(
            str, "update", "lower the cosine at every update, or once per epoch", choices=("update", "epoch")
        ),
        decay_epochs=Option(int, 30, "epochs between two steps of the step schedule", low=1),
        decay_rate=Option(float, 0.1, "factor of the learning rate at a step of the step schedule", above=0, high=1),
        layer_decay=Option(float, 1.0, "factor of the learning rate for every stage before the output", above=0),
        skip_nonfinite=Option(
            int, 0, "updates that may be left out in an epoch, since their loss or gradient is not finite", low=0
        ),
        warmup_epochs=Option(int, 20, "epochs of linear warm-up from 0", low=0),
        warmup_steps=Option(int, -1, "updates of linear warm-up; a value above 0 replaces warmup_epochs", low=-1),
    ),
    **_in_group(
        "augmentation",
        traditional_preprocess=Option(
            bool, False, "train with random crop and flip only; evaluation resizes to 8/7 of input_size and crops"
        ),
        color_jitter=Option(float, 0.4, "strength of colour jitter, used if aa is none", low=0, nullable=True),
        aa=Option(str, "rand-m9-mstd0.5-inc1", "RandAugment or AutoAugment policy in timm's notation", nullable=True),
        smoothing=Option(float, 0.1, "label smoothing", **_SHARE),
        train_interpolation=Option(
            str, "bicubic", "interpolation of the training images", choices=("bicubic", "bilinear", "random")
        ),
        crop_pct=Option(
            float, None, "side of the evaluation crop relative to the resized image; null: 224/256", above=0, high=1
        ),
        reprob=Option(float, 0.25, "probability of random erasing", **_SHARE),
        remode=Option(str, "pixel", "how random erasing fills a region", choices=("pixel", "rand", "const")),
        recount=Option(int, 1, "largest number of erased regions per image", low=1),
        resplit=Option(bool, False, "no random erasing in the first augmentation split (accepted, but without effect)"),
        mixup=Option(float, 0.8, "alpha of mixup; 0: off", low=0),
        cutmix=Option(float, 1.0, "alpha of cutmix; 0: off", low=0),
        cutmix_minmax=Option(
            float, None, "smallest and largest side of the cutmix box; replaces its alpha", nargs=2, low=0, high=1
        ),
        mixup_prob=Option(float, 1.0, "probability of mixup or cutmix", **_SHARE),
        mixup_switch_prob=Option(float, 0.5, "probability of cutmix if both mixup and cutmix are on", **_SHARE),
        mixup_mode=Option(
            str, "batch", "apply mixup and cutmix per batch, pair or element", choices=("batch", "pair", "elem")
        ),
    ),
    **_in_group(
        "data",
        data_set=Option(
            str,
            "IMNET",
            "data set",
            choices=("IMNET", "image_folder", "CIFAR", "CIFAR10", "CIFAR100", "digits", "glyphs"),
            pattern=r"(wds|hfds|hfids|tfds|folder)/.*",
            hint="wds/NAME for WebDataset shards, or a timm reader string such as hfds/NAME",
        ),
        data_path=Option(
            str,
            "",
            "folder of the data; IMNET: with train/ and val/ inside; CIFAR: binary version; wds/: folder or URL of "
            "shards, or a pattern such as train-{0000..0012}.tar",
        ),
        eval_data_path=Option(str, None, "what to evaluate: a folder of image_folder, shards of wds/ as in data_path"),
        nb_classes=Option(int, 1000, "number of classes; if not given, that of the data", low=1),
        imagenet_default_mean_and_std=Option(
            bool, True, "normalise by ImageNet's mean and standard deviation; false: by 0.5 and 0.5"
        ),
        bad_images=Option(
            float,
            0.001,
            "share of the training images that may be unreadable; each is named, and another one stands for it",
            **_SHARE,
        ),
        num_workers=Option(int, 10, "data-loading processes per training process, at most one per core", low=0),
        pin_mem=Option(bool, True, "load images into page-locked memory if the device is a GPU"),
    ),
    **_in_group(
        "checkpoints",
        output_dir=Option(str, "", "folder for log.txt and the checkpoints; empty: nothing is written"),
        finetune=Option(str, "", "path or URL of weights to start from; a classifier of another size is left out"),
        init_static=Option(
            str,
            "",
            "path or URL of a static network's weights, or timm:NAME for timm's, that dynamic layers start from; a "
            "classifier of another size is left out",
        ),
        model_key=Option(
            str, "model|module", "names of the entry with the weights in the file of --finetune, tried in this order"
        ),
        model_prefix=Option(str, "", "prefix of the keys to load from the file of --finetune; it is removed"),
        resume=Option(str, "", "path or URL of the checkpoint to continue, or to evaluate"),
        auto_resume=Option(bool, True, "continue from the newest good checkpoint of output_dir"),
        save_ckpt=Option(bool, True, "write checkpoints"),
        save_ckpt_freq=Option(int, 1, "epochs between checkpoints", low=1),
        save_interval=Option(
            str,
            "10m",
            "save within epochs, too: after so many updates (500) or minutes (10m); 0: never",
            pattern=r"\d{1,9}m?",
            hint="a number of updates such as 500, or of minutes such as 10m",
        ),
        save_ckpt_num=Option(int, 3, "number of checkpoints of whole epochs to keep; one means two", low=1),
        start_epoch=Option(int, 0, "first epoch", low=0),
    ),
    **_in_group(
        "run",
        print_config=Option(bool, False, "print every option with its value and where that is from, and stop"),
        dry_run=Option(
            bool,
            False,
            "print the data, the model, its costs, the updates, and an estimate of memory and time, and stop",
        ),
        kw_config=Option(str, None, "config file (JSON) or name of a config; the command line overrides it"),
        recipe=Option(
            str,
            None,
            "settings of configs/recipes/NAME.json, which the config overrides",
            pattern=r"[A-Za-z0-9][A-Za-z0-9_.\-]*",
            hint="the name of a recipe",
        ),
        eval=Option(bool, False, "evaluate only"),
        dist_eval=Option(bool, True, "divide the evaluation among the processes"),
        disable_eval=Option(bool, False, "do not evaluate during training"),
        log_dir=Option(str, None, "folder for TensorBoard logs (needs tensorboardX)"),
        log_interval=Option(int, 10, "updates between two log lines", low=1),
        report=Option(
            bool,
            True,
            "write report.html at the end; for its results of single images, the first process passes at most 2,000 "
            "images through the model, for at most a minute",
        ),
        enable_wandb=Option(bool, False, "log to Weights & Biases (needs wandb)"),
        project=Option(str, "convnext", "project name for Weights & Biases"),
        wandb_ckpt=Option(bool, False, "upload the checkpoints to Weights & Biases"),
    ),
    **_in_group(
        "processes",
        world_size=Option(int, 1, "number of processes; the launcher sets it", low=1),
        local_rank=Option(int, -1, "index of the process on its machine; the launcher sets it", low=-1),
        dist_on_itp=Option(bool, False, "read the rank and the world size from Open MPI's environment"),
        dist_url=Option(str, "env://", "URL at which the processes find each other"),
        timeout=Option(
            float,
            600.0,
            "seconds to wait for another process of the run, or for one that loads images, before the run ends",
            above=0,
            high=10**6,
        ),
    ),
}


@functools.cache
def all_options() -> dict[str, Option]:
    """Every option by name, including the settings of the methods, whose modules load torch at the first call."""
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
