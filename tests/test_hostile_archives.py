"""Checkpoints that somebody made to fill the memory, to hang, or to hold false numbers."""

import collections
import io
import json
import pickle
import time
import zipfile

import pytest
import torch
from helpers import quick, refused

from checkpoints import read
from models.config import ConfigError

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")


def archive(path, pickled, storage=b"\0" * 16, **changes):
    """A checkpoint with this pickle. changes: arguments of `zipfile.ZipFile`."""
    with zipfile.ZipFile(path, "w", **changes) as file:
        for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("data/0", storage), ("version", b"3")):
            file.writestr(f"archive/{name}", content)
    return path


class Storage:
    pass


class Claim:
    """A tensor that is pickled with any numbers; its storage has 4 floats."""

    def __init__(self, size=(4,), stride=(1,), offset=0):
        self.numbers = (offset, size, stride)

    def __reduce__(self):
        empty = collections.OrderedDict()
        return torch._utils._rebuild_tensor_v2, (Storage(), *self.numbers, False, empty)


def pickled(content, numel=4, key="0"):
    """As torch.save pickles; `numel` is what the file claims of the storage."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, key, "cpu", numel) if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    return file.getvalue()


def test_the_made_archive_is_a_checkpoint(tmp_path):
    content = read(archive(tmp_path / "a.pth", pickled({"model": {"weight": Claim()}})))
    assert torch.equal(content["model"]["weight"], torch.zeros(4))


@pytest.mark.parametrize(
    "claim, numel",
    [
        (Claim(size=(-1,)), 4),
        (Claim(size=(2, -2), stride=(1, 1)), 4),
        (Claim(size=(5,)), 4),
        (Claim(size=(2**62,)), 4),
        (Claim(size=(2**64,)), 4),
        (Claim(size=(2**40,), stride=(0,)), 4),
        (Claim(size=(2**31, 2**31), stride=(0, 0)), 4),
        (Claim(stride=(-1,)), 4),
        (Claim(stride=(2**62,)), 4),
        (Claim(offset=-1), 4),
        (Claim(offset=2**62), 4),
        (Claim(size=(0.5,)), 4),
        (Claim(size="x"), 4),
        (Claim(), -4),
        (Claim(), 2**40),
        (Claim(), 2**70),
        (Claim(), "x"),
        (Claim(), None),
    ],
    ids=lambda value: "" if isinstance(value, Claim) else str(value),
)
def test_false_numbers_of_a_tensor(claim, numel, tmp_path):
    """Whether a number is refused or without effect: no traceback, and never more memory than the file is large."""
    path = archive(tmp_path / "odd.pth", pickled({"model": {"weight": claim}}, numel))
    try:
        weight = read(path)["model"]["weight"]
    except ConfigError as error:
        assert "odd.pth" in str(error) and "\n" not in str(error)
    else:
        assert weight.numel() <= 4
    if claim.numbers[1] == (2**40,) or numel in (-4, "x"):
        with pytest.raises(ConfigError):
            read(path)


def test_an_archive_that_would_grow_is_refused(tmp_path):
    bomb = archive(tmp_path / "bomb.pth", pickled({}), b"\0" * 10_000_000, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ConfigError, match=r"bomb\.pth.* compressed entry, archive/data\.pkl"):
        read(bomb)
    bomb = archive(tmp_path / "bomb.pth", pickled({}), compression=zipfile.ZIP_LZMA)
    with pytest.raises(ConfigError, match="compressed entry"):
        read(bomb)


def central(path):
    """The content of an archive, and where its directory begins."""
    content = path.read_bytes()
    return content, content.index(b"PK\x01\x02")


@pytest.mark.parametrize("where", [20, 24, 42], ids=["packed", "unpacked", "offset"])
@pytest.mark.parametrize("value", [0xFFFFFFF0, 0x7FFFFFFF, 0x80000000, 2])
def test_false_numbers_of_an_archive(where, value, tmp_path):
    path = archive(tmp_path / "odd.pth", pickled({"model": {"weight": Claim()}}))
    content, start = central(path)
    start = content.index(b"PK\x01\x02", content.index(b"data/0", start))
    numbers = value.to_bytes(4, "little")
    both = where != 42 and value > 2
    content = content[: start + where] + numbers + content[start + where + 4 :]
    if both:
        content = content[: start + 20] + numbers * 2 + content[start + 28 :]
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"odd\.pth"):
        read(path)


def test_an_archive_that_other_tools_would_read_differently_is_refused(tmp_path):
    path = archive(tmp_path / "a.pth", pickled({}))
    path.write_bytes(b"\x80\x02}." + path.read_bytes())
    with pytest.raises(ConfigError, match="not those of one archive"):
        read(path)
    path = archive(tmp_path / "b.pth", pickled({}))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data.pkl", pickled({"other": 1}))
    with pytest.raises(ConfigError, match="not those of one archive"):
        read(path)


@pytest.mark.parametrize("name", ["hole.pth", "hole.safetensors"])
def test_a_file_of_holes_is_refused_at_once(name, tmp_path):
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 43)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"hole\.\w+' is damaged .* a hole"):
        read(tmp_path / name)
    assert time.monotonic() - start < 2


def safetensors(shape=(1,), offsets=(0, 4)):
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 4


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 8 + b"{}",
        (2**63).to_bytes(8, "little") + b"{}",
        safetensors(shape=(2**63 - 1, 4)),
        safetensors(shape=(-1,)),
        safetensors(offsets=(-4, 0)),
        safetensors(offsets=(0, 2**40)),
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
    ids=["length", "half the range", "shape", "negative shape", "negative offset", "offsets", "deep"],
)
def test_false_numbers_of_safetensors(content, tmp_path):
    (tmp_path / "good.safetensors").write_bytes(safetensors())
    assert read(tmp_path / "good.safetensors")["a"] == 0
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"odd\.safetensors' is not a safetensors file"):
        read(path)


def test_deep_and_endless_content(tmp_path, capsys):
    """Lists in lists, and a list that holds itself."""
    endless, deep = b"]q\x00h\x00a", b"]" * 20_000 + b"a" * 19_999
    for model in (endless, deep):
        path = archive(tmp_path / "odd.pth", b"\x80\x02}X\x05\x00\x00\x00model" + model + b"s.")
        assert "odd.pth" in refused(capsys, quick(eval=True, resume=path))
