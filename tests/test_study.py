"""The study of learning on characters: its data set, its runs, its report."""

import csv
import runpy
import subprocess
import sys
from pathlib import Path

import make_glyphs
import matplotlib
import numpy as np
import pytest
import study
import torch
from helpers import ROOT, quick

import main
from loading.images import GlyphsData
from models import build_model
from models.config import ConfigError

FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"
# designs that every machine has, in the place of Debian's
TRAIN = [("-", f"DejaVuSans{style}.ttf", 0) for style in ("", "-Bold", "-Oblique", "Mono", "Mono-Bold")]
TEST = [("-", f"DejaVuSerif{style}.ttf", 0) for style in ("", "-Bold")]


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """A data set of eight letters in seven fonts."""
    folder = tmp_path_factory.mktemp("glyphs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_glyphs, "TRAIN", TRAIN)
        patch.setattr(make_glyphs, "TEST", TEST)
        patch.setattr(make_glyphs, "shared_characters", lambda: list("ABCDEFGHIJ \uffff"))
        for name in ("first", "second"):
            arguments = ["make_glyphs.py", "--output", str(folder / name), "--classes", "8", "--fonts", str(FONTS)]
            patch.setattr(sys, "argv", arguments)
            make_glyphs.main()
    return folder


def test_characters_are_those_of_three_standards():
    characters = make_glyphs.shared_characters()
    assert len(characters) == len(set(characters)) == 1759
    # simplified in GB 2312 only; of level 2; kana; and three that all have
    assert not set("門鬱あ") & set(characters) and set("一人山") <= set(characters)


def test_glyphs_are_drawn_whole_and_centred():
    (font,) = make_glyphs.load_fonts(TRAIN[:1], [FONTS])
    for character in "AWl-":
        image = make_glyphs.draw(character, font)
        assert image.shape == (32, 32) and image.max() > 200
        rows, columns = np.nonzero(image.max(1))[0], np.nonzero(image.max(0))[0]
        # the longer side is 28 pixels, and the margins differ by a pixel at most
        assert max(rows[-1] - rows[0], columns[-1] - columns[0]) == 27
        assert abs(rows[0] + rows[-1] - 31) <= 1 and abs(columns[0] + columns[-1] - 31) <= 1
    assert make_glyphs.draw(" ", font) is None


def test_data_set(glyphs):
    arrays = [dict(np.load(glyphs / name / "glyphs.npz")) for name in ("first", "second")]
    assert make_glyphs.digest_of(arrays[0]) == make_glyphs.digest_of(arrays[1])
    data = arrays[0]
    # those that a font lacks are passed over, others stand in the order of the lot
    assert len(data["classes"]) == 8 and set(data["classes"]) <= set("ABCDEFGHIJ")
    assert data["train_images"].shape == (8 * 5, 32, 32) and data["test_images"].shape == (8 * 2, 32, 32)
    fonts = make_glyphs.load_fonts([*TRAIN, *TEST], [FONTS])
    for images, chosen in ((data["train_images"], fonts[:5]), (data["test_images"], fonts[5:])):
        for index, image in enumerate(images):
            character, font = data["classes"][index // len(chosen)], chosen[index % len(chosen)]
            assert np.array_equal(image, make_glyphs.draw(str(character), font))
    loaded = GlyphsData(glyphs / "first", False, lambda image: image)
    image, label = loaded[3]
    assert image.mode == "RGB" and image.size == (32, 32) and label == 1 and len(loaded) == 16


def test_missing_fonts_are_named():
    with pytest.raises(SystemExit, match=r"apt-get install fonts-none$"):
        make_glyphs.load_fonts([("fonts-none", "None.ttf", 0)], [FONTS])
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/make_glyphs.py", "--packages"], capture_output=True, text=True, check=True
    )
    assert set(result.stdout.split()) == {package for package, *_ in make_glyphs.TRAIN + make_glyphs.TEST}
    assert not {name for _, name, _ in make_glyphs.TRAIN} & {name for _, name, _ in make_glyphs.TEST}


def test_wrong_data_are_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"make it with scripts/make_glyphs\.py"):
        GlyphsData(tmp_path, True, None)
    (tmp_path / "glyphs.npz").write_bytes(b"PK\x03\x04 half a file")
    assert main.main(quick(data_set="glyphs", data_path=tmp_path)) == 2
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("width", [16, 20, 28])
def test_small_networks(width):
    model = build_model({"model": f"resnet18_w{width}"}, num_classes=7)
    convolutions = [m for n, m in model.named_modules() if n.endswith("conv2")]
    assert [m.out_channels for m in convolutions] == [width * 2**i for i in range(4) for _ in range(2)]
    assert {m["num_chs"] for m in model.feature_info[1:]} == {width * 2**i for i in range(4)}
    assert model.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 8 * width, 2, 2)


