"""Detectors trained, resumed, evaluated and drawn by the commands that a user types, on a small data set."""

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, finish, free_port, started, words
from PIL import Image

pytest.importorskip("mmdet", reason="requirements-detection.txt is not installed")

CONFIG = "detection/configs/mini/mask_rcnn_kw1x_resnet10t.py"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def command(script, *arguments, processes=0, launcher="torchrun"):
    start = [sys.executable]
    if processes:
        module = {"torchrun": "torch.distributed.run", "launch": "torch.distributed.launch"}[launcher]
        start += ["-m", module, f"--nproc_per_node={processes}", "--master_addr=127.0.0.1"]
        start += [f"--master_port={free_port()}"]
        arguments = (*arguments, "--launcher", "pytorch")
    return [*start, str(ROOT / script), *map(str, arguments)]


def run(script, *arguments, timeout=400, env=None, **kwargs):
    """Start a command as a user does; returns the completed process with its text."""
    return finish(command(script, *arguments, **kwargs), timeout, {**ENVIRONMENT, **(env or {})})


def options(data, **more):
    """Settings of a run of seconds on a data set."""
    settings = {f"{phase}_dataloader.dataset.data_root": f"{data}/" for phase in ("train", "val", "test")}
    settings |= {f"{phase}_evaluator.ann_file": f"{data}/annotations/val.json" for phase in ("val", "test")}
    settings |= {"train_cfg.max_epochs": 2, "default_hooks.logger.interval": 1, "randomness.seed": 1, **more}
    return ["--cfg-options", *(f"{key}={value}" for key, value in settings.items())]


def made(folder, train=16, val=6):
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/make_mini_coco.py", "--output", folder, f"--train={train}", f"--val={val}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made(tmp_path_factory.mktemp("data") / "mini")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The work directory of an unbroken run of two epochs."""
    work = tmp_path_factory.mktemp("work") / "run"
    result = run("detection/train.py", CONFIG, "--work-dir", work, *options(data))
    assert result.returncode == 0, result.stderr[-2000:]
    return work


def losses(work):
    """(epoch, step, loss) that a work directory's logs hold, in order."""
    lines = [line for path in sorted(work.glob("*/vis_data/scalars.json")) for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in lines if '"loss"' in line]
    return [(row["epoch"], row["step"], row["loss"]) for row in rows]


def test_made_data_has_every_kind_of_object(data):
    from pycocotools.coco import COCO

    coco = COCO(str(data / "annotations" / "train.json"))
    annotations = list(coco.anns.values())
    assert any(a["iscrowd"] for a in annotations) and any(isinstance(a["segmentation"], dict) for a in annotations)
    assert any(isinstance(a["segmentation"], list) for a in annotations)
    assert any(not coco.getAnnIds(i) for i in coco.imgs) or len(coco.imgs) < 20
    sides = [a["area"] ** 0.5 for a in annotations]
    assert min(sides) < 16 and max(sides) > 32
    for a in annotations:
        left, top, width, height = a["bbox"]
        mask = coco.annToMask(a)
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        assert abs(left - columns[0]) <= 1 and abs(top - rows[0]) <= 1
        assert abs(width - (columns[-1] - columns[0] + 1)) <= 1 and abs(height - (rows[-1] - rows[0] + 1)) <= 1


def test_made_data_is_seeded(tmp_path):
    folders = [made(tmp_path / name, 3, 2) for name in "ab"]
    for path in sorted(folders[0].rglob("*.*")):
        assert path.read_bytes() == (folders[1] / path.relative_to(folders[0])).read_bytes()


def test_training_writes_safe_checkpoints(trained):
    """torch reads them back as plain data, with stock settings."""
    paths = sorted(trained.glob("*.pth"))
    assert [path.name for path in paths] == ["epoch_1.pth", "epoch_2.pth"]
    for path in paths:
        content = torch.load(path, weights_only=True)
        assert torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) == []
        assert content["optimizer"]["state"] and content["param_schedulers"] and "config" not in content["meta"]


def test_evaluation_prints_what_training_did(data, trained, tmp_path):
    scalars = [json.loads(line) for path in trained.glob("*/vis_data/scalars.json") for line in path.open()]
    expected = next(row for row in reversed(scalars) if "coco/bbox_mAP" in row)
    result = run("detection/test.py", CONFIG, trained / "epoch_2.pth", "--work-dir", tmp_path, *options(data))
    assert result.returncode == 0, result.stderr[-2000:]
    for key in ("bbox_mAP", "bbox_mAP_50", "segm_mAP"):
        (printed,) = re.findall(rf"coco/{key}: (-?[\d.]+)", result.stdout + result.stderr)
        assert float(printed) == pytest.approx(expected[f"coco/{key}"], abs=5e-4)


