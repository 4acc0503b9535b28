"""Exported models compute what the trained ones do, in ONNX Runtime and in a process without this project."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from benchmark_export import CLASSES, SHARED, settle
from helpers import METHODS, ROOT, finish
from layer_checks import take_statistics
from mixture_calls import definition, make_call, with_gradients
from PIL import Image
from tolerance import assert_same
from torch import nn
from torchvision.transforms import ToTensor

from exporting import (
    Features,
    accuracy,
    describe,
    labelled_images,
    quantised,
    session_of,
    write_onnx,
    write_pt2,
)
from loading.images import ImageFolderData
from models import build_model, convert, load_weights, mixture_conv, set_temperature
from models.config import ConfigError
from models.methods import METHODS as BY_NAME
from models.methods.kernel_representation.layer import low_frequencies
from models.ops.portable import portable_pool_to
from models.tracing import traced
from trained import open_trained

onnx = pytest.importorskip("onnx", reason="needs requirements-export.txt")
pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
# of float32 in ONNX Runtime, relative to the largest output; observed at most 5e-6 in networks of few layers
FEW_LAYERS = 1e-4
STATIC_NODES = {"Conv", "Gemm", "Relu", "ReduceMean", "Reshape", "Flatten", "GlobalAveragePool"}
FAMILIES = [
    *(f"{method}_{net}" for method in ("kw", "od", "dyconv", "condconv", "dcd", "kr", "cgc", "weightnet", "we")
      for net in ("resnet18", "mobilenetv2_050", "convnext_atto")),
    *(f"{method}_test_vit" for method in ("kw", "od", "dyconv", "condconv", "dcd", "kr", "weightnet", "we")),
]  # fmt: skip


def trained_like(model, size, batch=8):
    take_statistics(model, torch.randn(batch, 3, size, size))
    return model.eval()


def own_settings(name):
    """Settings of KW in which 20 steps of training leave float32 fine enough."""
    # "kw1d2x" is a plan with a budget of its own
    own = {"attention_init": "static"} if name == "kw1d2x" else SHARED
    return own if name.startswith("kw") else {}


def small(method, **settings):
    """A network with a layer of every kind: dense with a stride, point-wise, depth-wise, linear."""
    if "kw" in method:
        settings.update(cell_num_ratio=1, cell_inplane_ratio=1, cell_outplane_ratio=1)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 32, 1),
        nn.Conv2d(32, 32, 3, 1, 1, groups=32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    return trained_like(convert(net, method, **settings), 16)


def assert_exports(model, path, size, limit, dynamic_size=False):
    result = write_onnx(model, path, size, {"model": "net", "classes": ["a", "b"]}, dynamic_size)
    assert result["error"] <= limit
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert {node.domain for node in written.graph.node} == {""} and written.opset_import[0].version >= 18
    assert {p.key: p.value for p in written.metadata_props} == {"model": "net", "classes": '["a", "b"]'}
    run = session_of(path)
    for images in (torch.randn(3, 3, size, size), torch.randn(1, 3, size + 32 * dynamic_size, size)):
        with torch.no_grad():
            expected = model(images)
        error = float((run(images)[0] - expected).abs().max() / expected.abs().max())
        assert error <= limit


@pytest.mark.parametrize("kind", [None, "depthwise", "outputs", "pointwise"])
def test_portable_operator_equals_naive(kind):
    for seed in range(40):
        tensors, arguments = make_call(seed, backend=kind)
        values = with_gradients(mixture_conv, tensors, arguments, backend="portable")
        for value, expected in zip(values, definition(tensors, arguments), strict=True):
            assert_same(value, expected)


@pytest.mark.parametrize("height", [1, 2, 5, 7, 12])
def test_portable_pooling(height):
    x = torch.randn(2, 3, height, 6, dtype=torch.float64)
    for size in ((1, 1), (2, 3), (3, 4), (5, 7)):
        assert_same(portable_pool_to(x, size), F.adaptive_avg_pool2d(x, size))


# "kw1d2x" is a plan for MobileNetV2
@pytest.mark.parametrize("method", [name for name in BY_NAME if name != "kw1d2x"])
def test_small_network_as_onnx(method, tmp_path):
    any_size = method in ("cgc", "kw", "odconv", "kr")
    assert_exports(small(method), tmp_path / "net.onnx", 16, FEW_LAYERS, dynamic_size=any_size)
    image = onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.shape.dim
    size = ["height", "width"] if any_size else ["", ""]
    assert [dim.dim_param for dim in image] == ["batch", "", *size]


@pytest.mark.parametrize(("method", "settings"), [("we", {}), ("odconv", {"attentions": ["kernel"]}), ("kw", {})])
def test_layers_whose_kernels_no_input_changes_become_static(method, settings, tmp_path):
    model = small(method, **settings)
    set_temperature(model, 1.0)
    layers = [type(module) for module in model.modules()]
    assert_exports(model, tmp_path / "net.onnx", 16, FEW_LAYERS)
    nodes = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    # as many as the static network has, with its BatchNorm in its convolutions
    assert nodes.count("Conv") == 4 and nodes.count("Gemm") == 1 and {*nodes} <= STATIC_NODES
    assert [type(module) for module in model.modules()] == layers


def test_program_runs_without_this_project(tmp_path):
    models = {method: small(method) for method in ("kw", "cgc")}
    images = torch.randn(3, 3, 16, 16)
    for method, model in models.items():
        write_pt2(model, tmp_path / f"{method}.pt2", 16, {"model": method})
    torch.save(images, tmp_path / "images.pt")
    program = (
        "import json, sys, torch; images = torch.load('images.pt')\n"
        f"for name in {list(models)}:\n"
        "    about = {'about.json': ''}\n"
        "    net = torch.export.load(name + '.pt2', extra_files=about).module()\n"
        "    assert json.loads(about['about.json']) == {'model': name}\n"
        "    torch.save([net(images), net(images[:1])], name + '.out')\n"
        "assert not {'models', 'kernelwarehouse', 'timm'} & set(sys.modules)"
    )
    done = finish([sys.executable, "-I", "-c", program], 120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for method, model in models.items():
        with torch.no_grad():
            for value, batch in zip(torch.load(tmp_path / f"{method}.out"), (images, images[:1]), strict=True):
                assert_same(value, model(batch))


class Block(nn.Module):
    """Convolutions with BatchNorm: one without a bias, one with it, and one whose output is read again."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=i != 0) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in self.convs)

    def forward(self, x):
        for conv, norm in zip(self.convs[:2], self.norms[:2], strict=True):
            x = norm(conv(x)).relu()
        y = self.convs[2](x)
        return self.norms[2](y) + y


