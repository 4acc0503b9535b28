"""The report of a run, and of several runs beside each other."""

import functools
import json
import os
import re

import numpy as np
import pytest
import report as script
import torch
from browser import opened
from helpers import METHODS, launch, quick, read_log
from torch import nn

import main
import run_logs
from inspection import charts, record, results, runs
from inspection.page import report_page
from models.config import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of KernelWarehouse, whose report has every section."""
    folder = tmp_path_factory.mktemp("report") / "run"
    assert main.main(quick(**METHODS["kw"], epochs=2, output_dir=folder, seed=3)) == 0
    return folder


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "static"
    assert main.main(quick(epochs=2, output_dir=folder)) == 0
    return folder


@pytest.fixture
def refused(refuses):
    return functools.partial(refuses, script)


def content(folder):
    return json.loads((folder / "report.json").read_text())


def test_report_tells_what_the_run_logged(finished):
    log, found = read_log(finished), content(finished)
    single = found["results"]
    assert found["state"] == "finished" and single["count"] == single["total"] == 360
    assert 100 * single["correct"] / 360 == pytest.approx(log[-1]["test_acc1"])
    confusion = {(true, predicted): count for true, predicted, count in single["confusion"]}
    assert sum(confusion.values()) == 360
    assert sum(count for (true, predicted), count in confusion.items() if true == predicted) == single["correct"]
    # the test images of the digits: 35 to 37 of each class
    assert {sum(confusion.get((t, p), 0) for p in range(10)) for t in range(10)} <= {35, 36, 37}
    assert (
        found["facts"]["model"] == "kw_test_resnet" and found["facts"]["parameters"] == f"{log[-1]['n_parameters']:,}"
    )
    assert [picture["name"] for picture in found["pictures"]] == ["warehouses", "cell-usage", "entropy"]
    page = (finished / "report.html").read_text()
    assert f"{log[-1]['best_acc1']:.2f} %" in page and len(page) < 2_000_000
    for title in ("loss", "top-1 accuracy", "learning rate", "weight decay", "gradient norm", "speed", "memory"):
        assert f'aria-label="{title}"' in page, title
    assert all(f'href="{name}"' in page for name in ("log.txt", "checkpoint-best.pth", "times.jsonl"))
    assert not re.search(r'(src|href)="(https?:)?//', page)


def test_times_have_a_row_for_every_logged_step(finished):
    times, steps = ([json.loads(line) for line in open(finished / f"{name}.jsonl")] for name in ("times", "steps"))
    assert [row["step"] for row in times] == [row["step"] for row in steps]
    assert all(row["seconds"] > 0 and row["images_per_second"] > 0 and row["memory_mib"] > 100 for row in times)
    assert not any("seconds" in row for row in steps)


def test_speed_is_that_of_training_alone(tmp_path, monkeypatch):
    """What happens between two epochs does not count, nor the updates that an earlier run did."""
    now = [100.0]
    monkeypatch.setattr(run_logs.time, "perf_counter", lambda: now[0])
    log = run_logs.RunLog(main.merged_options({"output_dir": str(tmp_path)})[0], 0, 30)
    for begin, seconds, steps in ((30, 2.0, (40,)), (50, 0.5, (55, 60))):
        log.begin(begin, 8, torch.device("cpu"))
        for step in steps:
            now[0] += seconds
            log.step(step, {"train/loss": 1.0})
        # an evaluation
        now[0] += 1000
    rows = [json.loads(line) for line in open(tmp_path / "times.jsonl")]
    assert [(row["step"], row["seconds"], row["images_per_second"]) for row in rows] == [
        (40, 2.0, 40.0),
        (55, 0.5, 80.0),
        (60, 0.5, 80.0),
    ]


class Fixed(nn.Module):
    """Logits that are the image's first values."""

    def forward(self, x):
        return x.flatten(1)[:, :3]


