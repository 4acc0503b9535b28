"""Every option of a run, in one table: the command line is generated from it and config files are checked against it.

Imports the standard library only, so that a mistake is refused before torch is loaded.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from typing import Any

MAX_CONFIG_BYTES = 1 << 20


class ConfigError(ValueError):
    """A mistake of the user. The message is one line that names the mistake and, where there is one, its remedy."""


_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "an object"}
_WORDS_OF_BOOL = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        type: bool, int, float, str, or dict (a JSON object, in config files only).
        default: value where neither the command line nor the config gives one. Where it is None, null is accepted.
        help: one line for `--help`.
        group: heading in `--help`; the options of group "model" are what `build_model` reads.
        nargs: None for one value, 2 for exactly two, "+" for one value or a list, "*" for a list that may be empty.
        choices: the accepted values.
        low, high: inclusive bounds.
        above: exclusive lower bound.
        nullable: accepts null (on the command line: none) although the default is not None.
        pattern: regular expression that a string must match in full; with `choices`, an alternative to them.
        hint: what `pattern` accepts, in words.
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
_RATIO: dict[str, Any] = {"nargs": "+", "above": 0}
_FRACTION: dict[str, Any] = {"nargs": "+", "above": 0, "high": 1}

OPTIONS: dict[str, Option] = {
    **_in_group(
        "model",
        model=Option(
            str,
            "convnext_tiny",
            "name of a timm model; kw_NAME makes it a KernelWarehouse model",
            pattern=r"[A-Za-z0-9][A-Za-z0-9_.\-]*",
            hint="a model name",
        ),
        reduction=Option(float, None, "hidden width of the attention over its input width", **_FRACTION),
        cell_num_ratio=Option(
            float, None, "budget b = n / m_t: cells of a warehouse over the mixtures of its layers", **_RATIO
        ),
        cell_inplane_ratio=Option(
            float, None, "input channels of a cell over the greatest common divisor", **_FRACTION
        ),
        cell_outplane_ratio=Option(
            float, None, "output channels of a cell over the greatest common divisor", **_FRACTION
        ),
        sharing_range=Option(
            str,
            [],
            "kinds of layers that share a warehouse within a stage: layer, conv, pwconv, ...",
            nargs="*",
            nullable=True,
        ),
        nonlocal_basis_ratio=Option(float, 1.0, "rank of the attention's shared basis over its full rank", **_FRACTION),
        spatial_partition=Option(bool, True, "divide kernels along space as well", nargs="+"),
        attention_function=Option(
            str, "caf", "attention function (Table 8)", choices=("caf", "softmax", "sigmoid", "relu")
        ),
        attention_init=Option(
            str,
            "one-to-one",
            "initial relation of cells and mixtures (Table 13)",
            choices=("one-to-one", "all-to-one", "none", "k-to-one", "one-to-k"),
        ),
        warehouses=Option(dict, None, "explicit warehouses: name -> layers and settings"),
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
        temp_epoch=Option(int, 20, "epochs in which the temperature falls linearly to 0", low=0),
        temp_init_value=Option(float, 1.0, "temperature at the start", **_SHARE),
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
        opt=Option(str, "adamw", "optimizer", choices=("adamw", "sgd")),
        opt_eps=Option(float, 1e-8, "epsilon of AdamW", low=0),
        opt_betas=Option(float, None, "betas of AdamW; null: 0.9 0.999", nargs=2, low=0, high=1),
        clip_grad=Option(float, None, "greatest norm of the gradient; null: no clipping", above=0),
        momentum=Option(float, 0.9, "momentum of SGD", **_SHARE),
        weight_decay=Option(float, 0.05, "weight decay; none for biases, norms and other 1-d parameters", low=0),
        weight_decay_end=Option(float, None, "weight decay at the end, reached by a cosine; null: constant", low=0),
        lr=Option(float, 4e-3, "learning rate for the whole batch, used as given", low=0),
        min_lr=Option(float, 1e-6, "learning rate at the end of the cosine", low=0),
        lr_schedule=Option(str, "cosine", "cosine (per update) or step (per epoch)", choices=("cosine", "step")),
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
            choices=("IMNET", "image_folder", "CIFAR", "CIFAR10", "CIFAR100", "digits"),
            pattern=r"(wds|hfds|hfids|tfds|folder)/.*",
            hint="a timm reader string such as wds/NAME or hfds/NAME",
        ),
        data_path=Option(str, "", "folder of the data; IMNET: with train/ and val/ inside"),
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
        world_size=Option(int, 1, "number of processes, where dist_url is not env://", low=1),
        local_rank=Option(int, -1, "index on this machine, as the launcher passes it", low=-1),
        dist_on_itp=Option(bool, False, "read rank and size from Open MPI's environment"),
        dist_url=Option(str, "env://", "address at which the processes meet"),
    ),
}

MODEL_KEYS = frozenset(name for name, option in OPTIONS.items() if option.group == "model")

# What an entry of `warehouses` may hold. Its ratios are single values: the entry is one warehouse.
WAREHOUSE_OPTIONS = {
    "layers": Option(str, [], "glob patterns of module names", nargs="*"),
    "spatial_partition": Option(bool, True, "divide kernels along space as well"),
    **{
        name: Option(float, 1.0, OPTIONS[name].help, above=0, high=OPTIONS[name].high)
        for name in ("cell_num_ratio", "cell_inplane_ratio", "cell_outplane_ratio", "reduction", "nonlocal_basis_ratio")
    },
}


def read_config(config: str | os.PathLike | dict) -> dict[str, Any]:
    """Read and check a config.

    Args:
        config: path of a JSON file, or a dict of its contents.

    Returns:
        The given keys only, with underscores, each value of its option's type; `_about` (documentation) is left out.

    Raises:
        ConfigError: names the file, the key and the nearest known key.
    """
    if isinstance(config, dict):
        return _check_keys(config, OPTIONS, "config")
    settings = _check_keys(_load_json(config), OPTIONS, str(config))
    if "kw_config" in settings:
        raise ConfigError(f'{config}: "kw_config" cannot be set inside a config; put its settings here instead')
    return settings


def parse_command_line(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Merge the command line, the config that it names, and the defaults, in this order of precedence.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        All options as a namespace, and a dict of those that the command line or the config gave.

    Raises:
        ConfigError: for any mistake in either.
    """
    argv = sys.argv[1:] if argv is None else argv
    given_text, unknown = _make_parser().parse_known_args([_underscored(word) for word in argv])
    if unknown:
        raise ConfigError(_unknown_argument(unknown[0]))
    command_line = {name: _from_text(name, text) for name, text in vars(given_text).items()}
    given = command_line
    if command_line.get("kw_config") is not None:
        given = {**read_config(command_line["kw_config"]), **command_line}
    defaults = {name: option.default for name, option in OPTIONS.items()}
    return argparse.Namespace(**{**defaults, **given}), given


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(message)


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description="Train or evaluate a model.", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        epilog="Dashes may stand for underscores, and a bare flag for true.",
    )  # fmt: skip
    groups: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        if option.type is dict:
            continue
        group = groups.setdefault(option.group, parser.add_argument_group(option.group))
        nargs = "?" if option.type is bool and option.nargs is None else "*" if option.type is bool else option.nargs
        const = {"const": "true"} if nargs == "?" else {}
        default = "" if option.default in (None, "") else f" (default: {option.default})"
        metavar = option.type.__name__.upper()
        group.add_argument(f"--{name}", nargs=nargs, metavar=metavar, help=option.help + default, **const)
    return parser


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _unknown_argument(argument: str) -> str:
    if not argument.startswith("-"):
        return f'unexpected argument "{argument}"; options begin with --'
    name = argument.lstrip("-").split("=")[0].replace("-", "_")
    if name in OPTIONS:
        return f"--{name} can be set in a config file only"
    return f'unknown option "{argument.split("=")[0]}"{_nearest(name, OPTIONS, "--")}'


