"""The option table, config files and the command line: precedence, types, and every refusal names its culprit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import parse_command_line
from models.config import ConfigError, read_config
from models.options import MODEL_KEYS, OPTIONS

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
RELEASED = json.loads((DATA / "released_options.json").read_text())


def write(folder, text):
    path = folder / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", RELEASED)
def test_released_option_keeps_its_type_and_default(name):
    kind, default = RELEASED[name]
    assert OPTIONS[name].type.__name__ == kind
    assert OPTIONS[name].default == default


def test_command_line_beats_file_beats_defaults(tmp_path):
    path = write(tmp_path, '{"lr": 0.5, "epochs": 7, "_about": {"anything": [1, null]}}')
    args, given = parse_command_line(["--kw_config", str(path), "--lr", "0.25"])
    assert (args.lr, args.epochs, args.momentum) == (0.25, 7, 0.9)
    assert given == {"kw_config": str(path), "lr": 0.25, "epochs": 7}


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--use_amp", "true"], "use_amp", True),
        (["--use-amp"], "use_amp", True),
        (["--use_amp", "false"], "use_amp", False),
        (["--use-amp=no"], "use_amp", False),
        (["--local-rank=3"], "local_rank", 3),
        (["--local_rank", "3"], "local_rank", 3),
        (["--aa", "none"], "aa", None),
        (["--clip_grad", "none"], "clip_grad", None),
        (["--clip-grad", "5"], "clip_grad", 5.0),
        (["--opt_betas", "0.9", "0.95"], "opt_betas", [0.9, 0.95]),
        (["--cell_num_ratio", "4"], "cell_num_ratio", 4.0),
        (["--cell_num_ratio", "1", "0.5"], "cell_num_ratio", [1.0, 0.5]),
        (["--nonlocal_basis_ratio", "0.0625"], "nonlocal_basis_ratio", 0.0625),
        (["--sharing_range", "layer", "conv"], "sharing_range", ["layer", "conv"]),
        (["--sharing_range"], "sharing_range", []),
        (["--spatial_partition"], "spatial_partition", True),
        (["--warmup_steps", "-1"], "warmup_steps", -1),
        (["--data_set", "wds/shards"], "data_set", "wds/shards"),
        (["--attention_init", "none"], "attention_init", "none"),
    ],
)
def test_command_line_values(words, name, value):
    args, given = parse_command_line(words)
    assert getattr(args, name) == value and given == {name: value}


def test_file_values(tmp_path):
    content = {"sharing_range": "layer_conv", "aa": None, "reduction": 1, "batch-size": 3, "cell_num_ratio": [1, 0.5]}
    expected = {
        "sharing_range": "layer_conv",
        "aa": None,
        "reduction": 1.0,
        "batch_size": 3,
        "cell_num_ratio": [1.0, 0.5],
    }
    assert read_config(write(tmp_path, json.dumps(content))) == expected == read_config(content)
    warehouses = {"a": {"layers": ["layer1.*"], "cell_num_ratio": 1, "spatial_partition": False}}
    assert read_config({"warehouses": warehouses}) == {"warehouses": warehouses}


def write_recipe(folder, name, text):
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / "recipes" / f"{name}.json").write_text(text)
    return str(folder / "recipes" / f"{name}.json")


def test_command_line_beats_file_beats_recipe_beats_defaults(tmp_path):
    write_recipe(tmp_path, "short", '{"_about": {}, "lr": 0.5, "epochs": 7, "weight-decay": 0.1, "aa": null}')
    path = write(tmp_path, '{"recipe": "short", "epochs": 8, "weight_decay": 0.2}')
    args, given = parse_command_line(["--kw_config", str(path), "--weight_decay", "0.3"])
    assert (args.lr, args.epochs, args.weight_decay, args.aa) == (0.5, 8, 0.3, None)
    assert (args.momentum, args.recipe) == (0.9, "short")
    settings = {"lr": 0.5, "epochs": 8, "aa": None}
    assert given == {**settings, "weight_decay": 0.3, "kw_config": str(path), "recipe": "short"}
    # what is read has the recipe's settings in place of its name, and can be read again anywhere
    assert read_config(path) == {**settings, "weight_decay": 0.2} == read_config(read_config(path))


def test_recipe_of_the_command_line_replaces_that_of_the_file(tmp_path):
    write_recipe(tmp_path, "one", '{"lr": 0.5, "epochs": 7, "momentum": 0.8}')
    write_recipe(tmp_path, "two", '{"lr": 0.6, "warmup_epochs": 3}')
    path = write(tmp_path, '{"recipe": "one", "epochs": 8}')
    args, _ = parse_command_line(["--kw_config", str(path), "--recipe", "two"])
    assert (args.lr, args.epochs, args.warmup_epochs, args.momentum) == (0.6, 8, 3, 0.9)
    assert read_config(path, {"recipe": "two"}) == {"lr": 0.6, "epochs": 8, "warmup_epochs": 3}
    assert read_config(path, {"recipe": None}) == {"epochs": 8}
    args, given = parse_command_line(["--kw_config", str(path), "--recipe", "none"])
    assert given == {"kw_config": str(path), "epochs": 8, "recipe": None}
    # without a config it is one of the project's
    args, _ = parse_command_line(["--recipe", "traditional", "--epochs", "3"])
    assert (args.opt, args.lr_schedule, args.epochs, args.model) == ("momentum", "step", 3, "convnext_tiny")


def test_recipe_is_looked_up_beside_the_config_and_then_in_the_project(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "mine" / "resnet18"
    folder.mkdir(parents=True)
    path = write(folder, '{"recipe": "deit"}')
    assert read_config(path)["warmup_epochs"] == 5 == read_config({"recipe": "deit"})["warmup_epochs"]
    # whoever may write to a folder above does not decide
    write_recipe(tmp_path, "deit", '{"lr": 0.5}')
    write_recipe(tmp_path / "mine", "deit", '{"lr": 0.6}')
    write_recipe(tmp_path, "above", "{}")
    assert read_config(path)["warmup_epochs"] == 5
    with pytest.raises(ConfigError, match='unknown recipe "above"'):
        read_config(path, {"recipe": "above"})
    assert not caplog.messages
    recipe = write_recipe(folder, "deit", '{"lr": 0.7}')
    assert read_config(path) == {"lr": 0.7}
    assert caplog.messages == [f"note: recipe deit is {recipe}, not the project's own"]
    monkeypatch.chdir(folder)
    assert read_config("config.json") == {"lr": 0.7}
    assert read_config({"recipe": "deit"})["warmup_epochs"] == 5
    monkeypatch.setenv("RANK", "1")
    assert read_config(path) == {"lr": 0.7} and len(caplog.messages) == 2


@pytest.mark.parametrize("where", ["config", "recipe"])
@pytest.mark.parametrize(
    "option, value, part",
    [
        ("finetune", "https://example.org/model-0123abcd.pth", "is a URL"),
        ("resume", "http://127.0.0.1/model-0123abcd.pth", "is a URL"),
        ("output_dir", "s3://bucket/out", "is a URL"),
        ("data_path", "https://example.org", "is a URL"),
        ("finetune", "../weights.pth", 'climbs up by ".."'),
        ("init_static", "a/../../weights.pth", 'climbs up by ".."'),
        ("resume", "FOLDER/../weights.pth", 'climbs up by ".."'),
        ("output_dir", "../../home", 'climbs up by ".."'),
        ("log_dir", "..", 'climbs up by ".."'),
        ("data_path", "/data/../etc", 'climbs up by ".."'),
        ("eval_data_path", "../data", 'climbs up by ".."'),
        ("resume", "/etc/weights.pth", "outside of the config's folder"),
        ("finetune", "FOLDER-2/weights.pth", "outside of the config's folder"),
        ("finetune", "FOLDER/link/weights.pth", "outside of the config's folder"),
        ("dist_url", "tcp://example.org:1234", "on the command line only"),
    ],
)
def test_a_config_reaches_nothing_elsewhere(where, option, value, part, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    text = json.dumps({option: value.replace("FOLDER", str(folder))})
    if where == "recipe":
        write_recipe(folder, "mine", text)
    path = write(folder, text if where == "config" else '{"recipe": "mine"}')
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert f'"{option}" ' in str(caught.value) and part in str(caught.value) and str(folder) in str(caught.value)
    # the command line is the user's own word
    assert parse_command_line([f"--{option}", value])[1][option] == value


def test_paths_that_a_config_may_name(tmp_path):
    content = {
        "finetune": "weights/a..b.pth", "init_static": "timm:resnet18", "resume": str(tmp_path / "a" / "b.pth"),
        "data_path": "/data/imagenet", "output_dir": "/scratch/out", "log_dir": "tb", "eval_data_path": None,
    }  # fmt: skip
    assert read_config(write(tmp_path, json.dumps(content))) == content


# content of the recipe -> what the message must hold
BAD_RECIPES = {
    "another recipe": ('{"recipe": "deit"}', 'a recipe cannot set "recipe"'),
    "a model": ('{"model": "resnet18"}', 'a recipe cannot set "model"'),
    "a config": ('{"kw_config": "x.json"}', 'a recipe cannot set "kw_config"'),
    "unknown key": ('{"epoch": 3}', 'unknown key "epoch"; did you mean "epochs"'),
    "wrong type": ('{"lr": "fast"}', "lr"),
    "not JSON": ("{", "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipe_is_refused_by_its_own_name(case, tmp_path):
    text, part = BAD_RECIPES[case]
    recipe = write_recipe(tmp_path, "bad", text)
    path = write(tmp_path, '{"recipe": "bad", "epochs": 3, "lr": 0.1}')
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    message = str(caught.value)
    assert part in message and message.startswith(recipe) and "\n" not in message


def test_package_alone_has_no_recipes(tmp_path):
    """Installed without configs/, only recipes beside the user's config are found."""
    shutil.copytree(ROOT / "models", tmp_path / "kernelwarehouse", ignore=shutil.ignore_patterns("__pycache__"))
    write_recipe(tmp_path / "mine", "short", '{"epochs": 7}')
    (tmp_path / "mine" / "good.json").write_text('{"recipe": "short"}')
    (tmp_path / "bad.json").write_text('{"recipe": "deit"}')
    code = "import sys; from kernelwarehouse import read_config; print(read_config(sys.argv[1]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run([*command, "mine/good.json"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "{'epochs': 7}\n", done.stderr
    done = subprocess.run([*command, "bad.json"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    message = done.stderr.strip().splitlines()[-1]
    assert 'ConfigError: bad.json: unknown recipe "deit"; no recipes are installed' in message


def test_model_keys():
    assert {"model", "cell_num_ratio", "warehouses", "attention_init", "drop_path"} <= MODEL_KEYS
    assert not MODEL_KEYS & {"lr", "temp_epoch", "data_path", "nb_classes"}


# content of the file -> what the message must hold
BAD_FILES = {
    "empty": ("", "line 1"),
    "not JSON": ('{"lr": 0.1,}', "line 1, column"),
    "not JSON, line 3": ('{\n"lr": 0.1,\n"opt" "sgd"}', "line 3"),
    "a list": ("[1]", "object"),
    "a string": ('"lr"', "object"),
    "unknown key": ('{"cell_nun_ratio": 1}', 'did you mean "cell_num_ratio"'),
    "unknown key, nothing near": ('{"qqqqqq": 1}', "qqqqqq"),
    "twice": ('{"lr": 0.1, "lr": 0.2}', '"lr" is given twice'),
    "twice, with dashes": ('{"batch-size": 1, "batch_size": 2}', "batch_size"),
    "twice, nested": ('{"warehouses": {"a": {"layers": ["x"], "layers": ["y"]}}}', "layers"),
    "NaN": ('{"lr": NaN}', "NaN"),
    "Infinity": ('{"lr": -Infinity}', "Infinity"),
    "overflow": ('{"lr": 1e999}', "lr"),
    "huge integer": ('{"epochs": 1' + "0" * 400 + "}", "epochs"),
    "enormous integer": ('{"epochs": 1' + "0" * 5000 + "}", "not valid JSON"),
    "string for number": ('{"lr": "0.1"}', "lr"),
    "number for string": ('{"opt": 3}', "opt"),
    "bool for number": ('{"epochs": true}', "epochs"),
    "number for bool": ('{"use_amp": 1}', "use_amp"),
    "string for bool": ('{"use_amp": "true"}', "use_amp"),
    "fraction for integer": ('{"batch_size": 1.5}', "batch_size"),
    "list for one value": ('{"lr": [0.1, 0.2]}', "lr"),
    "object for a list": ('{"cell_num_ratio": {"a": 1}}', "cell_num_ratio"),
    "string in a list": ('{"cell_num_ratio": [1, "1"]}', "cell_num_ratio"),
    "nested list": ('{"cell_num_ratio": [[1]]}', "cell_num_ratio"),
    "empty list": ('{"cell_num_ratio": []}', "cell_num_ratio"),
    "number among the shared": ('{"sharing_range": ["layer", 1]}', "sharing_range"),
    "null": ('{"lr": null}', "lr"),
    "zero epochs": ('{"epochs": 0}', "epochs"),
    "negative batch": ('{"batch_size": -8}', "batch_size"),
    "negative rate": ('{"lr": -0.1}', "lr"),
    "probability above 1": ('{"reprob": 1.5}', "reprob"),
    "zero ratio": ('{"cell_num_ratio": 0}', "cell_num_ratio"),
    "clip at 0": ('{"clip_grad": 0}', "clip_grad"),
    "choice": ('{"opt": "adamww"}', 'did you mean "adamw"'),
    "model with a path": ('{"model": "../../etc/passwd"}', "model"),
    "line break in a value": ('{"opt": "sgd\\nrm"}', "opt"),
    "zero byte": ('{"output_dir": "a\\u0000b"}', "output_dir"),
    "lone surrogate": ('{"output_dir": "\\ud800"}', '"output_dir" holds a text that UTF-8 cannot'),
    "lone surrogate in a list": ('{"layers": ["a", "\\udc80"]}', '"layers" holds a text that UTF-8 cannot'),
    "lone surrogate in a name": (
        '{"warehouses": {"\\udfff": {"layers": ["x"]}}}',
        '"warehouses" holds a text that UTF-8 cannot',
    ),
    "lone surrogate in a key": ('{"\\ud800": 1}', r'unknown key "\ud800"'),
    "escape sequence in a key": ('{"\\u001b[31mlr": 1}', r'unknown key "\x1b[31mlr"'),
    "long key": (json.dumps({"a" * 900_000: 1}), 'unknown key "aaaaaa'),
    "many keys": (json.dumps({str(number): 1 for number in range(60_000)}), 'unknown key "0"'),
    "config in a config": ('{"kw_config": "x.json"}', "kw_config"),
    "betas": ('{"opt_betas": [0.9]}', "opt_betas"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "UTF-16": ("{}".encode("utf-16"), "UTF-8"),
    "binary": (b"\x80\x81\x00", "UTF-8"),
    "10 MB": (b" " * 10_000_000 + b"{}", "larger"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "warehouse without layers": ('{"warehouses": {"a": {"reduction": 0.1}}}', "layers"),
    "warehouse with an unknown key": ('{"warehouses": {"a": {"layer": ["x"]}}}', 'did you mean "layers"'),
    "warehouses as a list": ('{"warehouses": []}', "warehouses"),
    "unknown recipe": ('{"recipe": "traditonal"}', '"traditonal"; did you mean "traditional"?'),
    "unknown recipe, nothing near": ('{"recipe": "qqqqqq"}', '"qqqqqq"; the known ones are advanced, cifar, deit, '),
    "recipe as a path": ('{"recipe": "../recipes/deit"}', "recipe"),
    "recipe as an object": ('{"recipe": {"lr": 0.1}}', "recipe"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_in_one_line(case, tmp_path):
    text, part = BAD_FILES[case]
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    message = str(caught.value)
    assert part in message and str(path) in message and "\n" not in message and len(message) < 600


def test_bad_path_is_refused(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / ".." / "missing.json"):
        with pytest.raises(ConfigError, match=str(path)):
            read_config(path)


@pytest.mark.parametrize(
    "words, part",
    [
        (["--batch-sise", "3"], 'did you mean "--batch_size"'),
        (["--lr"], "--lr"),
        (["--lr", "fast"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "1e999"], "--lr"),
        (["--epochs", "-3"], "--epochs"),
        (["--epochs", "1.5"], "--epochs"),
        (["--use_amp", "maybe"], "--use_amp"),
        (["--data_set", "CIFR"], 'did you mean "CIFAR"'),
        (["--amp_dtype", "float8"], "--amp_dtype"),
        (["--device", "tpu"], "--device"),
        (["--opt_betas", "0.9"], "--opt_betas"),
        (["--warehouses", "x"], "config file only"),
        (["stray"], "stray"),
        (["--kw_config", "missing.json"], "missing.json"),
        (["--recipe", "diet"], 'unknown recipe "diet"; did you mean "deit"?'),
        (["--recipe", "/deit"], "--recipe"),
    ],
)
def test_bad_command_line_is_refused_in_one_line(words, part):
    with pytest.raises(ConfigError) as caught:
        parse_command_line(words)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_config_needs_no_torch():
    """Reading this module does not take the seconds that loading torch takes."""
    code = "import sys; from models.config import read_config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_options_need_no_timm():
    """A mistake is refused before timm and torchvision are loaded, which takes longer than torch."""
    code = "import sys, models.options as o; o.all_options(); print({'timm', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done
