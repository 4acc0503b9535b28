"""WebDataset shards: which samples are read, in which order, and which shards are refused."""

import contextlib
import pickle
import tarfile

import numpy as np
import pytest
import torch
from helpers import read_log, refused, words
from shard_files import (
    CLASSES,
    everything,
    independent,
    make_shards,
    make_table,
    on_shards,
    options,
    png,
    process,
    samples,
    write_tar,
)
from torchvision.transforms.functional import pil_to_tensor

import main
from checkpoints import read
from datasets import make_data, make_loaders
from loading.images import UnreadableImage
from loading.sampling import TrainSampler
from loading.shard_lists import expand, find_shards
from loading.shards import WINDOW
from models.config import ConfigError

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


# ------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_tarfile(tmp_path, tar_format):
    files = samples(0, 5)
    # kinds of long names: two parts in ustar, a header of their own in the others
    long = "a" * 60 + "/" + "b" * 60
    files[f"{long}.png"], files[f"{long}.cls"] = png(70), b" 2\n"
    if tar_format != tarfile.USTAR_FORMAT:
        files["ü" * 150 + ".png"], files["ü" * 150 + ".cls"] = png(71), b"0"
    folder = tarfile.TarInfo("im")
    folder.type = tarfile.DIRTYPE
    # what belongs to no sample is left out
    files = {
        "im": folder,
        "README": b"x",
        "im/0001.seg.png": b"mask",
        "im/._0001.png": b"mac",
        "im/1.txt": b"",
        **files,
    }
    path = write_tar(tmp_path / "train-0.tar", files, tar_format)
    data = make_data(options(tmp_path), True)
    expected = independent([path])
    assert everything(data) == expected and len(expected) == 6 + (tar_format != tarfile.USTAR_FORMAT)


def test_labels_in_json(tmp_path):
    files = {"a.png": png(0), "a.json": b'{"label": 2, "other": 1}', "b.JPG": png(1), "b.cls": b"1", "b.json": b"{"}
    write_tar(tmp_path / "train-0.tar", files)
    assert make_data(options(tmp_path), True).labels.tolist() == [2, 1]
    # a table says which entry; then no .cls is read
    make_table(tmp_path, (1,), alt_label="other")
    write_tar(tmp_path / "train-0000.tar", {"a.png": png(0), "a.json": b'{"label": 2, "other": 1}', "a.cls": b"0"})
    assert make_data(options(tmp_path), True).labels.tolist() == [1]


def test_index_is_small_and_survives_pickling(shards):
    data = make_data(options(shards), True)
    data.transform = pil_to_tensor
    assert data.offsets.itemsize + data.sizes.itemsize + data.labels.itemsize == 16
    first = [data[index] for index in range(13)]
    assert data._files
    # the copy opens the files itself, as a spawned loader process does
    copy = pickle.loads(pickle.dumps(data))
    assert not copy._files
    assert all(
        torch.equal(copy[index][0], image) and copy[index][1] == label for index, (image, label) in enumerate(first)
    )


def test_few_files_are_open_at_once(tmp_path):
    make_shards(tmp_path, train=[1] * (2 * WINDOW + 5))
    data = make_data(options(tmp_path), True)
    assert everything(data) == independent(sorted(tmp_path.glob("train-*.tar")))
    assert len(data._files) == 2 * WINDOW


# ------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    "names, data_set",
    [
        (("train-{:04d}.tar", "val-{:04d}.tar"), "wds/"),
        (("train-{:04d}.tar", "validation-{:04d}.tar"), "wds/any"),
        (("train/{}.tar", "val/{}.tar"), "wds/"),
        (("train/part_{}.tar", "validation/part_{}.tar"), "wds/x"),
        (("in1k[a]-train-{:04d}.tar", "in1k[a]-validation-{:02d}.tar"), "wds/in1k[a]"),
    ],
)
def test_shards_are_found_by_their_names(tmp_path, names, data_set):
    make_shards(tmp_path, names=names)
    args = options(tmp_path, data_set=data_set)
    for is_train, name in zip((True, False), names):
        paths = [tmp_path / name.format(shard) for shard in range(3 if is_train else 2)]
        assert find_shards(args, is_train).names == list(map(str, paths))
        assert everything(make_data(args, is_train)) == independent(paths)