def test_mistakes_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr(results, "MISTAKES", 4)
    torch.manual_seed(1)
    images, labels = torch.randn(40, 3, 4, 4) * 3, torch.randint(3, (40,)).tolist()
    args = main.merged_options({"batch_size": 7, "nb_classes": 3})[0]
    data = torch.utils.data.StackDataset(images, labels)
    found, _ = results.examine(Fixed(), data, ["a", "b", "c"], args, torch.device("cpu"))
    p = torch.softmax(images.flatten(1)[:, :3].double(), 1).numpy()
    truth = np.array(labels)
    wrong = np.flatnonzero(p.argmax(1) != truth)
    assert found.count == found.total == 40 and found.correct == 40 - len(wrong) and len(wrong) > 8
    worst = sorted(wrong, key=lambda i: p[i, truth[i]])[:4]
    confident = sorted(wrong, key=lambda i: -p[i].max())[:4]
    assert [entry["name"] for entry in found.worst] == [f"image {i}" for i in worst]
    assert [entry["name"] for entry in found.confident] == [f"image {i}" for i in confident]
    assert [entry["loss"] for entry in found.worst] == pytest.approx([-np.log(p[i, truth[i]]) for i in worst])
    assert found.worst[0]["true"] == truth[worst[0]] and found.worst[0]["predicted"] == p[worst[0]].argmax()


def test_images_and_time_are_bounded(monkeypatch):
    data = torch.utils.data.StackDataset(torch.randn(60, 3, 4, 4), [0] * 60)
    args = main.merged_options({"batch_size": 10, "nb_classes": 3})[0]

    def examine(**kwargs):
        return results.examine(Fixed(), data, None, args, torch.device("cpu"), **kwargs)[0]

    monkeypatch.setattr(results, "IMAGES", 25)
    assert (examine().count, examine().total) == (25, 60) and examine().confusion == examine().confusion
    assert examine(stops=lambda: True).count == 10
    monkeypatch.setattr(results, "SECONDS", 0)
    assert examine().count == 10


@pytest.mark.slow
def test_several_processes_count_every_image_once(tmp_path):
    options = {"epochs": 1, "output_dir": tmp_path, "batch_size": 32}
    done = launch(quick(**options), "torchrun", processes=2)
    assert done.returncode == 0, done.stderr
    single = content(tmp_path)["results"]
    assert single["count"] == 360
    assert 100 * single["correct"] / 360 == pytest.approx(read_log(tmp_path)[-1]["test_acc1"])
    assert (
        content(tmp_path)["facts"]["device"] == "2 x cpu" and "32 x 1 x 2 = 64" in content(tmp_path)["facts"].values()
    )


def test_a_stopped_run_has_a_report_and_a_resumed_one_another(tmp_path, monkeypatch):
    before = run_logs.RunLog.step

    def stop(self, step, metrics):
        before(self, step, metrics)
        if step == 32:
            os.kill(os.getpid(), 15)

    with monkeypatch.context() as patch:
        patch.setattr(run_logs.RunLog, "step", stop)
        assert main.main(quick(epochs=2, output_dir=tmp_path)) == 143
    assert content(tmp_path)["state"] == "stopped in epoch 1" and content(tmp_path)["results"] is None
    assert "stopped in epoch 1" in (tmp_path / "report.html").read_text()
    with open(tmp_path / "times.jsonl", "a") as file:
        file.write('{"step": 99, "seconds": 1}\n{"step": 3')
    assert main.main(quick(epochs=2, output_dir=tmp_path)) == 0
    assert content(tmp_path)["state"] == "finished" and content(tmp_path)["results"]["count"] == 360
    times, steps = ([json.loads(line)["step"] for line in open(tmp_path / f"{n}.jsonl")] for n in ("times", "steps"))
    assert times == steps


def test_a_report_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch, capsys):
    def full(path, write, verify=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "replace_file", full)
    assert main.main(quick(epochs=1, output_dir=tmp_path)) == 0
    assert capsys.readouterr().out.count("warning: report.html was not written ([Errno 28] No space left") == 1
    assert not (tmp_path / "report.html").exists() and (tmp_path / "checkpoint-best.pth").exists()


