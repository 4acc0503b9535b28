"""URLs of weights: refused, redirected, slow and changed downloads."""

import hashlib
import time
import urllib.error
import urllib.request

import pytest
import torch
from helpers import KW, refused, words
from servers import sends

import main
from checkpoints import read
from models import download
from models.config import ConfigError
from models.download import parse_url

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")
DIGEST = "0123456789abcdef" * 4


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


def kept(folder):
    return [path for path in (folder / "hub").rglob("*") if path.is_file()]


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