def _nearest(name: str, known, prefix: str = "") -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{prefix}{match[0]}"?' if match else "; see main.py --help for the known ones"


def _from_text(name: str, text: str | list[str]) -> Any:
    """Turn the words of the command line into a value, and check it."""
    option = OPTIONS[name]
    words = text if isinstance(text, list) else [text]
    if option.type is bool and not words:
        words = ["true"]
    values = [_parse_word(word, option) for word in words]
    one = option.nargs is None or (option.nargs == "+" and len(values) == 1) or values == [None]
    return _check_value(option, values[0] if one else values, f"--{name}")


def _parse_word(word: str, option: Option) -> Any:
    if option.accepts_null() and word.lower() in ("none", "null"):
        return None
    if option.type is bool:
        return _WORDS_OF_BOOL.get(word.lower(), word)
    try:
        return option.type(word)
    except ValueError:
        return word


def _load_json(path: str | os.PathLike) -> dict:
    if not os.path.exists(path):
        raise ConfigError(f"{path}: no such config file")
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: not a file; give the path of a JSON file")
    if os.path.getsize(path) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; this is no config file")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; this is no config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if text.startswith("\ufeff"):
        raise ConfigError(f"{path}: begins with a byte order mark; save it as UTF-8 without one")

    def unique(pairs):
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f'{path}: key "{key}" is given twice')
        return dict(pairs)

    def refuse_constant(word):
        raise ConfigError(f"{path}: {word} is not a number that can be used")

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except ConfigError:
        raise
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the top level must be an object {{...}} of options, not a {type(content).__name__}")
    return content