def test_shards_of_a_table_and_of_a_pattern(tmp_path):
    make_table(make_shards(tmp_path))
    # not in the table
    make_shards(tmp_path, train=(0, 0, 0, 2), val=())
    train, val = (sorted(map(str, tmp_path.glob(f"{name}-000[0-2].tar"))) for name in ("train", "val"))
    args = options(tmp_path)
    (tmp_path / "train-0000.tar").unlink()
    (tmp_path / "train-0001.tar").unlink()
    (tmp_path / "train-0002.tar").unlink()
    make_shards(tmp_path, val=())
    assert (find_shards(args, True).names, find_shards(args, False).names) == (train, val)
    assert len(make_data(args, True)) == 13
    args = options(tmp_path / "train-{0001..0002}.tar", eval_data_path=str(tmp_path / "{val}-{0000,0001}.tar"))
    assert (find_shards(args, True).names, find_shards(args, False).names) == (train[1:], val)
    args = options(train[0], eval_data_path=str(tmp_path))
    assert (find_shards(args, True).names, find_shards(args, False).names) == (train[:1], val)
    with pytest.raises(ConfigError, match="--eval_data_path"):
        find_shards(options(train[0]), False)


def test_patterns():
    assert expand("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand("{a,b-x}{1..2}.tar") == ["a1.tar", "a2.tar", "b-x1.tar", "b-x2.tar"]
    assert expand("x.tar") == ["x.tar"]
    for pattern in ("{1..2.tar", "1..2}.tar", "{{1..2},3}.tar", "{2..1}.tar", "{0..99999999}.tar", "{a,a}.tar"):
        with pytest.raises(ConfigError, match=r"\.tar: "):
            expand(pattern)
    with pytest.raises(ConfigError, match="more than"):
        expand("{000..999}{000..999}{0..9}.tar")


# ------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_once_at_any_number_of_processes(shards, world):
    """In training, images are left out only where they do not fill all processes; augmentation depends on the image."""
    seen, kept = {}, {}
    for workers in (0, 2):
        for rank in range(world):
            args = options(shards, num_workers=workers, batch_size=1)
            loaders = make_loaders(args, {}, process(rank, world))
            if workers:
                loaders.train = torch.utils.data.DataLoader(
                    loaders.train.dataset, 1, sampler=loaders.train.sampler, num_workers=workers, drop_last=True
                )
            loaders.set_epoch(1)
            batches = list(loaders.train)
            assert len(batches) == 13 // world
            positions = list(loaders.train.sampler)
            for (_, index), (image, label) in zip(positions, batches):
                assert kept.setdefault(index, image).equal(image) and label == loaders.train.dataset.data.labels[index]
                seen[workers, index] = seen.get((workers, index), 0) + 1
            assert list(loaders.evaluation.sampler) == list(range(rank, 7, world))
        assert len([key for key in seen if key[0] == workers]) == 13 // world * world and set(seen.values()) == {1}
    # no two of the augmented images are equal
    assert len({image.numpy().tobytes() for image in kept.values()}) == len(kept)


def test_images_are_shuffled_among_few_shards(tmp_path):
    count = 3 * WINDOW + 1
    make_shards(tmp_path, train=[3] * count)
    data = make_data(options(tmp_path), True)
    orders = []
    for epoch in range(2):
        sampler = TrainSampler(len(data), 0, 1, 5, data.order)
        sampler.epoch = epoch
        order = [index for _, index in sampler]
        assert sorted(order) == list(range(3 * count))
        of_shards = np.array(order) // 3
        windows = [of_shards[start : start + 3 * WINDOW] for start in range(0, len(order), 3 * WINDOW)]
        assert [len(set(window)) for window in windows] == [WINDOW] * 3 + [1]
        assert all(len(set(window[: 2 * WINDOW])) > WINDOW // 2 for window in windows[:3])
        orders.append((order, {frozenset(window) for window in windows}))
    assert orders[0][0] != orders[1][0] and not orders[0][1] & orders[1][1]


# ------------------------------------------------------------------------------------------------- runs


def test_training_resuming_and_evaluating(shards, tmp_path, capsys):
    out, broken = tmp_path / "out", tmp_path / "broken"
    assert main.main(on_shards(shards, epochs=2, output_dir=out)) == 0
    assert "3 classes" in capsys.readouterr().out
    assert [line["epoch"] for line in read_log(out)] == [0, 1]
    # a resumed run is the unbroken one
    assert main.main(on_shards(shards, epochs=2, output_dir=broken, num_workers=1)) == 0
    (broken / "checkpoint-1.pth").unlink()
    assert main.main(on_shards(shards, epochs=2, output_dir=broken)) == 0
    states = [read(folder / "checkpoint-1.pth") for folder in (out, broken)]
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())
    # all images are counted, whatever classes the shards to evaluate have
    capsys.readouterr()
    part = words(eval=True, resume=out / "checkpoint-1.pth", data_path=shards, device="cpu", num_workers=0)
    assert main.main(part) == 0
    assert f"* Acc@1 {read_log(out)[1]['test_acc1']:.3f}" in capsys.readouterr().out
    few = tmp_path / "few"
    write_tar(few / "val-0.tar", {"a.png": png(0), "a.cls": b"0"})
    assert main.main([*part, "--data_path", str(few)]) == 0
    write_tar(few / "val-0.tar", {"a.png": png(0), "a.cls": b"3"})
    assert main.main([*part, "--data_path", str(few)]) == 2
    assert "val-0.tar: a.png: has the label 3" in capsys.readouterr().err


def test_number_of_classes(shards, capsys):
    assert make_loaders(options(shards), {}, process()).nb_classes == CLASSES
    assert make_loaders(options(shards, nb_classes=9), {"nb_classes": 9}, process()).nb_classes == 9
    assert main.main(on_shards(shards, nb_classes=2)) == 2
    line = capsys.readouterr().err
    assert "train-0000.tar: im/0002.png: has the label 2" in line and "--nb_classes" in line


def bad_header(content):
    """One wrong bit in the header of the third file."""
    at = [index for index in range(0, len(content), 512) if content[index + 257 : index + 262] == b"ustar"][2]
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def special(kind, **changes):
    info = tarfile.TarInfo("im/odd.png")
    info.type = kind
    for name, value in changes.items():
        setattr(info, name, value)
    return info


SAMPLES = samples(0, 3)
BAD_FILES = {
    "no label": ({**SAMPLES, "x.png": png(0)}, ["x.png has no label"]),
    "no image": ({**SAMPLES, "x.cls": b"1"}, ["x.cls has no image"]),
    "other image": ({**SAMPLES, "x.tif": png(0), "x.json": b'{"label": 1}'}, ["x.json has no image"]),
    "twice": ({**SAMPLES, "im/0001.jpg": png(0)}, ["im/0001.jpg is a second image", "im/0001"]),
    "no integer": ({**SAMPLES, "x.png": png(0), "x.cls": b"cat"}, ["x.cls holds b'cat'", "integer"]),
    "negative": ({**SAMPLES, "x.png": png(0), "x.cls": b"-1"}, ["x.cls holds b'-1'"]),
    "huge label": ({**SAMPLES, "x.png": png(0), "x.cls": b"1000000"}, ["x.cls holds 1000000"]),
    "long label": ({**SAMPLES, "x.png": png(0), "x.cls": b"1" * 65}, ["x.cls has 65 bytes"]),
    "bad json": ({**SAMPLES, "x.png": png(0), "x.json": b"[" * 9999}, ["x.json is no JSON"]),
    "true": ({**SAMPLES, "x.png": png(0), "x.json": b'{"label": true}'}, ["x.json holds True"]),
    "empty image": ({**SAMPLES, "x.png": b"", "x.cls": b"1"}, ["x.png has 0 bytes"]),
    "nothing": ({}, ["holds no images"]),
    "symbolic link": (
        {**SAMPLES, "x": special(tarfile.SYMTYPE, linkname="/etc/passwd")},
        ["odd.png is a symbolic link"],
    ),
    "hard link": ({**SAMPLES, "x": special(tarfile.LNKTYPE, linkname="im/0001.png")}, ["odd.png is a hard link"]),
    "device": ({**SAMPLES, "x": special(tarfile.CHRTYPE)}, ["odd.png is a device"]),
    "pipe": ({**SAMPLES, "x": special(tarfile.FIFOTYPE)}, ["odd.png is a pipe"]),
    "sparse": ({**SAMPLES, "x": special(tarfile.GNUTYPE_SPARSE)}, ["odd.png is a sparse file"]),
    "unknown": ({**SAMPLES, "x": special(b"Z")}, ["odd.png is a member of an unknown type"]),
}
BAD_CONTENT = {
    "truncated in an image": (lambda content: content[: 512 + 100], ["truncated", ".png would end"]),
    "truncated in a header": (lambda content: content[: 1024 + 100], ["truncated"]),
    "truncated after a file": (lambda content: content[:2048], ["truncated", "byte 2048"]),
    "no bytes": (lambda content: b"", ["it is empty"]),
    "HTML": (lambda content: b"<html></html>" * 100, ["it is no uncompressed tar archive"]),
    "damaged header": (bad_header, ["no tar header at byte"]),
    "joined": (lambda content: content + content, ["more follows"]),
    "missing": (lambda content: None, ["No such file"]),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", [*BAD_FILES, *BAD_CONTENT])
def test_bad_shards_are_refused_before_training(tmp_path, capsys, damage, split):
    make_shards(tmp_path)
    path = tmp_path / f"{split}-0001.tar"
    if damage in BAD_FILES:
        files, parts = BAD_FILES[damage]
        write_tar(path, files)
    else:
        change, parts = BAD_CONTENT[damage]
        content = change(path.read_bytes())
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    pattern = {"data_path": tmp_path / "train-{0000..0002}.tar", "eval_data_path": tmp_path / "val-{0000..0001}.tar"}
    line = refused(capsys, on_shards(tmp_path, **pattern))
    assert f"error: {path}: " in line and all(part in line for part in parts), line
    if split == "val":
        assert str(path) in refused(capsys, on_shards(tmp_path, **pattern, eval=True))


@pytest.mark.parametrize("cut", range(0, 6144, 512))
def test_a_tar_cut_anywhere_is_refused(tmp_path, cut):
    content = write_tar(tmp_path / "train-0.tar", samples(0, 3)).read_bytes()
    assert content[6144:].strip(b"\0") == b"" != content[6143 - 512 : 6144].strip(b"\0")
    (tmp_path / "train-0.tar").write_bytes(content[:cut])
    with pytest.raises(ConfigError, match=r"train-0\.tar: "):
        make_data(options(tmp_path), True)


def test_a_changed_header_is_refused(tmp_path):
    """In any of its bytes; but what ends the checksum may be another blank."""
    path = write_tar(tmp_path / "train-0.tar", samples(0, 2))
    content, expected = path.read_bytes(), make_data(options(tmp_path), True)
    at = content.index(b"im/0001.png")
    accepted = []
    for byte in range(at, at + 512):
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 32]) + content[byte + 1 :])
        with contextlib.suppress(ConfigError):
            data = make_data(options(tmp_path), True)
            assert (data.offsets == expected.offsets).all() and (data.labels == expected.labels).all()
            accepted.append(byte - at)
    assert set(accepted) <= {154, 155}


