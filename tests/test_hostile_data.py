"""Folders and images that somebody made to do harm, or that went wrong: counted once, named, and nothing waits."""

import os
import shutil
import subprocess
import time

import check_data
import numpy as np
import pytest
from helpers import make_image_folder, quick
from PIL import Image
from torchvision.datasets import ImageFolder

import main
from loading import images
from loading.folders import images_in
from loading.images import ImageFolderData, UnreadableImage, read_image
from models.config import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


def folder_of(root):
    """12 images of 3 classes, in folders with others inside; returns the folder."""
    root = make_image_folder(root, train=12, val=3) / "train"
    for name in ("inside", "inside/x", "inside-2", "B"):
        (root / "ant" / name).mkdir()
    for index, name in enumerate(("inside/x", "inside-2", "B")):
        shutil.move(root / "ant" / f"{3 * index}.JPEG", root / "ant" / name / "a.jpg")
    return root


def samples(root):
    data = ImageFolderData(root, transform=None)
    return data.samples, data.classes


def torchvision_s(root):
    data = ImageFolder(str(root))
    return data.samples, data.classes


def test_the_list_is_torchvision_s(tmp_path):
    root = folder_of(tmp_path / "data")
    assert samples(root) == torchvision_s(root) and len(samples(root)[0]) == 12
    # links to folders elsewhere, of images, of whole classes, and of one class to another
    other = make_image_folder(tmp_path / "other", train=6, val=3) / "train"
    (root / "bee" / "more").symlink_to(other / "bee")
    (root / "dog").symlink_to(other / "cat")
    (root / "cat" / "bees").symlink_to(root / "bee")
    (root / "cat" / "one.png").symlink_to(other / "ant" / "0.JPEG")
    (root / "notes.jpg").write_bytes(b"")
    assert samples(root) == torchvision_s(root) and len(samples(root)[1]) == 4


@pytest.mark.parametrize(
    "link, target",
    [
        ("ant/loop", "."),
        ("ant/loop", ".."),
        ("ant/inside/x/loop", "../.."),
        ("ant/loop", "../.."),
        ("ant/loop", "/"),
        ("loop", "."),
        ("loop", ".."),
    ],
)
def test_a_link_to_a_folder_above_repeats_nothing(link, target, tmp_path):
    root = folder_of(tmp_path)
    expected = samples(root)
    assert len(expected[0]) == 12
    (root / link).symlink_to(target)
    assert samples(root) == expected


def test_links_to_each_other_end(tmp_path):
    root = folder_of(tmp_path)
    (root / "ant" / "bees").symlink_to(root / "bee")
    (root / "bee" / "ants").symlink_to(root / "ant")
    (root / "cat" / "itself").symlink_to("itself")
    found, classes = samples(root)
    assert classes == ["ant", "bee", "cat"]
    # each folder once for each class that leads to it
    assert [sum(label == index for _, label in found) for index in range(3)] == [8, 8, 4]


def test_what_is_left_out_is_told(tmp_path, capsys):
    root = make_image_folder(tmp_path, train=9, val=6)
    for name in ("a.gif", "b.GIF", "c.svg", "notes", ".DS_Store", ".hidden.txt", "x.\x1b[31m"):
        (root / "train" / "ant" / name).write_bytes(b"")
    (root / "val" / "ant" / ".DS_Store").write_bytes(b"")
    arguments = {"data_set": "IMNET", "data_path": root, "input_size": 32, "batch_size": 4, "epochs": 1}
    assert main.main(quick(**arguments)) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert note.startswith(f"note: {root}/train: 5 files are left out for their suffix (")
    for part in (".gif 1", ".GIF 1", ".svg 1", "none 1", r".\x1b[31m 1"):
        assert part in note
    notes = []
    assert len(images_in([str(root / "train"), str(root / "val")], notes.append)) == 15
    assert notes == [note]


def test_a_class_without_images_and_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    root = folder_of(tmp_path)
    (root / "dog").mkdir()
    (root / "dog" / "a.gif").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"none in 1 of 4 \(dog\)"):
        samples(root)
    monkeypatch.setattr(
        os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", path))
    )
    with pytest.raises(ConfigError, match=r"train.*: cannot be searched for images: Permission denied"):
        samples(root)


