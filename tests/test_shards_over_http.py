"""WebDataset shards over http: they are those of the folder, each fetched once, and a broken one is named."""

import http.server
import socket
import threading

import pytest
import torch
from helpers import refused
from servers import folder_of, served
from shard_files import everything, make_shards, make_table, on_shards, options

import main
from datasets import make_data
from loading import fetching
from models.config import ConfigError

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, and no patience."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(fetching, "SECONDS", 0.3)
    return tmp_path / "hub/shards"


def kept(cache):
    return sorted(path.name.partition("-")[2] for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_shards_over_http_are_those_of_the_folder(shards, tmp_path, cache):
    """Each is fetched once, by a table and by a pattern."""
    root = make_table(make_shards(tmp_path / "table"))
    local = [everything(make_data(options(shards), is_train)) for is_train in (True, False)]
    asked = []
    with served(folder_of(root, asked)) as url:
        for _ in range(2):
            assert [everything(make_data(options(url + "/"), is_train)) for is_train in (True, False)] == local
        names = [f"train-000{shard}.tar" for shard in range(3)] + ["val-0000.tar", "val-0001.tar"]
        assert sorted(asked) == ["_info.json"] * 4 + names and kept(cache) == names
        args = options(url + "/train-{0000..0002}.tar", eval_data_path=url + "/val-{0000..0001}.tar")
        assert [everything(make_data(args, is_train)) for is_train in (True, False)] == local
        assert len(asked) == 4 + 5


def test_training_over_http(shards, cache, capsys):
    with served(folder_of(shards)) as url:
        pattern = {"data_path": url + "/train-{0000..0002}.tar", "eval_data_path": url + "/val-{0000..0001}.tar"}
        assert main.main(on_shards(url, **pattern)) == 0
        assert "fetching 3 of 3 shards" in capsys.readouterr().out
        line = refused(capsys, on_shards(url))
        assert "_info.json" in line and url + "/train-{0000..0012}.tar" in line
        line = refused(capsys, on_shards(url, data_path=url + "/train-{0000..0003}.tar", disable_eval=True))
        assert f"{url}/train-0003.tar: " in line and "404" in line


class Half(http.server.BaseHTTPRequestHandler):
    """Promises a whole shard, sends half of it, and closes the connection or falls silent."""

    content, silent, promises = b"", False, True
    done = threading.Event()

    def do_GET(self):
        self.send_response(200)
        if self.promises:
            self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) // 2])
        if self.silent:
            self.done.wait(20)


@pytest.mark.parametrize("promises", [True, False])
def test_truncated_answer_is_refused_and_not_kept(shards, cache, capsys, monkeypatch, promises):
    monkeypatch.setattr(Half, "content", (shards / "train-0000.tar").read_bytes())
    monkeypatch.setattr(Half, "promises", promises)
    with served(Half) as url:
        line = refused(capsys, on_shards(url, data_path=url + "/train-{0000..0001}.tar"))
    assert f"{url}/train-000" in line and ("bytes came" if promises else "truncated") in line
    assert kept(cache) == []


def test_silent_server_ends_with_a_line(shards, cache, capsys, monkeypatch):
    monkeypatch.setattr(Half, "content", (shards / "train-0000.tar").read_bytes())
    monkeypatch.setattr(Half, "silent", True)
    with served(Half) as url:
        for path in ("/train-0000.tar", ""):
            assert "was silent for 0.3 s" in refused(capsys, on_shards(url + path, disable_eval=True))
        Half.done.set()
    # one that does not even answer
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert "was silent for 0.3 s" in refused(capsys, on_shards(url + "/a.tar", disable_eval=True))
    assert "cannot be fetched" in refused(capsys, on_shards(url + "/a.tar", disable_eval=True))
    assert kept(cache) == []


def test_damaged_copy_in_the_cache_is_named(shards, cache, capsys):
    with served(folder_of(shards)) as url:
        args = options(url + "/train-0000.tar")
        make_data(args, True)
        (copy,) = cache.glob("*.tar")
        copy.write_bytes(copy.read_bytes()[:1000])
        with pytest.raises(ConfigError, match=f"{url}/train-0000.tar: it is truncated.*delete its copy in {cache}"):
            make_data(args, True)


def test_two_at_once_fetch_a_shard_once(shards, cache):
    results, asked = [], []
    with served(folder_of(shards, asked)) as url:
        args = options(url + "/train-{0000..0002}.tar")
        threads = [threading.Thread(target=lambda: results.append(make_data(args, True))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(asked) == ["train-0000.tar", "train-0001.tar", "train-0002.tar"]
    assert len(results) == 4 and all((data.labels == results[0].labels).all() for data in results)