def test_hostile_headers_end_with_an_error(tmp_path):
    """Sizes that no file has, in every notation, and attributes without end."""
    for size in (
        b"-0000000001\0",
        b"\xff" * 12,
        b"\x80" + b"\x7f" * 11,
        b"77777777777\0",
        b"0x00000001\0",
        b"           \0",
    ):
        info = bytearray(tarfile.TarInfo("x.png").tobuf(tarfile.GNU_FORMAT))
        info[124:136] = size.ljust(12, b"\0")
        info[148:156] = b" " * 8
        info[148:156] = b"%06o\0 " % sum(info)
        (tmp_path / "train-0.tar").write_bytes(bytes(info) + b"\0" * 10240)
        with pytest.raises(ConfigError, match=r"x\.png"):
            make_data(options(tmp_path), True)
    for record in (b"5", b"0 path=x\n", b"-9 path=x\n", b"999 path=x\n", b"9" * 30 + b" path=x\n"):
        info = tarfile.TarInfo("attributes")
        info.type, info.size = tarfile.XHDTYPE, len(record)
        content = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
        (tmp_path / "train-0.tar").write_bytes(content + b"\0" * 10240)
        with pytest.raises(ConfigError, match="attributes at byte 512 are damaged"):
            make_data(options(tmp_path), True)