def odd_file(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "folder", "link to itself", "broken link", "device"])
def test_what_is_no_file_is_named(kind, tmp_path, capsys):
    root = make_image_folder(tmp_path, train=9, val=6)
    path = odd_file(root / "val" / "ant" / "x.jpg", kind)
    with pytest.raises(UnreadableImage, match=r"ant/x\.jpg: cannot be read as an image"):
        read_image(path, str(path))
    arguments = {"data_set": "IMNET", "data_path": root, "input_size": 32, "batch_size": 4, "epochs": 1}
    # a folder may have any name, as in torchvision
    assert main.main(quick(**arguments)) == (0 if kind == "folder" else 1)
    assert ("ant/x.jpg: cannot be read" in capsys.readouterr().err) == (kind != "folder")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    assert images.MAX_PIXELS == Image.MAX_IMAGE_PIXELS == 89_478_485
    width = 9500
    for height, fits in ((images.MAX_PIXELS // width, True), (images.MAX_PIXELS // width + 1, False)):
        Image.new("1", (width, height)).save(tmp_path / "large.png")
        if fits:
            assert read_image(tmp_path / "large.png", "large.png").size == (width, height)
            continue
        with pytest.raises(UnreadableImage, match=r"large\.png: cannot be read .*9500x9419 are more than 89,478,485"):
            read_image(tmp_path / "large.png", "large.png")
        # also where another library has switched Pillow's own limit off
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        with pytest.raises(UnreadableImage, match="89,478,485"):
            read_image(tmp_path / "large.png", "large.png")


def test_a_program_is_no_image(tmp_path, monkeypatch):
    """Pillow starts Ghostscript for EPS, which is a program in PostScript, whatever the suffix."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    path = tmp_path / "x.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UnreadableImage, match=r"x\.jpg"):
        read_image(path, str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "ppm", "pgm", "gif", "jp2"])
def test_formats_that_are_read(suffix, tmp_path):
    pixels = np.full((8, 9, 3), 128, np.uint8)
    image = Image.fromarray(pixels)
    (image.convert("L") if suffix == "pgm" else image).save(tmp_path / f"x.{suffix}")
    assert np.abs(np.asarray(read_image(tmp_path / f"x.{suffix}", "x")).astype(int) - 128).max() < 3


@pytest.mark.timeout(60)
def test_a_small_file_of_many_pixels_takes_no_time(tmp_path):
    """The size that a header claims is refused before anything is decoded."""
    header = b"P6 4000000000 4000000000 255\n"
    (tmp_path / "x.ppm").write_bytes(header)
    start = time.monotonic()
    with pytest.raises(UnreadableImage, match=r"x\.ppm"):
        read_image(tmp_path / "x.ppm", "x.ppm")
    assert time.monotonic() - start < 2


@pytest.fixture
def checked(capsys):
    """The exit code of check_data.py and the lines that it prints."""

    def run(*arguments):
        capsys.readouterr()
        code = check_data.main([*map(str, arguments), "--num_workers", "2"])
        captured = capsys.readouterr()
        return code, captured.out.splitlines() + captured.err.splitlines()

    return run


def test_check_data_names_what_is_bad(tmp_path, checked):
    root = make_image_folder(tmp_path / "data", train=9, val=6)
    assert checked(root) == (0, ["15 images, 0 bad"])
    half, pipe = root / "train" / "bee" / "1.JPEG", root / "val" / "ant" / "pipe\x1b[31m.jpg"
    half.write_bytes(half.read_bytes()[:300])
    os.mkfifo(pipe)
    (root / "val" / "ant" / "page.png").write_text("<html></html>")
    code, lines = checked(root)
    assert code == 1 and lines[-1] == "17 images, 3 bad"
    assert [line for line in lines if line.startswith(f"{half}: cannot be read as an image")]
    assert [line for line in lines if r"pipe\x1b[31m.jpg: cannot be read as an image (it is no regular file)" in line]
    assert [line for line in lines if "page.png: cannot be read" in line]


def test_check_data_compares_checksums(tmp_path, checked):
    root = make_image_folder(tmp_path / "data", train=9, val=6)
    for name in ("a b.jpg", "back\\slash.jpg", "line\nbreak.jpg", "=1+1.jpg", os.fsdecode(b"\xff.jpg")):
        shutil.copy(root / "val/ant/0.JPEG", root / "val" / "ant" / name)
    target = tmp_path / "list"
    assert checked(root, "--sha256", target) == (0, ["20 images, 0 bad"])
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "--strict", target], cwd=root, check=True)
    assert checked(root, "--verify", target) == (0, ["20 images, 0 bad"])
    # a flipped bit that the decoder does not notice
    flipped, moved = root / "train" / "ant" / "0.JPEG", root / "train" / "bee" / "1.JPEG"
    content = bytearray(flipped.read_bytes())
    for position in range(len(content) // 2, len(content)):
        content[position] ^= 1
        flipped.write_bytes(content)
        if checked(root)[0] == 0:
            break
        content[position] ^= 1
    moved.rename(moved.with_name("other.JPEG"))
    code, lines = checked(root, "--verify", target)
    assert code == 1 and sorted(lines) == sorted(
        [
            f"{flipped}: its SHA-256 is not that of {target}", f"{moved.with_name('other.JPEG')}: not in {target}",
            f"train/bee/1.JPEG: in {target}, and not in {root}", "20 images, 3 bad",
        ]
    )  # fmt: skip
    flipped.write_bytes(b"")
    assert checked(root, "--verify", target)[1][-1] == "20 images, 3 bad"


def test_check_data_refuses(tmp_path, checked):
    root = make_image_folder(tmp_path / "data", train=3, val=3)
    (tmp_path / "bad").write_text("0123  a.jpg\n")
    os.mkfifo(tmp_path / "pipe")
    for arguments, part in (
        ((tmp_path / "missing",), "missing: no such folder"),
        ((tmp_path / "bad",), "bad: no such folder"),
        ((root, "--verify", tmp_path / "bad"), "bad: line 1 is not one of sha256sum"),
        ((root, "--verify", tmp_path / "missing"), "missing: no such list"),
        ((root, "--verify", tmp_path / "pipe"), "pipe: no such list"),
        ((root, "--sha256", tmp_path / "no" / "list"), "there is no folder"),
        ((root, "--sha256", root / "val" / "ant" / "0.JPEG"), "which is read"),
        ((root, "--sha256", tmp_path / "x", "--verify", tmp_path / "x"), "not allowed with"),
        ((root, "--wrong"), "--wrong"),
    ):
        code, lines = checked(*arguments)
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and part in lines[0], lines
    (tmp_path / "empty").mkdir()
    assert checked(tmp_path / "empty")[0] == 2