def test_a_run_without_a_report(tmp_path):
    assert main.main(quick(epochs=1, output_dir=tmp_path, report=False)) == 0
    assert not [name for name in os.listdir(tmp_path) if name.startswith("report")]


def test_without_matplotlib_only_the_pictures_are_missing(tmp_path, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main.main(quick(**METHODS["dyconv"], epochs=1, output_dir=tmp_path)) == 0
    page = (tmp_path / "report.html").read_text()
    assert "matplotlib is not installed" in page and 'aria-label="loss"' in page and "confusion matrix" in page


def test_runs_beside_each_other(finished, static, tmp_path, capsys):
    assert script.main([str(finished), str(static), str(static), "--output", str(tmp_path / "c.html")]) == 0
    assert "c.html: 3 runs" in capsys.readouterr().out
    page = (tmp_path / "c.html").read_text()
    for name in ("run", "static (2)", "static (3)"):
        assert f"<th>{name}</th>" in page
    for folder in (finished, static):
        assert f"{read_log(folder)[-1]['best_acc1']:.2f} %" in page
    # the settings that differ, and no others
    different = page.split("<h2>What differs</h2>")[1].split("<h2>")[0]
    assert "kw_test_resnet" in different and ">seed<" in different and ">batch_size<" not in different
    # links lead from the page to the files
    link = re.search(r'href="([^"]*run/log\.txt)"', page)[1]
    assert (tmp_path / link).samefile(finished / "log.txt")


def test_report_is_written_anew(finished):
    before = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    assert script.main([str(finished)]) == 0
    assert (finished / "report.html").read_text() == before


def test_a_run_of_an_earlier_version_has_curves(static, tmp_path):
    (tmp_path / "log.txt").write_bytes((static / "log.txt").read_bytes() + b'{"epoch": 2, "te')
    assert script.main([str(tmp_path)]) == 0
    assert 'aria-label="loss"' in (tmp_path / "report.html").read_text()


def test_bad_folders_are_refused_in_one_line(finished, tmp_path, refused):
    assert "missing: no such folder" in refused(tmp_path / "missing")
    assert "no run: neither log.txt nor report.json" in refused(tmp_path)
    assert "ends in .html" in refused(finished, "--output", finished / "log.txt")
    assert (finished / "log.txt").read_bytes()
    for broken in (b"{", b"[]", b'{"state": 1}', b"\xff", b'{"state": "x", "facts": {"a": 1}}', b"[" * 100_000):
        (tmp_path / "report.json").write_bytes(broken)
        assert "report.json: not the record of a run" in refused(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["results"]["confusion"].append([0, 99, 1]),
        lambda c: c["results"]["worst"][0].update(png='x" onerror="alert(1)'),
        lambda c: c["results"]["worst"][0].update(probability="<b>"),
        lambda c: c["pictures"][0].update(png="<script>"),
        lambda c: c["facts"].update(model=["x"]),
        lambda c: c["results"].update(count=True),
    ],
)
def test_a_record_that_is_not_one(change, finished, tmp_path):
    found = content(finished)
    change(found)
    (tmp_path / "report.json").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="not the record of a run"):
        runs.open_run(tmp_path)


ODD = [
    "</script><script>planted=1</script>",
    '"><img src=x onerror="planted=1">',
    "\x1b[31m",
    "\u202ea",
    "$x$",
    "x" * 300,
]


@pytest.fixture
def hostile(finished, tmp_path):
    """A folder of an odd name with a record full of odd texts."""
    folder = tmp_path / "javascript:planted=1 \"'><b>"
    folder.mkdir()
    found = content(finished)
    found["results"]["classes"] = [*ODD, *"0123"]
    found["facts"] = {odd: odd for odd in ODD}
    found["options"] = {odd: odd for odd in ODD}
    found["notes"] = ODD
    found["state"] = ODD[0]
    for entry in found["results"]["worst"]:
        entry["name"] = ODD[1]
    found["pictures"][0]["caption"] = found["pictures"][0]["name"] = ODD[1]
    (folder / "report.json").write_text(json.dumps(found))
    (folder / "log.txt").write_bytes((finished / "log.txt").read_bytes())
    return folder