def test_sparse_files_of_pax_are_refused(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "a.png"}
    write_tar(tmp_path / "train-0.tar", {"a.png": info}, tarfile.PAX_FORMAT)
    with pytest.raises(ConfigError, match=r"a\.png is a sparse file"):
        make_data(options(tmp_path), True)


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda root: (root / "train-0001.tar").unlink(), ["no shard 1", "train-0000.tar"]),
        (lambda root: write_tar(root / "train/0.tar", samples(0, 1)), ["both train-*.tar and train/*.tar"]),
        (lambda root: [path.unlink() for path in root.glob("train-*")], ["neither a table", "train-*.tar"]),
        (lambda root: make_table(root, (5, 5, 4)), ["train-0001.tar: holds 4 images", "_info.json says 5"]),
        (lambda root: make_table(root, num_samples=12), ["_info.json", "num_samples", "12"]),
        (lambda root: make_table(root, shard_lengths=[5, 4]), ["_info.json", "shard_lengths"]),
        (lambda root: make_table(root, filenames=["../x.tar"]), ["_info.json", "filenames"]),
        (lambda root: make_table(root, filenames=["a.tar", "a.tar"]), ["_info.json", "filenames"]),
        (lambda root: (root / "info.json").write_text('{"splits": {"test": {}}}'), ["info.json", "train", "only test"]),
        (lambda root: (root / "info.json").write_text("{"), ["info.json: is no JSON"]),
        (lambda root: (root / "info.json").write_text("[]"), ["info.json: is no table"]),
    ],
)
def test_bad_lists_of_shards(tmp_path, capsys, change, parts):
    change(make_shards(tmp_path))
    line = refused(capsys, on_shards(tmp_path))
    assert all(part in line for part in parts), line