def test_pictures_are_drawn(data, trained, tmp_path):
    pictures = sorted((data / "val").glob("*.png"))[:2]
    arguments = (*pictures, CONFIG, trained / "epoch_2.pth", "--out-dir", tmp_path / "out", "--score", 0.0)
    result = run("detection/infer.py", *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    for picture in pictures:
        drawn = Image.open(tmp_path / "out" / picture.name)
        assert (
            drawn.size == (128, 128) and drawn.convert("RGB").tobytes() != Image.open(picture).convert("RGB").tobytes()
        )


def killed_after_first_checkpoint(data, work):
    arguments = command("detection/train.py", CONFIG, "--work-dir", work, *options(data))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with started(arguments, ENVIRONMENT, cwd=ROOT, **quiet) as process:
        deadline = time.monotonic() + 200
        while not (work / "epoch_1.pth").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)


def test_a_killed_run_goes_on(data, trained, tmp_path):
    """The second epoch of the run that was killed is that of the unbroken one, up to the shuffling's own state."""
    work = tmp_path / "run"
    killed_after_first_checkpoint(data, work)
    # what a crash while writing leaves behind on file systems without atomic renames
    (work / "epoch_7.pth").write_bytes((work / "epoch_1.pth").read_bytes()[:5000])
    result = run("detection/train.py", CONFIG, "--work-dir", work, "--resume", *options(data))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "passing over a bad checkpoint" in result.stdout + result.stderr
    ours, unbroken = (torch.load(folder / "epoch_2.pth", weights_only=True) for folder in (work, trained))
    assert [ours["meta"][key] for key in ("epoch", "iter")] == [unbroken["meta"][key] for key in ("epoch", "iter")]
    rates = [[group["lr"] for group in content["optimizer"]["param_groups"]] for content in (ours, unbroken)]
    assert rates[0] == rates[1]
    steps = [[float(s["step"]) for s in content["optimizer"]["state"].values()] for content in (ours, unbroken)]
    assert steps[0] == steps[1]
    second = [row[:2] for row in losses(work) if row[0] == 2]
    assert second[-2:] == [row[:2] for row in losses(trained) if row[0] == 2]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (Path(self.target),))


