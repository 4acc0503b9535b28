"""The package that pip makes of the project: its files, its command and its two names; and torch.hub."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT, quick

import hubconf
import main as training
import models
from models.__main__ import _ALL, COMMANDS, main
from models.config import ConfigError, find_config, read_config

# what a build does not read, and the folders that it makes
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "dist", "tests", "results", "mini_coco", "output")


def run(*command, cwd, **env):
    # without PYTHONPATH, which would let the checkout be found
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(word) for word in command]
    result = subprocess.run(
        command, cwd=cwd, env={**kept, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True, timeout=300
    )
    return result.returncode, result.stdout + result.stderr


def build_wheel(source, folder):
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    code, output = run(*pip, "--wheel-dir", folder, source, cwd=folder.parent)
    assert code == 0, output
    return next(folder.glob("*.whl"))


def content_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the project, as a build leaves its folders beside the sources."""
    folder = tmp_path_factory.mktemp("project") / "source"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return folder


@pytest.fixture(scope="module")
def wheel(source):
    return build_wheel(source, source.parent / "wheel")


@pytest.fixture(scope="module")
def environment(wheel):
    """The interpreter of an environment that holds the wheel, beside the running one's packages."""
    folder = wheel.parent.parent / "environment"
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    code, site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    assert code == 0, site
    Path(site.strip(), "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    code, output = run(*pip, wheel, cwd=folder)
    assert code == 0, output
    return python


def files_of(folder, pattern):
    return [path for path in sorted(ROOT.glob(f"{folder}/{pattern}")) if "__pycache__" not in path.parts]


def test_wheel_holds_the_files_of_the_project(wheel):
    expected = {}
    for folder, place in (("models", "kernelwarehouse"), ("installed/models", "kernelwarehouse/app/models")):
        for pattern in ("**/*.py", "**/*.cpp", "**/*.h", "**/*.typed"):
            for path in files_of(folder, pattern):
                expected[f"{place}/{path.relative_to(ROOT / folder).as_posix()}"] = path.read_bytes()
    scripts = [ROOT / command.script for command in COMMANDS.values()]
    for path in [*files_of(".", "*.py"), *files_of("configs", "**/*.json"), *scripts]:
        expected[f"kernelwarehouse/app/{path.relative_to(ROOT).as_posix()}"] = path.read_bytes()
    for folder in ("checkpoints", "loading", "detection", "inspection"):
        for path in [file for kind in ("py", "css", "js") for file in files_of(folder, f"**/*.{kind}")]:
            expected[f"kernelwarehouse/app/{path.relative_to(ROOT).as_posix()}"] = path.read_bytes()
    found = {name: data for name, data in content_of(wheel).items() if ".dist-info/" not in name}
    assert sorted(found) == sorted(expected)
    assert found == expected


def test_metadata(wheel):
    content = content_of(wheel)
    folder = f"kernelwarehouse-{models.__version__}.dist-info"
    metadata = email.message_from_bytes(content[f"{folder}/METADATA"])
    assert metadata["Version"] == models.__version__ and wheel.name.startswith(f"kernelwarehouse-{models.__version__}-")
    assert metadata["License-Expression"] == "Apache-2.0" and f"{folder}/licenses/LICENSE" in content
    assert {"train", "look", "export", "detection"} == set(metadata.get_all("Provides-Extra"))
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {line.split(">")[0] for line in needed}
    assert names == {"torch", "torchvision", "timm", "safetensors", "numpy", "pillow"}


def test_source_distribution_builds_the_same_wheel(source, wheel, tmp_path):
    program = "import setuptools.build_meta as build; build.build_sdist('sdist')"
    code, output = run(sys.executable, "-c", program, cwd=source)
    assert code == 0, output
    with tarfile.open(next((source / "sdist").glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    extracted = next(tmp_path.glob("kernelwarehouse-*"))
    again = build_wheel(extracted, tmp_path / "wheel")
    assert again.name == wheel.name and content_of(again) == content_of(wheel)


def test_library(environment, tmp_path):
    program = (
        "import kernelwarehouse as k, sys; from importlib.metadata import version;"
        "assert 'torch' not in sys.modules and k.__version__ == version('kernelwarehouse');"
        "print(len(k.build_model('configs/resnet18/kw1x_resnet18.json').conversion), 'models' in sys.modules)"
    )
    code, output = run(environment, "-c", program, cwd=tmp_path)
    assert code == 0, output
    assert output.split() == ["21", "False"]


def test_train_and_evaluate(environment, tmp_path):
    """Beside files that hide the project's own, where the current folder comes first."""
    for name in ("models", "utils", "datasets", "main"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')\n")
    options = quick(epochs=1, recipe="digits", update_freq=1, output_dir="out")
    code, output = run(environment, "-m", "kernelwarehouse", "train", *options, cwd=tmp_path)
    assert code == 0, output
    trained = [line for line in output.splitlines() if line.startswith("* Acc@1")]

    checkpoint = "out/checkpoint-0.pth"
    command = environment.parent / "kernelwarehouse"
    code, output = run(command, "evaluate", "--resume", checkpoint, "--device", "cpu", cwd=tmp_path)
    assert code == 0, output
    assert [line for line in output.splitlines() if line.startswith("* Acc@1")] == trained != []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_find_the_package(environment, tmp_path, method):
    (tmp_path / "program.py").write_text(
        "import multiprocessing, sys\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        "    from kernelwarehouse.__main__ import main\n"
        "    sys.exit(main())\n"
    )
    options = quick(epochs=1, recipe="digits", update_freq=1, num_workers=1)
    code, output = run(environment, "program.py", "train", *options, cwd=tmp_path)
    assert code == 0, output


@pytest.mark.slow
def test_distributed(environment, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "kernelwarehouse")
    options = quick(epochs=1, recipe="digits", update_freq=1)
    code, output = run(environment, *launcher, "train", *options, cwd=tmp_path, GLOO_SOCKET_IFNAME="lo")
    assert code == 0, output
    assert "on 2 x cpu" in output


@pytest.mark.slow
def test_editable_installation(source, tmp_path):
    venv.create(tmp_path / "environment", symlinks=True)
    python = tmp_path / "environment/bin/python"
    packages = tmp_path / f"environment/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    code, output = run(*pip, "--no-build-isolation", "--editable", source, cwd=tmp_path)
    assert code == 0, output
    code, output = run(python.parent / "kernelwarehouse", "train", *quick(epochs=1, recipe="digits"), cwd=tmp_path)
    assert code == 0, output
    program = "import kernelwarehouse as k; print(k.__file__)"
    assert run(python, "-c", program, cwd=tmp_path) == (0, f"{source}/models/__init__.py\n")


def test_help_lists_the_commands_that_exist(capsys):
    assert main(["--help"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS) and {"train", "evaluate", "convert"} <= set(listed)
    assert set(listed) == {name for name, command in _ALL.items() if (ROOT / command.script).is_file()}


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kernelwarehouse {models.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["trian"], "'trian'; did you mean \"train\"?"),
        (["--versoin"], "'--versoin'; see --help"),
        (["a\nb"], "'a\\nb'; see --help"),
        ([], "see --help"),
    ],
)
def test_unknown_command(argv, part, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and part in captured.err
    assert not captured.out


@pytest.fixture
def own_path(monkeypatch):
    """A command changes the words and the path of its process."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_command_runs_the_script(own_path, capsys):
    assert main(["convert", "--kw_config", "kw1x_resnet18", "--nb_classes", "10"]) == 0
    assert str(models.report_model("configs/resnet18/kw1x_resnet18.json", num_classes=10)) in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    assert "usage: kernelwarehouse evaluate " in capsys.readouterr().out
    assert main(["train", "--modle", "resnet18"]) == 2
    assert "--model" in capsys.readouterr().err


def test_missing_extra_is_named(own_path, capsys, monkeypatch):
    # as if it were not installed, though another test may have imported its parts
    for module in ["mmengine", *(name for name in sys.modules if name.startswith("mmengine."))]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    for module in [name for name in sys.modules if name == "detection" or name.startswith("detection.")]:
        monkeypatch.delitem(sys.modules, module)
    assert main(["train-detector", "--help"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: train-detector needs mmengine") and '"kernelwarehouse[detection]"' in error


def test_digits_without_their_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert training.main(quick()) == 2
    assert capsys.readouterr().err == "error: --data_set digits needs scikit-learn: pip install scikit-learn\n"


def test_detection(environment, tmp_path):
    pytest.importorskip("mmdet", reason="requirements-detection.txt is not installed")
    command = environment.parent / "kernelwarehouse"
    config = "detection/configs/mini/mask_rcnn_kw1x_resnet10t.py"
    code, output = run(command, "train-detector", config, "--cfg-options", "data_root=absent/", cwd=tmp_path)
    # the config was found, and the model's
    assert code == 2 and output.splitlines()[-1].startswith("error: train "), output


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("configs/resnet18/kw1x_resnet18.json", "configs/resnet18/kw1x_resnet18.json"),
        ("kw1x_resnet18", "configs/resnet18/kw1x_resnet18.json"),
        ("digits/kw1x_resnet18", "configs/digits/kw1x_resnet18.json"),
        ("traditional/kw1x_resnet18", "configs/resnet18/traditional/kw1x_resnet18.json"),
        ("kw1x_convnext_tiny_paper", "configs/convnext/kw1x_convnext_tiny_paper.json"),
    ],
)
def test_configs_are_found_anywhere(name, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == ROOT / path
    assert read_config(name) == read_config(ROOT / path)


def test_own_files_come_before_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "configs/resnet18/kw1x_resnet18.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"model": "test_resnet"}')
    assert read_config("configs/resnet18/kw1x_resnet18.json") == {"model": "test_resnet"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kw1x_resnet19", 'kw1x_resnet19: no such config file; did you mean "kw1x_resnet18"?'),
        ("configs/none.json", "configs/none.json: no such config file"),
        ("xyzzy", "xyzzy: no such config file"),
        ("deit", "deit: no such config file"),
        ("", ": no such config file"),
    ],
)
def test_unknown_config(name, message):
    with pytest.raises(ConfigError) as error:
        read_config(name)
    assert str(error.value).startswith(message)


# Both names in one process: `first` is imported and makes a model before `second` is imported.
TWO_NAMES = """
import copy, importlib, importlib.util, io, pickle, sys
import torch
a = importlib.import_module({first!r})
model = a.build_model({{"model": "kw_test_resnet", "cell_num_ratio": 1}}, num_classes=3)
b = importlib.import_module({second!r})
assert a is b is sys.modules[{second!r}], (a, b)
assert a.__name__ == {first!r}

# submodules that were imported before, and one that was not
for name in ("build", "methods", "methods.kernel_warehouse", "methods.kernel_warehouse.layer", "ops", "timm_models"):
    two = importlib.import_module({second!r} + "." + name)
    assert two is importlib.import_module({first!r} + "." + name), name
# a function of the package that bears the name of a submodule
import {second}.ops.mixture_conv
assert callable(a.ops.mixture_conv) and a.mixture_conv is a.ops.mixture_conv

layers = [m for m in model.modules() if isinstance(m, b.KWConv2d)]
assert layers and isinstance(model.conversion, dict)
import {second}.config
assert {second}.config.ConfigError is a.ConfigError
try:
    b.build_model({{"model": "kw_test_resnet", "cell_num_ratio": "x"}})
except a.ConfigError:
    pass
for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
    assert type(next(m for m in other.modules() if isinstance(m, b.KWConv2d))) is type(layers[0])
    b.set_temperature(other, 0.25)
    assert b.get_temperature(other) == 0.25
    a.load_weights(other, model.state_dict())

assert importlib.util.find_spec({second!r} + ".nothing") is None
try:
    importlib.import_module({second!r} + ".nothing")
except ModuleNotFoundError as error:
    assert {second!r} + ".nothing" in str(error), error
else:
    raise AssertionError
print("one package")
"""


@pytest.mark.parametrize("first", ["models", "kernelwarehouse"])
def test_both_names_are_one_package(first, environment, tmp_path):
    second = "kernelwarehouse" if first == "models" else "models"
    program = TWO_NAMES.format(first=first, second=second)
    code, output = run(environment, "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert code == 0 and output == "one package\n", output


@pytest.mark.parametrize("first", ["models", "kernelwarehouse"])
def test_two_versions_are_refused(first, environment, source, tmp_path):
    shutil.copytree(source / "models", tmp_path / "models")
    code = tmp_path / "models/__init__.py"
    code.write_text(code.read_text().replace(f'__version__ = "{models.__version__}"', '__version__ = "99.1"'))
    second = "kernelwarehouse" if first == "models" else "models"
    program = f"import {first}\ntry:\n    import {second}\nexcept ImportError as error:\n    print(error)"
    code, output = run(environment, "-c", program, cwd=tmp_path)
    assert code == 0 and output.count("\n") == 1, output
    assert "two versions of one package" in output and "models 99.1 (" in output
    assert f"kernelwarehouse {models.__version__} (" in output


@pytest.mark.parametrize("first", ["models", "kernelwarehouse"])
def test_unrelated_package_called_models(first, environment, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/__init__.py").write_text("OWN = 1\n")
    (tmp_path / "models/build.py").write_text("OWN = 2\n")
    second = "kernelwarehouse" if first == "models" else "models"
    program = (
        f"import {first}, {second}, kernelwarehouse.config, models.build;"
        "print(models.OWN, models.build.OWN, kernelwarehouse.config.ConfigError.__module__)"
    )
    code, output = run(environment, "-c", program, cwd=tmp_path)
    assert code == 0 and output == "1 2 kernelwarehouse.config\n", output


def load(*arguments, **settings):
    return torch.hub.load(str(ROOT), "kernelwarehouse", *arguments, source="local", **settings)


def test_hub_makes_the_models_of_the_project(tmp_path):
    # what torch.hub.list shows
    assert [name for name, value in vars(hubconf).items() if callable(value) and name[0] != "_"] == ["kernelwarehouse"]
    config = {"model": "kw_test_resnet", "cell_num_ratio": 1}
    expected = models.build_model(config, num_classes=5)
    torch.save({"model": expected.state_dict(), "temperature": 0.5}, tmp_path / "checkpoint.pth")
    model = load(config, checkpoint=str(tmp_path / "checkpoint.pth"), num_classes=5)
    assert type(model) is type(expected) and models.get_temperature(model) == 0.5
    models.set_temperature(expected, 0.5)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), expected.eval()(x))

    # without one in the file: the last of the schedule
    torch.save(expected.state_dict(), tmp_path / "weights.pth")
    model = load(config, checkpoint=str(tmp_path / "weights.pth"), num_classes=5)
    assert models.get_temperature(model) == models.temperature_range(model)[1]


def test_hub_knows_configs_and_networks_by_name():
    with torch.device("meta"):
        assert len(load("kw1x_resnet18").conversion) == 21
        assert len(load("configs/resnet18/kw1x_resnet18.json", num_classes=7).conversion) == 21
        assert any(isinstance(layer, models.ODConv2d) for layer in load("od_test_resnet", kernel_num=2).modules())
    with pytest.raises(ValueError, match=r"unknown model 'kw_resnet19', did you mean 'kw_resnet18'\?"):
        load("kw_resnet19")
    with pytest.raises(ValueError, match=r"none\.json: no such config file"):
        load("none.json")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load("test_resnet", checkpoint="none.pth")


@pytest.mark.parametrize("before", ["", "import kernelwarehouse;"])
def test_hub_beside_a_package_called_models(before, environment, tmp_path):
    (tmp_path / "models.py").write_text("OWN = 1\n")
    program = (
        f"{before}import models, torch; assert models.OWN == 1;"
        f"model = torch.hub.load({str(ROOT)!r}, 'kernelwarehouse', 'kw_test_resnet', source='local', cell_num_ratio=1);"
        "import kernelwarehouse as k;"
        "print(any(isinstance(m, k.KWConv2d) for m in model.modules()), models.OWN, k.build.__file__)"
    )
    code, output = run(environment, "-c", program, cwd=tmp_path)
    assert code == 0, output
    words = output.split()
    assert words[:2] == ["True", "1"] and words[2].startswith(str(environment.parent.parent if before else ROOT))


def test_hub_refuses_another_version(environment, source, tmp_path):
    (tmp_path / "kernelwarehouse").mkdir()
    (tmp_path / "kernelwarehouse/__init__.py").write_text('__version__ = "99.1"\n')
    program = f"import kernelwarehouse, torch; torch.hub.load({str(ROOT)!r}, 'kernelwarehouse', 'x', source='local')"
    code, output = run(environment, "-c", program, cwd=tmp_path)
    assert code == 1 and "ImportError: kernelwarehouse has been imported from " in output