def run_study(folder, data, *arguments):
    command = [sys.executable, ROOT / "scripts/study.py", "configs/glyphs/resnet18_w16.json", "--data_path", data]
    command += ["--csv", folder / "study.csv", "--work_dir", folder / "runs", "--seeds", "0", "1", "--jobs", "2"]
    options = ["--options", "--epochs", "1", "--batch_size", "8", "--lr", "0.01"]
    return subprocess.run([*command, *arguments, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_study_is_run_once_and_reported(glyphs, tmp_path):
    first = run_study(tmp_path, glyphs / "first")
    assert first.returncode == 0 and "2 runs to go" in first.stderr, first.stderr
    with open(tmp_path / "study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["seed"] for row in rows) == ["0", "1"]
    for row in rows:
        assert 0 <= float(row["acc1"]) <= 100 and row["options"] == "--epochs 1 --batch_size 8 --lr 0.01"
        assert int(row["parameters"]) == sum(
            p.numel() for p in build_model({"model": "resnet18_w16"}, num_classes=8).parameters()
        )
    page = (tmp_path / "study.md").read_text()
    mean = sum(float(row["acc1"]) for row in rows) / 2
    assert f"| {mean:.2f} | ± " in page and (tmp_path / "study.png").stat().st_size > 5000

    # text around the table stays, and what was run is not run again
    (tmp_path / "study.md").write_text("# Words\n" + page + "more words\n")
    second = run_study(tmp_path, glyphs / "second")
    assert "0 runs to go" in second.stderr and second.returncode == 0
    page = (tmp_path / "study.md").read_text()
    assert page.startswith("# Words\n") and page.endswith("more words\n") and page.count("| network |") == 1


def test_intervals_are_those_of_the_t_distribution():
    base = {
        "config": "c",
        "data": "d",
        "settings": "s",
        "options": "",
        "parameters": 1,
        "multiply_adds": 2,
        "train_loss": 1.0,
    }
    rows = [{**base, "seed": i, "acc1": value, "seconds": 1800, "threads": 2} for i, value in enumerate((90, 92, 97))]
    (group,) = study.summarise(rows)
    # 4.303 is the 97.5 % quantile with two degrees of freedom
    assert group["mean"] == 93 and group["half"] == pytest.approx(4.3027 * np.std([90, 92, 97], ddof=1) / 3**0.5, 1e-4)
    assert group["hours"] == 3.0 and study.summarise(rows[:1])[0]["half"] is None


def test_a_failed_run_ends_the_study_with_its_error(glyphs, tmp_path):
    command = [sys.executable, ROOT / "scripts/study.py", "configs/glyphs/resnet18_w16.json", "--data_path"]
    command += [glyphs / "first", "--csv", tmp_path / "other.csv", "--work_dir", tmp_path / "other", "--seeds", "0"]
    result = subprocess.run([*command, "--options", "--opt", "lion"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "lion" in result.stderr and not (tmp_path / "other.csv").exists()


def test_scripts_explain_themselves(capsys, monkeypatch):
    for script in ("study.py", "make_glyphs.py"):
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        assert "usage:" in capsys.readouterr().out
