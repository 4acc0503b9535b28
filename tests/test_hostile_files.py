"""Files that somebody made to do harm: none runs code, fills the memory or the disk, hangs, or ends in a traceback."""

import collections
import hashlib
import http.server
import io
import json
import os
import pickle
import resource
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile

import pytest
import torch
from faults import measured
from helpers import KW, ROOT, finish, quick, words

import main
from checkpoints import read
from models import build_model, download
from models.config import ConfigError, read_config
from models.download import parse_url

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")
TRAP = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
DIGEST = "0123456789abcdef" * 4


def refused(capsys, arguments):
    """The one line of a refused run."""
    assert main.main([str(word) for word in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# ---------------------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    "url, part",
    [
        ("http://example.org/model-0123abcd.pth", "use https://"),
        ("http://127.0.0.1.example.org/model-0123abcd.pth", "use https://"),
        ("http://127.0.0.2/model-0123abcd.pth", "use https://"),
        ("HTTP://EXAMPLE.ORG/model-0123abcd.pth", "use https://"),
        ("https://example.org/model.pth", "append #sha256="),
        ("https://example.org/model-0123abc.pth", "append #sha256="),
        ("https://example.org/model-0123abcd/model.pth", "append #sha256="),
        (f"https://example.org/model.pth#sha256={DIGEST[1:]}", "append #sha256="),
        ("https://example.org/model-0123abcd.pth#sha256=", "append #sha256="),
        (f"https://example.org/model.pth#md5={DIGEST}", "append #sha256="),
        ("http://localhost:8000/model.pth", "append #sha256="),
        ("ftp://example.org/model-0123abcd.pth", "ftp:// is not supported"),
        ("file:///etc/passwd", "file:// is not supported"),
        ("data://x/model-0123abcd.pth", "data:// is not supported"),
        ("https:///model-0123abcd.pth", "no host"),
        ("https://name:secret@example.org/model-0123abcd.pth", "a password"),
        ("http://127.0.0.1@example.org/model-0123abcd.pth", "a password"),
        ("https://example.org/a b/model-0123abcd.pth", "a character that a URL cannot have"),
        ("https://example.org/\x1b[31m/model-0123abcd.pth", r"\x1b[31m"),
        ("https://example.org:x/model-0123abcd.pth", "not a URL"),
        ("https://[::1/model-0123abcd.pth", "not a URL"),
    ],
)
def test_a_url_without_protection_or_hash_is_refused_at_once(url, part, capsys, monkeypatch):
    monkeypatch.setattr(main, "run", None)
    for option in ("resume", "finetune", "init_static"):
        line = refused(capsys, words(model="kw_test_resnet", **KW, data_set="digits", **{option: url}))
        assert part in line and "download the file, check it, and give its path" in line and "\x1b" not in line
    with pytest.raises(ConfigError, match="give its path"):
        read(url)


@pytest.mark.parametrize(
    "url, digests",
    [
        (f"https://example.org/m.pth?a=b#sha256={DIGEST.upper()}", (DIGEST,)),
        ("https://example.org/model-0123abcd.pth", ("0123abcd",)),
        (f"https://example.org/model-0123abcd.pth#sha256={DIGEST}", (DIGEST, "0123abcd")),
        ("http://[::1]:80/model-0123abcd.pth", ("0123abcd",)),
        ("http://localhost/model-0123abcd.pth", ("0123abcd",)),
    ],
)
def test_a_url_with_a_hash(url, digests):
    assert parse_url(url).digests == digests


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Starts servers on this machine; gives the address of one that answers as the given function does."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    running = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            do_GET = answer

            def log_message(self, *arguments):
                pass

        running.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def kept(folder):
    return [path for path in (folder / "hub").rglob("*") if path.is_file()]


def sends(content, length=True):
    def answer(self):
        self.send_response(200)
        if length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    return answer


def redirects(target):
    def answer(self):
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()

    return answer


def drips(part):
    """One byte after the other for ever, each before a socket would time out."""

    def answer(self):
        self.wfile.write(part)
        for _ in range(200):
            time.sleep(0.05)
            self.wfile.write(b"x")

    return answer


@pytest.mark.parametrize(
    "target", ["http://example.org/model-0123abcd.pth", "ftp://example.org/x", "file:///etc/passwd", "//example.org/x"]
)
def test_a_redirect_to_an_unprotected_server_is_not_followed(target, serve, tmp_path):
    with pytest.raises(ConfigError, match=r"model-0123abcd\.pth.* cannot be downloaded: .*(not https|not allowed)"):
        read(f"{serve(redirects(target))}/model-0123abcd.pth")
    assert not kept(tmp_path)


def test_a_redirect_never_leaves_https():
    follow = download._Redirects().redirect_request
    start = urllib.request.Request("https://example.org/model-0123abcd.pth")
    for target in ("http://example.org/x", "http://127.0.0.1/x"):
        with pytest.raises(urllib.error.URLError, match="not https"):
            follow(start, None, 302, "Found", {}, target)
    assert follow(start, None, 302, "Found", {}, "https://cdn.example.org/x").full_url == "https://cdn.example.org/x"


@pytest.mark.parametrize(
    "part",
    [b"", b"HTTP/1.1 200 OK\r\nX-A: ", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"],
    ids=["status", "header", "body", "long body", "chunk"],
)  # fmt: skip
def test_a_server_that_drips_holds_nobody(part, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        read(f"{serve(drips(part))}/model-0123abcd.pth")
    assert time.monotonic() - start < 3
    assert not kept(tmp_path)


def test_what_differs_from_its_hash_is_never_kept(serve, tmp_path, monkeypatch):
    path, url = tmp_path / "good.pth", f"{serve(sends(b'other'))}/good.pth#sha256="
    torch.save({"model": {}}, path)
    good = url + hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=r"good\.pth.* its SHA-256 is d9298a10.*, not "):
        read(good)
    with pytest.raises(ConfigError, match="not a checkpoint"):
        read(url + hashlib.sha256(b"other").hexdigest())
    # of the two promised hashes both count
    with pytest.raises(ConfigError, match="its SHA-256 is"):
        read(good.replace("/good.pth", "/good-0123abcd.pth"))
    monkeypatch.setattr(download, "MAX_BYTES", 3)
    with pytest.raises(ConfigError, match="more than 3 bytes"):
        read(good)
    assert [path.read_bytes() for path in kept(tmp_path)] == [b"other"]


def test_a_kept_copy_that_changed_is_never_read(serve, tmp_path):
    torch.save({"model": {}}, tmp_path / "good.pth")
    content = [(tmp_path / "good.pth").read_bytes()]
    url = f"{serve(lambda self: sends(content[0])(self))}/x.pth#sha256={hashlib.sha256(content[0]).hexdigest()}"
    assert read(url) == {"model": {}}
    torch.save({"model": {"weight": torch.ones(1)}}, kept(tmp_path)[0])
    content[0] = b"gone"
    with pytest.raises(ConfigError, match="its SHA-256 is"):
        read(url)


# ------------------------------------------------------------------------------------------------------ archives


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


# ------------------------------------------------------------------------------------------------------- configs

# what is wrong -> words of a command line, with FOLDER for one with the files of `bad_files`, and what the error names
MISTAKES = {
    "unknown key": (["unknown.json"], '"batch_sise"; did you mean "batch_size"?'),
    "wrong type": (["type.json"], '"epochs"'),
    "NaN": (["nan.json"], "nan.json: NaN"),
    "Infinity": (["infinity.json"], "infinity.json: -Infinity"),
    "twice": (["twice.json"], '"lr" is given twice'),
    "negative": (["negative.json"], '"batch_size"'),
    "huge integer": (["integer.json"], '"epochs"'),
    "integer of a thousand digits": (["digits.json"], '"seed"'),
    "integer of too many digits": (["long.json"], "long.json: not valid JSON"),
    "huge fraction": (["fraction.json"], '"lr"'),
    "byte order mark": (["mark.json"], "mark.json: begins with a byte order mark"),
    "UTF-16": (["utf16.json"], "utf16.json: not UTF-8"),
    "10 MB": (["large.json"], "large.json: larger than"),
    "deep": (["deep.json"], "deep.json"),
    "deep in a value": (["value.json"], '"lr"'),
    "lone surrogate": (["surrogate.json"], '"output_dir"'),
    "zero byte": (["zero.json"], '"output_dir"'),
    "empty": (["empty.json"], "empty.json"),
    "list": (["list.json"], "list.json: the top level"),
    "climbs": (["climbs.json"], '"finetune" climbs up'),
    "URL": (["url.json"], '"finetune" is a URL'),
    "recipe elsewhere": (["recipe.json"], '"recipe"'),
    "missing": (["missing.json"], "missing.json: no such config file"),
    "missing above": (["../missing.json"], "../missing.json: no such config file"),
    "folder": (["folder.json"], "folder.json: not a file"),
    "pipe": (["pipe.json"], "pipe.json: not a file"),
    "link to itself": (["loop.json"], "loop.json: no such config file"),
    "endless device": (["/dev/zero"], "/dev/zero: not a file"),
    "no name": ([""], "no such config file"),
    "a name of 5000 letters": (["x" * 5000], "xxx: no such config file"),
    "unknown option": (["good.json", "--batch-sise", "3"], 'did you mean "--batch_size"'),
    "option without a value": (["good.json", "--lr"], "--lr"),
    "option that is NaN": (["good.json", "--lr", "nan"], "--lr"),
    "negative option": (["good.json", "--epochs", "-3"], "--epochs"),
    "unknown recipe": (["good.json", "--recipe", "../deit"], "--recipe"),
    "missing weights": (["good.json", "--finetune", "../missing.pth"], "--finetune ../missing.pth"),
    "a pipe for weights": (["good.json", "--resume", "FOLDER/pipe.json"], "pipe.json: no such file"),
    "missing data": (["good.json", "--data_set", "IMNET", "--data_path", "../missing"], "--data_path ../missing"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    texts = {
        "good": "{}", "unknown": '{"batch_sise": 8}', "type": '{"epochs": "many"}', "nan": '{"lr": NaN}',
        "infinity": '{"lr": -Infinity}', "twice": '{"lr": 1, "lr": 2}', "negative": '{"batch_size": -8}',
        "integer": '{"epochs": 9223372036854775808}', "digits": '{"seed": ' + "9" * 1000 + "}",
        "long": '{"seed": ' + "9" * 100_000 + "}", "fraction": '{"lr": 1e400}', "mark": "\ufeff{}",
        "large": " " * 10_000_000 + "{}", "deep": "[" * 100_000, "value": '{"lr": ' + "[" * 900 + "]" * 900 + "}",
        "surrogate": '{"output_dir": "\\ud800"}', "zero": '{"output_dir": "a\\u0000"}', "empty": "", "list": "[]",
        "climbs": '{"finetune": "../weights.pth"}', "url": '{"finetune": "https://example.org/x-0123abcd.pth"}',
        "recipe": '{"recipe": "../recipes/deit"}',
    }  # fmt: skip
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    (folder / "utf16.json").write_bytes("{}".encode("utf-16"))
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / "loop.json").symlink_to("loop.json")
    return folder


def words_of(case, folder):
    (config, *rest), part = MISTAKES[case]
    config = f"{folder}/{config}" if config.endswith(".json") else config
    return ["--kw_config", config, *(word.replace("FOLDER", str(folder)) for word in rest)], part


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_refused_before_anything_slow(case, bad_files, capsys, monkeypatch):
    monkeypatch.setattr(main, "run", None)
    arguments, part = words_of(case, bad_files)
    start = time.process_time()
    assert part in refused(capsys, arguments)
    assert time.process_time() - start < 1
    measured("F26", "38 of 38 refused by key, each mistake alone")


def test_a_mistake_is_refused_without_assertions_too(bad_files):
    """All of them by one process of python -O, which leaves out every `assert`."""
    cases = {case: words_of(case, bad_files) for case in MISTAKES}
    code = "import json, sys, main; main.run = None; print([main.main(words) for words in json.loads(sys.argv[1])])"
    given = json.dumps([arguments for arguments, _ in cases.values()])
    done = finish([sys.executable, "-O", "-c", code, given], 100, {"OMP_NUM_THREADS": "1"})
    assert done.stdout == f"{[2] * len(cases)}\n", done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(cases)
    for line, (case, (_, part)) in zip(lines, cases.items()):
        assert line.startswith("error: ") and part in line, case
    measured("F29", "the mistakes of F26 are refused")


@pytest.mark.slow
@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_refused_in_three_seconds(case, bad_files):
    """As a user starts it; the time that other processes of the machine take does not count."""
    arguments, part = words_of(case, bad_files)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = finish([sys.executable, ROOT / "main.py", *arguments], 60, {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and part in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


# ---------------------------------------------------------------------------------------------------------- code


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def evil_checkpoint(path, target, slot, legacy):
    model = build_model({"model": "test_resnet"}, num_classes=10)
    content = {"model": model.state_dict(), "args": {}, "optimizer": {}, "rng": [], "epoch": 0}
    content[slot] = {**content[slot], "x": Evil(target)} if isinstance(content[slot], dict) else [Evil(target)]
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def arguments_of(way, path, serve):
    """Options of a run that reads a checkpoint in one of the ways that there are."""
    if way == "output_dir":
        (path.parent / "out").mkdir()
        shutil.copy(path, path.parent / "out" / "checkpoint-0.pth")
        return quick(output_dir=path.parent / "out")
    if way == "url":
        content = path.read_bytes()
        url = f"{serve(sends(content))}/{path.name}#sha256={hashlib.sha256(content).hexdigest()}"
        return quick(resume=url, eval=True)
    dynamic = {"model": "kw_test_resnet", **KW} if way == "init_static" else {}
    return quick(**dynamic, **{way: path})


WAYS = ("resume", "finetune", "init_static", "output_dir", "url")
SLOTS = ("model", "args", "optimizer", "rng")


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("way", ("init_static", "output_dir", "url"))
def test_code_in_a_checkpoint_never_runs(way, legacy, slot, tmp_path, serve, monkeypatch, capsys):
    for name, value in TRAP.items():
        monkeypatch.setenv(name, value)
    path = evil_checkpoint(tmp_path / "evil.pth", tmp_path / "ran", slot, legacy)
    line = refused(capsys, arguments_of(way, path, serve))
    assert ("evil.pth" if way != "output_dir" else str(tmp_path / "out")) in line
    assert not (tmp_path / "ran").exists()
    measured("F10", "never ran, in this process")
    measured("F12", "never ran, in this process")


@pytest.mark.slow
@pytest.mark.parametrize("trap", [{}, TRAP], ids=["plain", "trap"])
@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("way", WAYS)
def test_code_in_a_checkpoint_never_runs_in_a_process(way, legacy, slot, trap, tmp_path, serve):
    path = evil_checkpoint(tmp_path / "evil.pth", tmp_path / "ran", slot, legacy)
    arguments = arguments_of(way, path, serve)
    environment = {"OMP_NUM_THREADS": "1", "TORCH_HOME": str(tmp_path / "hub"), **trap}
    done = finish([sys.executable, ROOT / "main.py", *arguments], 60, environment)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and ("evil.pth" if way != "output_dir" else str(tmp_path / "out")) in lines[0]
    assert not (tmp_path / "ran").exists()
    measured("F12", "never ran, with and without the variable")


def test_code_in_texts_of_a_checkpoint_never_runs(tmp_path, capsys, monkeypatch):
    """Texts stay texts: a config in Python, what hydra would call, imports, templates."""
    monkeypatch.chdir(tmp_path)
    call = "__import__('os').system('touch ran')"
    texts = {
        "meta": {"config": f"import os\nos.system('touch {tmp_path}/ran')\n"},
        "args": {"_target_": "os.system", "_args_": ["touch ran"], "custom_imports": {"imports": ["antigravity"]}},
        "hyper_parameters": f"!!python/object/apply:os.system ['touch {tmp_path}/ran']",
        "__reduce__": call,
    }
    state = build_model({"model": "test_resnet"}, num_classes=10).state_dict()
    torch.save({"model": state, **texts}, "texts.pth")
    assert main.main(quick(eval=True, resume=tmp_path / "texts.pth")) == 0
    # of these options each one that is read is checked as in a config
    for name, value in (("model", call), ("opt", call), ("aa", f"{call}-m9"), ("layers", [call]), ("data_set", call)):
        args = {"model": "test_resnet", "data_set": "digits", "input_size": 16, name: value, "given": ["model", name]}
        torch.save({"model": state, "args": args}, "texts.pth")
        capsys.readouterr()
        assert main.main(words(resume=tmp_path / "texts.pth", device="cpu", num_workers=0, epochs=1)) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and "antigravity" not in sys.modules
    measured("F11", "never ran")


@pytest.mark.parametrize(
    "key, value",
    [
        ("_target_", "os.system"),
        ("custom_imports", {"imports": ["antigravity"]}),
        ("model", "__import__('os').system('touch ran')"),
        ("opt", "torch.optim.SGD"),
        ("data_set", "__import__('os')"),
        ("layers", {"_target_": "os.system"}),
        ("model", {"_target_": "os.system", "_args_": ["touch ran"]}),
    ],
)
def test_code_in_a_config_is_refused(key, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=key):
        read_config({key: value})
    assert os.listdir(tmp_path) == [] and "antigravity" not in sys.modules
