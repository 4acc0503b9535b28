"""Every config reads, builds, and says the truth about itself; the released ones keep the released settings."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from command_line import parse_command_line
from models import build_model
from models.config import read_config
from models.options import MODEL_KEYS, OPTIONS

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in ROOT.glob("configs/recipes/*.json"))
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.json") if path.parent.name != "recipes"
)
RELEASED = json.loads((ROOT / "tests/data/released_configs.json").read_text())
with open(ROOT / "configs/tables.csv", newline="") as file:
    TABLES = list(csv.DictReader(file))
# config -> the rows of the papers' tables that it is for
PAPER = {
    path: [row for row in TABLES if row["config"] == path]
    for path in dict.fromkeys(row["config"] for row in TABLES if row["config"])
}
PAPERS = {"KW": "KernelWarehouse", "OD": "ODConv", "KR": "Kernel Representation"}

CLASSES = {"digits": 10, "CIFAR10": 10, "CIFAR100": 100, "glyphs": 500}
# What the papers say of a recipe: epochs, optimizer, images an update, learning rate, weight decay.
STATED = {
    "traditional": (100, "momentum", 256, 0.1, 1e-4),
    "mobilenetv2": (150, "sgd", 256, 0.05, 4e-5),
    "mobilenetv2_odconv": (150, "momentum", 256, 0.05, 4e-5),
    "mobilenetv2_300": (300, "momentum", 256, 0.05, 4e-5),
    "advanced": (300, "adamw", 4096, 4e-3, 0.05),
    "deit": (300, "adamw", 1024, 5e-4 * 1024 / 512, 0.05),
    "cifar": (200, "adam", 256, 1e-3, 5e-5),
    "digits": (10, "adamw", 32, 3e-3, 0.05),
    "glyphs": (12, "momentum", 64, 0.025, 1e-4),
}
# What the released code does by itself, and its files do not say.
BY_ITSELF = {"initialisation": "released"}
DECAYS_LAYER_SCALE = ["convnext/kw1x_convnext_tiny"]


def raw(path):
    return json.loads((ROOT / path).read_text())


@pytest.mark.parametrize("path", CONFIGS)
def test_about(path):
    config = raw(path)
    assert next(iter(config)) == "_about", "a config begins with what it is"
    about = config["_about"]
    assert about["what"] and about["accuracy"]
    command = about["command"]
    named = re.search(r"--kw_config (\S+)", command).group(1)
    assert named == path and (ROOT / named).is_file()

    # "8 GPUs x 128 x 4 = 4096" is the command's own arithmetic
    factors = [int(n) for n in re.findall(r"\d+", about["batch"])]
    options = dict(re.findall(r"--(nproc_per_node|batch_size|update_freq)[= ](\d+)", command))
    settings = {"nproc_per_node": 1, "batch_size": 64, "update_freq": 1, **read_config(ROOT / path), **options}
    batch = [int(settings[key]) for key in ("nproc_per_node", "batch_size", "update_freq")]
    assert factors == [*batch, batch[0] * batch[1] * batch[2]]
    # of which --scale_lr makes the learning rate of another one
    assert settings["lr_batch"] == factors[-1]


@pytest.mark.parametrize("path", CONFIGS)
def test_builds_with_the_parameters_it_says(path):
    with torch.device("meta"):
        model = build_model(str(ROOT / path), num_classes=CLASSES.get(read_config(ROOT / path).get("data_set"), 1000))
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == raw(path)["_about"]["parameters"]


def source_of(row):
    """ "OD T5" -> "ODConv, Table 5"."""
    paper, table = row["source"].split()
    return "the released repository's README" if table == "README" else f"{PAPERS[paper]}, Table {table[1:]}"


@pytest.mark.parametrize("path", PAPER)
def test_accuracy_is_the_papers(path):
    expected = {}
    for row in PAPER[path]:
        numbers = f"top-1 {row['top1']}" + (f", top-5 {row['top5']}" if row["top5"] else "")
        expected.setdefault(numbers, []).append(source_of(row))
    assert raw(path)["_about"]["accuracy"] == "; ".join(f"{n} ({'; '.join(s)})" for n, s in expected.items())


@pytest.mark.parametrize("name", RELEASED)
def test_released_settings_are_kept(name, tmp_path):
    """The released file, brought by a user, and ours mean the same run."""
    file = tmp_path / "released.json"
    decay = {"decay_layer_scale": True} if name in DECAYS_LAYER_SCALE else {}
    file.write_text(json.dumps({**RELEASED[name], **BY_ITSELF, **decay}))
    released, ours = read_config(file), read_config(ROOT / f"configs/{name}.json")
    # held by test_about; without --scale_lr it changes no run
    assert ours.pop("lr_batch") and not ours.get("scale_lr")
    defaults = {key: option.default for key, option in OPTIONS.items()}
    assert {**defaults, **ours} == {**defaults, **released}
    # a model may have defaults of its own
    own = [{key: value for key, value in settings.items() if key in MODEL_KEYS} for settings in (ours, released)]
    assert own[0] == own[1]


@pytest.mark.parametrize("path", [path for path in CONFIGS if "recipe" in raw(path)])
def test_config_repeats_nothing_of_its_recipe(path):
    config = raw(path)
    recipe = read_config({"recipe": config["recipe"]})
    repeated = [key for key in config if key in recipe and config[key] == recipe[key]]
    assert not repeated


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    recipe = raw(f"configs/recipes/{name}.json")
    assert next(iter(recipe)) == "_about", "a recipe begins with what it is"
    about = recipe["_about"]
    assert about["what"] and about["source"]
    command = shlex.split(about["command"])
    start = command.index("main.py")
    args, given = parse_command_line(command[start + 1 :])
    assert args.recipe == name and {**given, **read_config({"recipe": name})} == given

    processes = int(dict(word.split("=") for word in command[:start] if "=" in word).get("--nproc_per_node", 1))
    batch = processes * args.batch_size * args.update_freq
    factors = [int(n) for n in re.findall(r"\d+", about["batch"])]
    assert factors == [processes, args.batch_size, args.update_freq, batch]
    assert (args.epochs, args.opt, batch, args.lr, args.weight_decay) == STATED[name]
    assert args.lr_batch == batch


def test_every_config_states_its_source():
    unsourced = [
        path for path in CONFIGS if path not in PAPER and not path.startswith(("configs/digits/", "configs/glyphs/"))
    ]
    assert not unsourced, "add the row of the paper's table to configs/tables.csv"


def test_rows_name_configs_that_exist_or_say_why_not():
    assert set(PAPER) <= set(CONFIGS)
    unexplained = [row for row in TABLES if not row["config"] and not row["note"].startswith("open: ")]
    assert not unexplained