def test_norms_become_part_of_convolutions():
    model = trained_like(Block(), 8)
    for norm in model.norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = traced(model, 8)
    images = torch.randn(3, 3, 8, 8)
    assert_same(program.module()(images), model(images))
    assert sum("batch_norm" in str(node.target) for node in program.graph.nodes) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_prefix_as_onnx(name, tmp_path):
    model = settle(build_model({**METHODS[name], **own_settings(name)}, num_classes=CLASSES), 64)
    assert_exports(model, tmp_path / "net.onnx", 64, FEW_LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_as_onnx(name, tmp_path):
    size = 160 if "vit" in name else 64
    model = settle(build_model({"model": name, **own_settings(name)}, num_classes=CLASSES), size)
    # of any size: every kind of layer in fewer layers
    assert_exports(model, tmp_path / "net.onnx", size, FEW_LAYERS, dynamic_size="convnext" in name)


class LowFrequencies(torch.nn.Module):
    def forward(self, images):
        return low_frequencies(images)


def test_representation_of_images_of_any_size_as_onnx(tmp_path):
    """KR's first representation takes the numbers of its waves from the size of the image."""
    assert write_onnx(LowFrequencies().eval(), tmp_path / "net.onnx", 24, {}, dynamic_size=True)["error"] <= FEW_LAYERS


@pytest.mark.slow
def test_backbone_of_a_detector_as_onnx(tmp_path):
    pytest.importorskip("mmdet", reason="needs requirements-detection.txt")
    from detection.backbones import ClassificationBackbone

    backbone = ClassificationBackbone({"model": "kw_test_resnet", "cell_num_ratio": 1}).eval()
    names = tuple(f"stage_{i}" for i in range(4))
    result = write_onnx(backbone, tmp_path / "net.onnx", 64, {}, dynamic_size=True, names=names)
    assert result["error"] <= FEW_LAYERS
    assert [output.name for output in onnx.load(tmp_path / "net.onnx").graph.output] == list(names)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a static network, as main.py writes it."""
    path, classes = tmp_path_factory.mktemp("export") / "net.pth", [str(i) for i in range(10)]
    config = {"model": "test_resnet", "input_size": 32, "data_set": "digits"}
    model = trained_like(build_model({"model": "test_resnet"}, num_classes=10), 32)
    args = {**config, "nb_classes": 10, "classes": classes, "given": list(config)}
    torch.save({"model": model.state_dict(), "model_ema": None, "temperature": 0.0, "args": args}, path)
    return path


@pytest.fixture
def export(monkeypatch, capsys):
    """Runs scripts/export.py; returns what it printed, on stderr if it ended with code 2."""
    main = runpy.run_path(str(ROOT / "scripts/export.py"))["main"]

    def command(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        assert main() == code
        return capsys.readouterr()[code > 0]

    return command


def test_command_writes_onnx(checkpoint, tmp_path, export):
    printed = export(checkpoint, tmp_path / "net.onnx", "--input_size", 24, "--features")
    assert "tolerance" in printed and re.search(r"PyTorch [\d.]+ ms, ONNX Runtime [\d.]+ ms", printed)
    about = {p.key: p.value for p in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert about["model"] == "test_resnet" and json.loads(about["classes"]) == [str(i) for i in range(10)]
    assert json.loads(about["preprocessing"])["resize"] == [24, 24]
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = open_trained(str(checkpoint)).model.forward_features(images)
    assert_same(session_of(tmp_path / "net.onnx")(images)[0], expected)


class Tensors(torch.utils.data.Dataset):
    """Images that are numbers already, and their labels."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A linear classifier of images of 8x8 pixels, and its ONNX file."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)).eval()
    path = tmp_path_factory.mktemp("linear") / "net.onnx"
    write_onnx(model, path, 8, {})
    return model, path