def test_shards_that_count_themselves(tmp_path, capsys):
    make_shards(tmp_path, names=("train-{:05d}-of-00004.tar", "val-{:05d}-of-00002.tar"))
    line = refused(capsys, on_shards(tmp_path))
    assert "train-00000-of-00004.tar: is one of 4 shards, but 3 are there" in line


def test_paths_that_hold_no_shards(tmp_path, capsys):
    assert "--data_path" in refused(capsys, on_shards(""))
    assert "no such folder of shards" in refused(capsys, on_shards(tmp_path / "nowhere"))
    assert "s3://" in refused(capsys, on_shards("s3://bucket"))
    assert "http://[" in refused(capsys, on_shards("http://["))
    assert "neither a table" in refused(capsys, on_shards(tmp_path, data_set="wds//etc"))
    (tmp_path / "train-0.tar").mkdir()
    assert "is no regular file" in refused(capsys, on_shards(tmp_path / "train-0.tar", disable_eval=True))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_named(tmp_path, capsys, split, workers):
    make_shards(tmp_path)
    path = tmp_path / f"{split}-0001.tar"
    write_tar(path, {**samples(0, 4), "im/bad.png": png(0)[:100], "im/bad.cls": b"1"})
    assert main.main(on_shards(tmp_path, num_workers=workers)) == 1
    assert f"error: {path}: im/bad.png: cannot be read as an image" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["replaced", "removed", "shorter"])
def test_shard_that_changes_during_the_run_is_named(tmp_path, change):
    make_shards(tmp_path)
    data, path = make_data(options(tmp_path), True), tmp_path / "train-0001.tar"
    if change == "shorter":
        # the file is open already
        data[5]
        with open(path, "r+b") as file:
            file.truncate(600)
    else:
        path.unlink()
        if change == "replaced":
            write_tar(path, samples(50, 4))
    with pytest.raises(UnreadableImage, match=r"train-0001\.tar: "):
        data[6]
