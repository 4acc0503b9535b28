"""The rooms of the methods: a new one is one file and one name, and everything then knows it."""

import json
import shutil
import sys

import pytest
import timm
import torch
from helpers import ROOT, finish

from models import convert
from models.methods import METHODS, method_options

GAIN = '''"""A gain for every output channel, from the input."""

import torch
from torch import nn

from ..ops import conv, with_bias
from ..options import Option
from .layer import Conv1d, Conv2d, Linear, global_pool, reset_linear, scaled
from .method import Method, Setting, layer_classes


class _GainLayer:
    def _setup(self, device, dtype, bias, *, strength=1.0):
        self.strength, kwargs = strength, {"device": device, "dtype": dtype}
        self.attention = nn.Linear(self.in_channels, self.out_channels, **kwargs)
        reset_linear(self)
        self._make_kernels(bias, **kwargs)

    @torch.no_grad()
    def keep_weight(self, weight):
        self.weight.copy_(weight.reshape(self.kernel_shape))
        self.attention.weight.zero_()

    def mixing_cost(self, positions):
        return 7

    def convolve(self, x):
        gains = 1 + self.strength * self.attention(global_pool(x)).tanh()
        return with_bias(scaled(conv(x, self.weight, None, *self._geometry()), gains), self.bias)

    def method_repr(self):
        return f"strength={self.strength}"


GainConv1d, GainConv2d, GainLinear = (type(f"Gain{c.__name__}", (_GainLayer, c), {}) for c in (Conv1d, Conv2d, Linear))


class GainMethod(Method):
    name = "gain"
    layers = layer_classes("Gain", globals())
    settings = {"strength": Setting(1.0, Option(float, None, "gain: how far it goes from 1", low=0))}
'''
USE = """
import torch, timm, models
from models import build_model, convert, load_weights
from models.counting import count_layers
torch.manual_seed(0)
model = build_model("config.json", num_classes=5)
assert set(model.conversion.values()) >= {"gain"} and "strength=0.25" in repr(model)
assert isinstance(model.layer1[0].conv1, models.GainConv2d)
row = next(row for row in count_layers(model, 32) if row.name == "layer1.0.conv1")
assert row.mixing == 7 and row.kind == "GainConv2d" and row.attention > 0
static = timm.create_model("test_resnet", num_classes=5).eval()
x = torch.randn(2, 3, 32, 32)
expected = static(x)
assert torch.allclose(convert(static, "gain", layers="3x3", keep_weights=True)(x), expected, atol=1e-6)
torch.save({"model": model.state_dict()}, "x.pth")
assert torch.equal(load_weights(build_model("config.json", num_classes=5), "x.pth").eval()(x), model.eval()(x))
try:
    build_model({"model": "gain_test_resnet", "strength": -1})
except ValueError as error:
    assert "strength" in str(error)
else:
    raise AssertionError("a wrong value was taken")
"""


def test_a_new_method_is_one_file_and_one_name(tmp_path):
    assert len(GAIN.splitlines()) <= 43
    folders = ("models", "checkpoints", "loading", "inspection", "scripts", "tests", "configs/recipes")
    for name in (*folders, "pyproject.toml", *(path.name for path in ROOT.glob("*.py"))):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "models/methods/gain.py").write_text(GAIN)
    registry = tmp_path / "models/methods/__init__.py"
    registry.write_text(registry.read_text().replace("_ROOMS = (\n", '_ROOMS = (\n    "gain",\n', 1))
    (tmp_path / "config.json").write_text(json.dumps({"model": "gain_test_resnet", "strength": 0.25}))

    def run(*words):
        result = finish([sys.executable, *words], 300, {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}, tmp_path)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    run("-c", USE)
    assert "--strength" in (text := run("main.py", "--help")) and "how far it goes from 1" in text
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_models.py", "tests/test_checkpoints.py"]
    assert run(*arguments, "-k", "gain", "--collect-only").count("gain") > 15
    chosen = "gain and (single_sample or two_processes or every_parameter or state_has or resumed)"
    assert " passed" in run(*arguments, "-k", chosen)


def test_settings_of_methods_are_options():
    options = method_options()
    for method in METHODS.values():
        for name, (default, option) in method.settings.items():
            joined = options[name]
            assert joined.type is option.type and set(option.choices) <= set(joined.choices)
            values = default if isinstance(default, (list, tuple)) else [default]
            assert not option.choices or set(values) <= {*option.choices, None}


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_setting_is_named(method):
    with pytest.raises(ValueError, match=f"{method} has no setting 'kernels'"):
        convert(timm.create_model("test_resnet"), method, kernels=4)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "kw1d2x"])
def test_hooks_on_every_module_fire(method):
    """Tools that look inside a network, such as torchinfo, fvcore and Captum, do it by forward hooks."""
    net, fired = convert(timm.create_model("test_resnet", num_classes=5), method).eval(), set()
    for name, module in net.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: fired.add(name))
    net(torch.randn(1, 3, 32, 32))
    # these hold parameters for other modules
    holders = tuple(name for name in ("warehouses", "kernel_representation") if hasattr(net, name))
    assert {name for name, _ in net.named_modules() if not name.startswith(holders or "-")} <= fired
