"""--in_chans 1: networks for grey images, from training to export."""

import numpy as np
import pytest
import torch
from helpers import KW, quick, refused, words
from PIL import Image

import exporting
import main
from loading.transforms import make_transform
from models import build_model
from models.tracing import images_of, traced
from trained import open_trained

pytestmark = pytest.mark.usefixtures("one_thread")
# images are read as RGB; the weights of ITU-R 601 and the averages of ImageNet's means and standard deviations
WEIGHTS, MEAN, STD = (0.299, 0.587, 0.114), (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3


def test_from_training_to_export(tmp_path, capsys):
    options = {"model": "kw_test_resnet", **KW, "in_chans": 1, "epochs": 1}
    assert main.main(quick(**options, dry_run=True)) == 0
    assert "for an input of 1x16x16" in capsys.readouterr().out
    assert main.main(quick(**options, output_dir=tmp_path)) == 0
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("* Acc@1"))
    path = tmp_path / "checkpoint-0.pth"
    # the checkpoint tells it
    assert main.main(words(eval=True, resume=path, device="cpu")) == 0
    assert line in capsys.readouterr().out
    trained = open_trained(str(path))
    assert trained.model.get_submodule("conv1.0").weight.shape[1] == 1
    assert exporting.describe(trained)["preprocessing"]["grey"] is True
    image = images_of(trained.model, 1, 16, 16)
    assert image.shape[1] == 1
    program = traced(trained.model, 16).module()
    torch.testing.assert_close(program(image), trained.model(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("data_set", ["digits", "CIFAR10", "IMNET"])
def test_images_are_made_grey(data_set):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    args, _ = main.merged_options({"data_set": data_set, "in_chans": 1, "input_size": 32, "crop_pct": 1.0})
    expected = ((pixels @ np.array(WEIGHTS)) / 255 - MEAN) / STD
    found = make_transform(args, is_train=False)(Image.fromarray(pixels))
    np.testing.assert_allclose(found, expected[None], atol=2e-3)
    assert make_transform(args, is_train=True)(Image.fromarray(pixels)).shape == (1, 32, 32)


def test_other_numbers_of_channels(capsys):
    assert "--in_chans 4: images are read as colours" in refused(capsys, quick(in_chans=4))
    net = build_model({"model": "kw_test_resnet", **KW, "in_chans": 5}, num_classes=3).eval()
    assert net(torch.randn(2, 5, 32, 32)).shape == (2, 3)
