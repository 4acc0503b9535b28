"""A detector's training is killed while it saves: every checkpoint can be read, there is one, and the run goes on."""

import json
import sys

import pytest
from faults import measured
from helpers import ROOT, finish

pytest.importorskip("mmdet", reason="requirements-detection.txt is not installed")

import torch

from detection.hooks import remove_stale_files

SAVER = [sys.executable, ROOT / "tests" / "detector_saver.py"]


def saver(*arguments, timeout=300):
    done = finish([*SAVER, *map(str, arguments)], timeout, {"OMP_NUM_THREADS": "1"})
    return done, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("keep", "trials"), [(2, 1), pytest.param(2, 30, marks=SLOW), pytest.param(3, 30, marks=SLOW)])
def test_killed_at_random(keep, trials, tmp_path):
    done, (*rows, end) = saver(tmp_path, keep, 100_000, trials)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(rows) == trials and all(row["killed"] for row in rows)
    assert not any(row["bad"] for row in rows)
    # while one is written there are as many as are kept; and one more, until it is removed
    assert all(keep <= len(row["checkpoints"]) <= keep + 1 for row in rows[1:]) and rows[0]["checkpoints"]
    # what an earlier kill left is removed at the next start
    assert all(len(row["temporary"]) <= 1 for row in rows)
    measured("F27", f"{trials} kills with {keep} files to keep: 0 folders do not resume")
    kept = [f"epoch_{epoch}.pth" for epoch in range(end["last"] - keep + 1, end["last"] + 1)]
    assert end == {"last": end["last"], "checkpoints": sorted(kept), "bad": [], "temporary": []}


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "rename", "unlink"])
def test_killed_at_every_call(call, tmp_path):
    """Killed when it enters the k-th call, for every k of a run of four epochs, which then goes on to its end."""
    keep = 2
    done, rows = saver(tmp_path, keep, 4, call)
    assert done.returncode == 0, done.stderr[-2000:]
    kills, ends, last = rows[:-1:2], rows[1::2], rows[-1]
    assert len(kills) == len(ends) and last["code"] == 0
    for number, (first, end) in enumerate(zip(kills, ends), 1):
        assert first["killed"] and not first["bad"]
        # none before the first is whole
        saved = number // 2 if call == "fsync" else number - 1
        assert len(first["checkpoints"]) >= min(saved, keep)
        assert end["code"] == 0 and not end["temporary"]
        assert end["checkpoints"] == ["epoch_3.pth", "epoch_4.pth"]
    # each save calls fsync twice, for the file and for the folder, rename once, and unlink, too, for its temporary file
    assert len(kills) >= {"fsync": 8, "rename": 4, "unlink": 6}[call]
    measured("F27", f"{len(kills)} kills at {call}: 0 folders do not resume")


def test_stale_files(tmp_path):
    stale = [".epoch_3.pth.123.tmp", ".iter_3000.pth.4.tmp", ".best_coco_bbox_mAP_epoch_2.pth.55.tmp"]
    others = ["epoch_3.pth", ".epoch_3.pth.tmp", ".notes.55.tmp", "epoch_3.pth.5.tmp", ".log.txt.5.tmp"]
    for name in stale + others:
        (tmp_path / name).write_bytes(b"")
    remove_stale_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("note", ["", "missing.pth"], ids=["empty", "missing"])
def test_the_note_of_the_last_checkpoint_does_not_count(note, tmp_path, monkeypatch):
    """Neither with --resume, nor where the config asks for it."""
    from detection import train

    torch.save({"meta": {}, "state_dict": {}}, tmp_path / "epoch_9.pth")
    torch.save({"meta": {}, "state_dict": {}}, tmp_path / "epoch_10.pth")
    (tmp_path / "last_checkpoint").write_text(note)
    seen = []
    monkeypatch.setattr(train.tools, "check", lambda cfg, phases: seen.append((cfg.load_from, cfg.resume)))

    class Stop(Exception):
        pass

    def stop(cfg):
        raise Stop

    monkeypatch.setattr(train.tools, "join", stop)
    config = ROOT / "detection/configs/mini/mask_rcnn_kw1x_resnet10t.py"
    for arguments in (["--resume"], ["--cfg-options", "resume=True"]):
        with pytest.raises(Stop):
            train.train([str(config), "--work-dir", str(tmp_path), *arguments])
    assert seen == [(str(tmp_path / "epoch_10.pth"), True)] * 2