QUICK = {("meta", "resume"), ("pickle", "test"), ("legacy", "init_cfg"), ("pickle", "infer")}


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param(kind, way, marks=() if (kind, way) in QUICK else pytest.mark.slow)
        for kind in ("meta", "pickle", "legacy")
        for way in ("resume", "test", "load_from", "init_cfg", "infer")
    ],
)
def test_code_in_a_checkpoint_never_runs(kind, way, data, trained, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    content = torch.load(trained / "epoch_1.pth", weights_only=True)
    if kind == "meta":
        content["meta"]["config"] = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    else:
        content["optimizer"]["extra"] = Payload(marker)
    torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    if way == "infer":
        arguments = ("detection/infer.py", data / "val" / "000001.png", CONFIG, path)
    elif way == "test":
        arguments = ("detection/test.py", CONFIG, path, "--work-dir", tmp_path / "w", *options(data))
    else:
        arguments = ("detection/train.py", CONFIG, "--work-dir", tmp_path / "w")
        more = {"resume": {}, "load_from": {"load_from": path}, "init_cfg": {
            "model.backbone.init_cfg.type": "Pretrained", "model.backbone.init_cfg.checkpoint": path}}[way]  # fmt: skip
        arguments += (*(["--resume", path] if way == "resume" else []), *options(data, **more))
    result = run(*arguments, env={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"})
    assert not marker.exists()
    assert result.returncode == 2, result.stderr[-2000:]
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(line) < 400
    if way != "init_cfg" and kind == "meta":
        assert "meta['config']" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detection/train.py", "none.py"], "config 'none.py': no such file"),
        (["detection/train.py", CONFIG, {}], "train annotations 'absent/annotations/train.json': no such file"),
        (["detection/train.py", CONFIG, "--resume", "none.pth"], "checkpoint 'none.pth': no such file"),
        (["detection/test.py", CONFIG, "none.pth"], "checkpoint 'none.pth': no such file"),
        (["detection/train.py", CONFIG, {"model.backbone.config": "resnet19"}], "unknown model 'resnet19'"),
        (["detection/train.py", CONFIG, {"default_hooks.checkpoint.max_keep_ckpts": 1}], "max_keep_ckpts 1"),
        (["detection/infer.py", "none.png", CONFIG, "CHECKPOINT"], "image 'none.png': cannot be read"),
        pytest.param(
            ["detection/train.py", CONFIG, "--amp"],
            "--amp: mmengine's mixed precision needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
    ids=["config", "data", "resume", "test", "model", "hook", "picture", "amp"],
)
def test_mistakes_end_in_one_line(arguments, message, data, trained, tmp_path, monkeypatch, capsys):
    script, *arguments, last = arguments
    if isinstance(last, dict):
        # those of the README may be there
        arguments += [*options(data if last else "absent", **last), "--work-dir", tmp_path]
    else:
        arguments += [trained / "epoch_1.pth" if last == "CHECKPOINT" else last]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert importlib.import_module(f"detection.{Path(script).stem}").main([*map(str, arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


@pytest.mark.parametrize("script", ["train", "test", "infer"])
def test_a_mistake_is_the_command_s_exit_code(script):
    image = ["none.png"] if script == "infer" else []
    result = run(f"detection/{script}.py", *image, "none.py", *([] if script == "train" else ["none.pth"]))
    assert result.returncode == 2
    assert re.fullmatch("error: .*none.*\n", result.stderr), result.stderr


@pytest.mark.parametrize("launcher", [pytest.param("launch", marks=pytest.mark.slow), "torchrun"])
def test_two_processes(launcher, data, trained, tmp_path):
    """Each trains on half of the pictures, and the evaluation is that of one process."""
    work = tmp_path / "run"
    more = {"train_dataloader.batch_size": 4, "train_cfg.max_epochs": 1}
    arguments = ("--work-dir", work, *options(data, **more))
    result = run("detection/train.py", CONFIG, *arguments, processes=2, launcher=launcher)
    assert result.returncode == 0, result.stderr[-2000:]
    assert torch.load(work / "epoch_1.pth", weights_only=True)["meta"]["iter"] == 2
    printed = []
    for processes in (0, 2):
        arguments = (work / "epoch_1.pth", "--work-dir", tmp_path / f"test{processes}", *options(data))
        result = run("detection/test.py", CONFIG, *arguments, processes=processes, launcher=launcher)
        assert result.returncode == 0, result.stderr[-2000:]
        printed.append(re.findall(r"coco/bbox_mAP_50: (-?[\d.]+)", result.stdout + result.stderr)[-1])
    assert printed[0] == printed[1]


def test_a_mistake_ends_all_processes(tmp_path):
    start = time.monotonic()
    result = run("detection/train.py", CONFIG, "--work-dir", tmp_path, *options("absent"), processes=2, timeout=100)
    assert result.returncode != 0 and "no such file" in result.stderr
    assert time.monotonic() - start < 60


def average_precision(result):
    text = result.stdout + result.stderr
    return [float(re.findall(rf"coco/{kind}_mAP_50: (-?[\d.]+)", text)[-1]) for kind in ("bbox", "segm")]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_learns_to_detect(tmp_path):
    """A shorter run of the small data set's config; the whole one reaches more (see detection/README.md)."""
    data = made(tmp_path / "mini", 300, 60)
    more = {"train_cfg.max_epochs": 6, "train_cfg.val_interval": 6, "param_scheduler.1.T_max": 6}
    result = run(
        "detection/train.py", CONFIG, "--work-dir", tmp_path / "run", *options(data, **more), timeout=900,
        env={"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    box, mask = average_precision(result)
    # 0.36 was measured; untrained heads reach 0.00
    assert box > 0.25 and mask > 0.25


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_classifier_of_digits_helps(data, tmp_path):
    """Weights that main.py trained give a lower loss after the same steps."""
    classifier = tmp_path / "classifier"
    arguments = words(
        model="kw_resnet10t", data_set="digits", nb_classes=10, input_size=32, batch_size=32, epochs=6, temp_epoch=2,
        opt="adamw", lr=0.003, warmup_epochs=1, clip_grad=1, mixup=0, cutmix=0, num_workers=0, seed=1,
        output_dir=classifier,
    )  # fmt: skip
    subprocess.run([sys.executable, ROOT / "main.py", *arguments], check=True, capture_output=True)
    data, result = made(tmp_path / "mini", 96, 6), {}
    for name in ("random", "pretrained"):
        more = {"train_cfg.max_epochs": 6, "param_scheduler.0.end": 10, "param_scheduler.1.T_max": 6}
        if name == "pretrained":
            more["model.backbone.init_cfg.type"] = "Pretrained"
            more["model.backbone.init_cfg.checkpoint"] = classifier / "checkpoint-best.pth"
        arguments = ("--work-dir", tmp_path / name, *options(data, **more))
        done = run("detection/train.py", CONFIG, *arguments, env={"OMP_NUM_THREADS": "2"})
        assert done.returncode == 0, done.stderr[-2000:]
        last = [loss for epoch, _, loss in losses(tmp_path / name) if epoch == 6]
        result[name] = sum(last) / len(last)
    # 3.66 and 3.76 were measured
    assert result["pretrained"] < result["random"]