def _check_keys(content: dict, known: dict[str, Option], where: str) -> dict[str, Any]:
    settings = {}
    for key, value in content.items():
        if key == "_about":
            continue
        name = key.replace("-", "_") if isinstance(key, str) else key
        if name not in known:
            raise ConfigError(f'{where}: unknown key "{key}"{_nearest(str(name), known)}')
        if name in settings:
            raise ConfigError(f'{where}: key "{name}" is given twice, once with dashes')
        settings[name] = _check_value(known[name], value, f'{where}: "{key}"')
    return settings


def _check_value(option: Option, value: Any, where: str) -> Any:
    """Return `value` as its option's type, or raise ConfigError."""
    if value is None and option.accepts_null():
        return None
    if option.type is dict:
        return _check_warehouses(value, where)
    if option.nargs is not None and isinstance(value, (list, tuple)):
        if (option.nargs == 2 and len(value) != 2) or (option.nargs == "+" and not value):
            raise ConfigError(f"{where} must be {option.expected()}, got {_shown(value)}")
        return [_check_scalar(option, item, where) for item in value]
    if option.nargs == 2:
        raise ConfigError(f"{where} must be {option.expected()}, got {_shown(value)}")
    return _check_scalar(option, value, where)


def _check_scalar(option: Option, value: Any, where: str) -> Any:
    # bool is a subclass of int, and must not pass for a number
    if option.type is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = type(value) is option.type
    if fits and option.type in (int, float):
        # a huge integer has no float value; isfinite() would raise
        fits = abs(value) < (2**63 if option.type is int else 1e300) and math.isfinite(value)
        fits = fits and (option.low is None or value >= option.low) and (option.high is None or value <= option.high)
        fits = fits and (option.above is None or value > option.above)
    if fits and option.type is str:
        chosen = value in option.choices
        matched = bool(option.pattern) and re.fullmatch(option.pattern, value) is not None
        fits = "\0" not in value and (chosen or matched or not (option.choices or option.pattern))
    if not fits:
        nearest = _nearest(value, option.choices) if isinstance(value, str) and option.choices else ""
        nearest = nearest if "did you mean" in nearest else ""
        raise ConfigError(f"{where} must be {option.expected()}; got {_shown(value)}{nearest}")
    return float(value) if option.type is float else value


def _check_warehouses(value: Any, where: str) -> dict[str, dict]:
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{where} must be an object of warehouses, name to settings; got {_shown(value)}")
    checked = {}
    for name, settings in value.items():
        inside = f'{where}, warehouse "{name}"'
        if not isinstance(settings, dict):
            raise ConfigError(f"{inside} must be an object; got {_shown(settings)}")
        checked[name] = _check_keys(settings, WAREHOUSE_OPTIONS, inside)
        if not isinstance(checked[name].get("layers"), list) or not checked[name]["layers"]:
            raise ConfigError(f'{inside} needs "layers", a list of patterns of module names')
    return checked


def _shown(value: Any) -> str:
    # ascii() keeps line breaks and control characters out of the one-line message
    text = ascii(value) if not isinstance(value, (bool, type(None))) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def exit_with(error: Exception) -> None:
    """End the process as for any mistake of the user: one line on stderr, exit code 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