def test_accuracy_counts_what_is_right(linear):
    model, path = linear
    images = torch.randn(70, 3, 8, 8)
    weight, bias = (parameter.detach().numpy() for parameter in model[1].parameters())
    best = (images.flatten(1).numpy() @ weight.T + bias).argmax(1)
    # of the last, incomplete batch more are wrong than of the others
    labels = [int((label + (i % 3 == 0 or i > 60)) % 5) for i, label in enumerate(best)]
    right = sum(label == expected for label, expected in zip(labels, best, strict=True))
    assert right == 40 and accuracy(path, Tensors(images, labels)) == pytest.approx(100 * right / 70)


def image_folder(root, names, damaged=()):
    for name in names:
        (root / name).mkdir()
        Image.new("RGB", (8, 8)).save(root / name / "x.png")
    for name in damaged:
        (root / name / "y.png").write_bytes((root / name / "x.png").read_bytes()[:40])
    return str(root)


def test_folders_are_the_models_classes(checkpoint, tmp_path):
    trained = open_trained(str(checkpoint))
    source = image_folder(tmp_path, ("3", "7"))
    assert [label for _, label in labelled_images(trained, source, is_train=False)] == [3, 7]
    image_folder(tmp_path, ("ant",))
    with pytest.raises(ConfigError, match="its folder ant is none of the model's 10 classes"):
        labelled_images(trained, source, is_train=False)
    # of images to calibrate with, the labels do not matter, nor where the checkpoint does not tell its classes
    assert len(labelled_images(trained, source, is_train=True)) == 3
    trained.classes = None
    assert [label for _, label in labelled_images(trained, source, is_train=False)] == [0, 1, 2]


@pytest.mark.parametrize(("use", "option"), [(accuracy, "--evaluate"), (quantised, "--int8")])
def test_an_unreadable_image_is_named(linear, tmp_path, use, option):
    data = ImageFolderData(Path(image_folder(tmp_path, "ab", damaged="b")), ToTensor())
    before = linear[1].read_bytes()
    with pytest.raises(ConfigError, match=f"^{option}: {tmp_path}/b/y.png: cannot be read as an image"):
        use(linear[1], data)
    assert [path.name for path in linear[1].parent.iterdir()] == ["net.onnx"] and linear[1].read_bytes() == before


@pytest.mark.parametrize("write", [write_onnx, write_pt2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_are_refused(tmp_path, write, value):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)).eval()
    nn.init.constant_(model[1].bias, value)
    with pytest.raises(ConfigError, match="output is not finite"):
        write(model, tmp_path / "net", 8, {})
    assert not list(tmp_path.iterdir())


def test_names_of_classes_as_metadata(checkpoint):
    trained = open_trained(str(checkpoint))
    trained.classes = ("caf\udce9", "\ud800", "\u00e9")
    assert describe(trained)["classes"] == ["caf\\xe9", "\\ud800", "\u00e9"]


