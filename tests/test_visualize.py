"""Pictures of attentions, Grad-CAM++ and t-SNE, by scripts/visualize.py."""

import argparse
import itertools
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import visualize
from helpers import METHODS, make_image_folder, words
from PIL import Image
from torch import nn

from checkpoints import write_checkpoint
from inspection import attentions, cams, detectors, embedding, pictures
from models import build_model
from models.anatomy import is_dynamic
from models.config import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = [str(i) for i in range(10)]


def checkpoint_of(folder, config, name="model.pth", classes=CLASSES, size=32, **options):
    """A checkpoint with random weights, as a run on the digits leaves it."""
    model = build_model(config, num_classes=len(classes))
    args = {**config, "input_size": size, "classes": list(classes), "data_set": "digits", **options}
    args["given"] = sorted({*config, "input_size", "data_set", *options})
    write_checkpoint(folder / name, {"model": model.state_dict(), "args": args})
    return str(folder / name)


def draw(*arguments, **options):
    return visualize.main([*map(str, arguments), *words(**{"device": "cpu", **options})])


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs the script, which must refuse its arguments and write nothing; returns its one line."""

    def refused(*arguments, **options):
        capsys.readouterr()
        assert draw(*arguments, output=tmp_path / "out", **options) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        assert captured.out == "" and not (tmp_path / "out").exists()
        return captured.err

    return refused


def test_moments_are_those_of_numpy():
    values, labels = torch.randn(12, 3, 4, dtype=torch.float64), [0, 1, 2] * 4
    moments = attentions.Moments()
    for part, own in zip(values.split(5), [labels[:5], labels[5:10], labels[10:]]):
        moments.add(part, own)
    x = values.numpy()
    np.testing.assert_allclose(moments.mean, x.mean(0), atol=1e-12)
    np.testing.assert_allclose(moments.deviation, x.std(0), atol=1e-12)
    means = [x[np.array(labels) == label].mean(0) for label in range(3)]
    np.testing.assert_allclose(moments.deviation_of_classes, np.std(means, axis=0), atol=1e-12)


def test_only_so_many_classes_are_kept(monkeypatch):
    monkeypatch.setattr(attentions, "CLASSES", 2)
    moments = attentions.Moments()
    moments.add(torch.tensor([[1.0], [2.0], [3.0], [5.0]]), [7, 8, 9, 7])
    assert {label: (count, float(total)) for label, (count, total) in moments.of_class.items()} == {
        7: (2, 6),
        8: (1, 2),
    }


def test_entropy_is_scipys():
    alpha = torch.randn(5, 3, 7, dtype=torch.float64)
    shares = alpha.abs().numpy()
    expected = scipy.stats.entropy(shares, axis=-1) / np.log(7)
    np.testing.assert_allclose(attentions.relative_entropy(alpha), expected, atol=1e-12)
    assert attentions.relative_entropy(torch.eye(4)).tolist() == [0] * 4
    assert attentions.relative_entropy(torch.zeros(2, 3)).tolist() == [0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_collected_is_what_the_layers_computed(method):
    model = build_model(METHODS[method], num_classes=3).eval()
    if method in ("we", "se", "cbam", "eca", ""):
        with pytest.raises(ConfigError, match="no attentions"):
            attentions.require_attentions(model, "x")
        return
    layers = attentions.require_attentions(model, "x")
    assert layers.keys() <= {name for name, module in model.named_modules() if is_dynamic(module)}
    x, seen = torch.rand(6, 3, 32, 32), {}
    with torch.no_grad(), attentions.Collector(model) as collector:
        for batch, labels in ((x[:4], [0, 1, 2, 0]), (x[4:], [1, 2])):
            model(batch)
            collector.add(labels)
    for name, layer in layers.items():
        source = attentions._source(layer)
        source.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        model(x)
    assert collector.found.count == 6 and collector.found.labels == [0, 1, 2, 0, 1, 2] and seen.keys() == layers.keys()
    for name, output in seen.items():
        parts = attentions.named_parts(layers[name], output)
        assert parts.keys() == collector.found.layers[name].parts.keys() and parts
        for part, values in parts.items():
            moments = collector.found.layers[name].parts[part]
            np.testing.assert_allclose(moments.mean, values.double().mean(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(moments.deviation, values.double().std(0, correction=0), rtol=1e-3, atol=1e-4)


def test_vectors_have_the_distances_of_the_kernels():
    model = build_model(METHODS["kw"], num_classes=3).eval()
    layer = next(iter(attentions.dynamic_layers(model).values()))
    alpha = torch.randn(5, layer.attention.m, layer.attention.n)
    kernels = (alpha.double() @ layer.warehouse.cells.double().flatten(1)).flatten(1)
    vectors = attentions.kernel_vectors(layer, {"mixture": alpha})
    torch.testing.assert_close(torch.cdist(vectors, vectors), torch.cdist(kernels, kernels), atol=1e-6, rtol=1e-6)
    assert vectors.shape[1] < kernels.shape[1]


def test_log_odds():
    logits = torch.randn(5, 4, dtype=torch.double, requires_grad=True)
    assert torch.allclose(detectors.log_odds(logits), torch.logit(logits.softmax(1)))
    certain = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(detectors.log_odds(certain)[0, 0], certain)
    assert torch.allclose(gradient, torch.tensor([[1.0, -0.5, -0.5]]))


def test_grad_cam_finds_the_place_that_decides():
    """A network whose class is where a bright pixel is in its red or its green plane."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[0].weight.data = torch.eye(3)[:2].reshape(2, 3, 1, 1)
    image = torch.zeros(1, 3, 8, 8)
    image[0, 0, 2, 5], image[0, 1, 6, 1] = 2.0, 1.0
    found = cams.cams_of(model, [image], model, ["red", "green"], "x")
    assert np.unravel_index(found.maps[0].argmax(), (8, 8)) == (2, 5) and found.predicted[0][0] == "red"
    expected = torch.softmax(torch.tensor([2 / 64, 1 / 64]), 0)[0]
    assert found.predicted[0][1] == pytest.approx(float(expected))


