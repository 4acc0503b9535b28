"""The option table, config files and the command line: precedence, types, and every refusal names its culprit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.config import ConfigError, parse_command_line, read_config
from models.options import MODEL_KEYS, OPTIONS

DATA = Path(__file__).parent / "data"
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
    "choice": ('{"opt": "adam"}', 'did you mean "adamw"'),
    "model with a path": ('{"model": "../../etc/passwd"}', "model"),
    "line break in a value": ('{"opt": "sgd\\nrm"}', "opt"),
    "zero byte": ('{"output_dir": "a\\u0000b"}', "output_dir"),
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
    ],
)
def test_bad_command_line_is_refused_in_one_line(words, part):
    with pytest.raises(ConfigError) as caught:
        parse_command_line(words)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_config_needs_no_torch():
    """A mistake is refused before the seconds that loading torch takes."""
    code = "import sys; from models.config import read_config; assert 'torch' not in sys.modules"
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