def test_int8_of_digits(checkpoint, tmp_path, export):
    export(checkpoint, tmp_path / "float.onnx")
    printed = export(checkpoint, tmp_path / "int8.onnx", "--int8", "digits", "--evaluate", "digits")
    float32, int8 = (float(text) for text in re.findall(r"top-1 accuracy ([\d.]+) % of 360 images", printed))
    assert abs(float32 - int8) < 10
    sizes = [(tmp_path / name).stat().st_size for name in ("float.onnx", "int8.onnx")]
    assert sizes[1] < 0.5 * sizes[0]
    written = onnx.load(tmp_path / "int8.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in written.graph.node}
    assert "preprocessing" in {p.key for p in written.metadata_props}
    assert {path.name for path in tmp_path.iterdir()} == {"float.onnx", "int8.onnx"}
    images = torch.randn(3, 3, 32, 32)
    values, expected = (session_of(tmp_path / name)(images)[0] for name in ("int8.onnx", "float.onnx"))
    assert torch.nn.functional.cosine_similarity(values, expected).min() > 0.9


def test_weights_tell_their_model(checkpoint, tmp_path, export):
    export(checkpoint, tmp_path / "net.safetensors")
    before, after = open_trained(str(checkpoint)), open_trained(str(tmp_path / "net.safetensors"))
    assert after.classes == before.classes and str(after.transform) == str(before.transform)
    images = torch.randn(2, 3, 32, 32)
    other = load_weights(build_model({"model": "test_resnet"}, num_classes=10), tmp_path / "net.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(before.model(images), after.model(images))
        assert torch.equal(before.model(images), other(images))
    assert "which is read" in export(tmp_path / "net.safetensors", tmp_path / "net.safetensors", code=2)


@pytest.mark.parametrize("given", [["model", "data_set"], None])
def test_weights_keep_another_size(checkpoint, tmp_path, export, given):
    """Also of a run that did not give a size."""
    content = torch.load(checkpoint, weights_only=True)
    content["args"] = {**content["args"], "given": given} if given else content["args"]
    torch.save(content, tmp_path / "net.pth")
    export(tmp_path / "net.pth", tmp_path / "net.safetensors", "--input_size", 24)
    after = open_trained(str(tmp_path / "net.safetensors"))
    assert after.args.input_size == 24 and after.transform.transforms[0].size == (24, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{checkpoint}", "net.tflite"), "use one of .onnx, .pt2, .safetensors"),
        (("{checkpoint}", "no/net.onnx"), "there is no folder "),
        (("README.md", "{folder}/net.onnx"), "README.md"),
        (("{folder}/none.pth", "{folder}/net.onnx"), "does not exist"),
        (("{checkpoint}", "{folder}/net.safetensors", "--features"), "leave these out"),
        (("{checkpoint}", "{folder}/net.pt2", "--input_size", "0"), "--input_size: must be at least 1"),
        (
            ("{checkpoint}", "{folder}/net.safetensors", "--input_size", "8193"),
            "--input_size must be an integer from 1 to",
        ),
        (("{checkpoint}", "{folder}/net.pt2", "--int8", "digits"), "are for .onnx"),
        (("{checkpoint}", "{folder}/net.onnx", "--int8", "{folder}/none"), "none"),
        (("{checkpoint}", "{folder}/net.pt2", "--ema"), "no averaged weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(checkpoint, tmp_path, export, arguments, message):
    error = export(*(word.format(checkpoint=checkpoint, folder=tmp_path) for word in arguments), code=2)
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


def test_features_of_kernel_representation_are_refused():
    with pytest.raises(ConfigError, match="leave out --features"):
        Features(build_model({"model": "kr_test_resnet"}, num_classes=10))


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-export\.txt"):
        write_onnx(nn.Flatten(), tmp_path / "net.onnx", 8, {})


def test_a_different_file_is_not_written(monkeypatch, tmp_path):
    monkeypatch.setattr("exporting._difference", lambda value, expected: 0.01)
    monkeypatch.setattr("exporting.OWN_ERRORS", 0)
    with pytest.raises(ConfigError, match="nothing was written"):
        write_onnx(nn.Flatten().eval(), tmp_path / "net.onnx", 8, {})
    assert not list(tmp_path.iterdir())


def test_one_size_only(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)).eval()
    with pytest.raises(ConfigError, match="leave out --dynamic_size"):
        write_pt2(model, tmp_path / "net.pt2", 16, {}, dynamic_size=True)