def test_tsne_separates_what_is_separate():
    groups = [torch.randn(30, 80) + 40 * i for i in range(2)]
    vectors = [vector for group in groups for vector in group]
    points = embedding.embedded(vectors)
    centres = [points[:30].mean(0), points[30:].mean(0)]
    nearest = [int(np.argmin([np.linalg.norm(point - centre) for centre in centres])) for point in points]
    assert nearest == [0] * 30 + [1] * 30
    np.testing.assert_array_equal(points, embedding.embedded(vectors))
    # no two of many classes look the same
    looks = [(i % len(pictures.COLOURS), i % len(pictures.MARKERS)) for i in range(attentions.CLASSES)]
    assert len(set(looks)) == attentions.CLASSES


def read(folder):
    """Names of the pictures in a folder; each is a whole PNG, and the SVGs are XML."""
    names = {path.stem for path in folder.glob("*.png")}
    for path in folder.iterdir():
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 5
        elif path.suffix == ".svg":
            ElementTree.parse(path)
        else:
            assert path.name == "index.html"
    return names


@pytest.mark.parametrize(
    "method", ["kw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("od", "kr")), "dyconv"]
)
def test_pictures_of_a_method(method, tmp_path, capsys):
    config = {**METHODS[method], **({"kernel_num": 4} if method in ("od", "kr") else {})}
    path = checkpoint_of(tmp_path, config)
    static = checkpoint_of(tmp_path, {"model": "test_resnet"}, "static.pth")
    # t-SNE takes seconds
    kinds = ["attentions", "cam", *(["kernels"] if method in ("kw", "kr") else [])]
    assert draw(path, output=tmp_path / "out", count=24, beside=static, pictures=kinds) == 0
    names = read(tmp_path / "out")
    expected = {
        "kw": {"warehouses", "cell-usage", "entropy"},
        "od": {f"attention-{name}" for name in ("spatial", "channel", "filter", "kernel")},
        "kr": {"attention-kernel", "tsne-representations"},
        "dyconv": {"attention-kernel", "entropy"},
    }[method]
    assert expected | {"grad-cam", *(["tsne-kernels"] if method in ("kw", "kr") else [])} <= names
    if method == "kw":
        houses = build_model(METHODS["kw"], num_classes=10).warehouses
        assert sum(name.startswith("warehouse-") for name in names) == len(houses)
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("<img ") == len(names) and "http:" not in page and "https:" not in page
    assert "index.html shows" in capsys.readouterr().out


def test_images_of_a_folder_tell_their_classes(tmp_path):
    images = make_image_folder(tmp_path / "data", train=3, val=12)
    path = checkpoint_of(tmp_path, {"model": "test_resnet"}, classes=["ant", "bee", "cat"])
    assert draw(path, images=images / "val", output=tmp_path / "out", pictures=["features", "cam"]) == 0
    assert read(tmp_path / "out") == {"tsne-features", "grad-cam"}
    # a class is a marker of the legend, whose text is in the vector graphics
    assert all(name in (tmp_path / "out/tsne-features.svg").read_text() for name in ("ant", "bee", "cat"))


def test_bad_input_is_refused_in_one_line(tmp_path, refused):
    kw = checkpoint_of(tmp_path, METHODS["kw"])
    static = checkpoint_of(tmp_path, {"model": "test_resnet"}, "static.pth")
    (tmp_path / "empty").mkdir()
    images = make_image_folder(tmp_path / "data", train=3, val=30)
    one = images / "val" / "ant"
    assert "static.pth: its model has no attentions" in refused(static, count=12)
    assert "empty: no images" in refused(kw, images=tmp_path / "empty")
    assert "one image has no spread" in refused(kw, images=one / "0.JPEG")
    # all of them are of one folder, and a folder of classes has one class
    (tmp_path / "single").mkdir()
    one.rename(tmp_path / "single" / "ant")
    assert "all images are of one class" in refused(kw, images=tmp_path / "single")
    assert "t-SNE needs at least 10 images" in refused(kw, count=5)
    assert "no such" in refused(kw, images=tmp_path / "missing")
    assert "missing.pth" in refused(tmp_path / "missing.pth")
    assert "exclude each other" in refused(kw, images=images, data_set="digits")
    assert "add cam to --pictures" in refused(kw, beside=static, pictures="attentions")
    assert "invalid choice" in refused(kw, pictures="sounds")
    (tmp_path / "single/ant/bad.jpg").write_bytes(b"no image")
    assert "bad.jpg: cannot be read as an image" in refused(kw, images=tmp_path / "single")


def test_one_class_and_one_image_are_enough_for_grad_cam(tmp_path):
    images = make_image_folder(tmp_path / "data", train=3, val=3)
    path = checkpoint_of(tmp_path, METHODS["kw"], classes=["ant", "bee", "cat"])
    assert draw(path, images=images / "val/ant/0.JPEG", output=tmp_path / "out", pictures="cam") == 0
    assert read(tmp_path / "out") == {"grad-cam"}


def test_tokens_have_no_grad_cam(tmp_path, refused):
    path = checkpoint_of(tmp_path, {"model": "test_vit"}, size=160)
    assert "Grad-CAM++ needs maps of features" in refused(path, pictures="cam", count=1)


@pytest.mark.parametrize("module, package", pictures.PACKAGES.items())
def test_missing_library(module, package, tmp_path, monkeypatch, refused):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    path = checkpoint_of(tmp_path, METHODS["kw"])
    line = refused(path, count=12)
    assert f"the pictures need {package}, which is not installed: pip install {package}" in line


def test_output_that_cannot_be_written(tmp_path, capsys):
    path = checkpoint_of(tmp_path, METHODS["kw"])
    (tmp_path / "file").write_text("x")
    assert draw(path, output=tmp_path / "file", count=12) == 2
    assert "not a folder" in capsys.readouterr().err and (tmp_path / "file").read_text() == "x"


def test_odd_names_are_drawn(tmp_path):
    classes = ["$\\frac{", "\x1b[31m", "<b>", "世 🐜", "a\nb", "x" * 200, *"0123"]
    path = checkpoint_of(tmp_path, METHODS["dyconv"], classes=classes)
    images = tmp_path / "images"
    for index, name in enumerate(("<script>", "$a$b$", "\u202eabc")):
        (images / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng([index, number]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name / f"{number}.png")
    assert draw(path, images=images, output=tmp_path / "out", pictures=["features", "attentions", "cam"]) == 0
    svg = (tmp_path / "out/tsne-features.svg").read_text()
    assert "<script>" not in svg and "&lt;script&gt;" in svg and "$a$b$" in svg and "\u202e" not in svg


def test_selection_is_fixed_and_without_repetition():
    from inspection.images import chosen

    assert chosen(100, 10) == chosen(100, 10) and len(set(chosen(100, 10))) == 10
    assert sorted(chosen(7, 100)) == list(range(7))
    assert all(0 <= index < 100 for index in itertools.chain(chosen(100, 10)))


class Pyramid(nn.Module):
    """A detector's neck of three maps, of which the head reads the second."""

    def __init__(self):
        super().__init__()
        self.neck = nn.Module()
        self.neck.fpn_convs = nn.ModuleList(nn.Conv2d(1, 2, 1) for _ in range(3))

    def forward(self, x):
        maps = [conv(F.avg_pool2d(x, 2**i)) for i, conv in enumerate(self.neck.fpn_convs)]
        # the last one does not matter at all, the first hardly
        return maps[1].sum() + 1e-3 * maps[0].mean()


def test_the_map_that_a_detector_reads_is_found():
    detector = Pyramid()
    assert detectors._read_map(detector, lambda: detector(torch.randn(1, 1, 8, 8))) == "neck.fpn_convs.1"
    assert not any(module._forward_hooks for module in detector.modules())


@pytest.mark.slow
def test_pictures_of_a_detector(tmp_path, refused):
    pytest.importorskip("mmdet", reason="requirements-detection.txt is not installed")
    from test_detection_runs import CONFIG, made

    from detection import tools

    made(tmp_path / "mini", train=1, val=12)
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    cfg = tools.read_config(
        argparse.Namespace(config=CONFIG, launcher="none", cfg_options=None, work_dir=None, local_rank=0)
    )
    model = MODELS.build(cfg.model)
    meta = {"dataset_meta": {"classes": CLASSES}}
    write_checkpoint(tmp_path / "detector.pth", {"state_dict": model.state_dict(), "meta": meta})
    path, images = tmp_path / "detector.pth", tmp_path / "mini/val"
    assert draw(path, detector=CONFIG, images=images, output=tmp_path / "pictures", pictures=["attentions", "cam"]) == 0
    assert {"warehouses", "cell-usage", "entropy", "grad-cam"} <= read(tmp_path / "pictures")
    assert "takes its images from --images" in refused(path, detector=CONFIG)