def test_odd_texts_are_escaped(hostile, static):
    for page in (report_page([runs.open_run(hostile)]), report_page([runs.open_run(hostile), runs.open_run(static)])):
        assert page.count("<script") == 1 and "onerror=&quot;" in page and "<img src=x" not in page
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066]", page)
        assert 'href="javascript' not in page and '<b>"' not in page


def test_pages_in_a_browser(finished, static, hostile, tmp_path):
    """No console error, nothing wider than the window, no script but its own, and values at the pointer."""
    pages = {"one": [finished], "dark": [finished], "several": [finished, static, static], "hostile": [hostile, static]}
    for name, folders in pages.items():
        page, dark = tmp_path / f"{name}.html", name == "dark"
        page.write_text(report_page([runs.open_run(folder) for folder in folders], tmp_path))
        found, console = opened(page, tmp_path, dark=dark)
        assert console == [], console
        assert [entry["width"] for entry in found] == [400, 1280, 2560]
        for entry in found:
            assert entry["page"] <= entry["width"] and entry["wide"] == [], (name, entry)
            assert entry["errors"] == [] and entry["pictures"] == 0 and entry["planted"] == "undefined"
            assert entry["tip"].startswith("epoch 1\n") and entry["text"] > 1000
            luminance = [sum(map(int, re.findall(r"\d+", entry[key])[:3])) / 765 for key in ("back", "colour")]
            assert (luminance[0] < 0.2 and luminance[1] > 0.8) if dark else (luminance[0] > 0.9 and luminance[1] < 0.2)


def test_a_page_that_is_too_wide_is_found(finished, tmp_path):
    """The test of pages sees what it is to see."""
    text = report_page([runs.open_run(finished)])
    bad = text.replace("<h1>", '<div style="width:900px">wide</div><img src="http://127.0.0.1:9/x.png"><h1>', 1)
    (tmp_path / "bad.html").write_text(bad)
    found, console = opened(tmp_path / "bad.html", tmp_path, widths=(400, 1280))
    assert found[0]["page"] > 400 and found[0]["wide"] and found[1]["wide"] == []
    assert any("Content Security Policy" in line for line in console) and found[0]["pictures"] == 1


def test_thinned_curves_keep_their_peaks():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[4321], points[7] = (4321.0, 9.0), (7.0, -5.0)
    thin = charts.thinned(points)
    assert len(thin) <= 420 and (4321.0, 9.0) in thin and (7.0, -5.0) in thin
    assert thin[0] == points[0] and thin[-1] == points[-1] and thin == sorted(thin)
    assert charts.thinned(points[:50]) == points[:50]


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 17), (0.93, 0.97), (1e-6, 5e-6), (0, 360_000)])
def test_ticks_are_round(low, high):
    found = charts.ticks(low, high)
    assert 3 <= len(found) <= 8 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    assert all(float(f"{tick:.3g}") == pytest.approx(tick) for tick in found)


def test_charts_of_odd_values():
    assert charts.curves_chart("x", "", [charts.Curve("a", [])], "epoch") == ""
    for points in ([(0.0, 5.0)], [(0.0, 0.0), (1.0, 0.0)], [(0.0, 1e30), (1.0, -1e30)]):
        chart = charts.curves_chart("x", "", [charts.Curve("a", points)], "epoch")
        assert "nan" not in chart and "inf" not in chart.replace("info", "")


def test_many_classes_become_a_table(tmp_path, static):
    found = content(static)
    found["results"]["classes"] = [f"class {i}" for i in range(50)]
    (tmp_path / "report.json").write_text(json.dumps(found))
    page = report_page([runs.open_run(tmp_path)])
    assert 'class="matrix"' not in page and "true class" in page
