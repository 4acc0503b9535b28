"""Classification models as backbones of detectors: features, freezing, weights, configs, data and checkpoints."""

import copy
import csv
import functools
import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers import KW, ROOT
from layer_checks import take_statistics
from released_models import RELEASED, released_state
from tolerance import assert_same

pytest.importorskip("mmdet", reason="requirements-detection.txt is not installed")

from mmdet.registry import DATASETS, METRICS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from PIL import Image

from detection.backbones import ClassificationBackbone
from detection.check_data import check_data
from detection.hooks import plain
from models import build_model, load_weights, warehouse_layers
from models.config import ConfigError

register_all_modules()
CONFIGS = sorted(path for path in (ROOT / "detection" / "configs").glob("*/*.py") if path.parent.name[0] != "_")
COCO_CONFIGS = [path for path in CONFIGS if path.parent.name != "mini"]
TABLE = list(csv.DictReader((Path(__file__).parent / "data" / "detection.csv").open()))
RESNET = {"model": "kw_resnet10t", **KW, "sharing_range": "layer_conv"}
MOBILENET = {"model": "kw_mobilenetv2_050", **KW, "sharing_range": "layer_pwconv_dwconv"}
CONVNEXT = {"model": "kw_convnext_atto", **KW, "sharing_range": "layer_pwconv"}
RESNET_STAGES = (["layer1", "layer2", "layer3", "layer4"], None)
MOBILENET_STAGES = (["blocks.1", "blocks.2", "blocks.4", "blocks.6"], "bn2")
# the last module of every stage from stride 4 on, and what comes after the last
STAGES = {
    "resnet": (RESNET, *RESNET_STAGES),
    "mobilenet": (MOBILENET, *MOBILENET_STAGES),
    "convnext": (CONVNEXT, ["stages.0", "stages.1", "stages.2", "stages.3"], None),
    "static": ({"model": "resnet18"}, *RESNET_STAGES),
    # CondConv's and DCD's classifiers are dynamic, too
    "condconv": ({"model": "condconv_resnet10t"}, *RESNET_STAGES),
    "dcd": ({"model": "dcd_resnet10t"}, *RESNET_STAGES),
    "odconv": ({"model": "od_resnet10t"}, *RESNET_STAGES),
    "dyconv": ({"model": "dyconv_resnet10t"}, *RESNET_STAGES),
    "condconv_mobilenet": ({"model": "condconv_mobilenetv2_050"}, *MOBILENET_STAGES),
    "dcd_mobilenet": ({"model": "dcd_mobilenetv2_050"}, *MOBILENET_STAGES),
    "odconv_mobilenet": ({"model": "od_mobilenetv2_050"}, *MOBILENET_STAGES),
}
SLOW = ("odconv", "dyconv", "condconv_mobilenet", "dcd_mobilenet", "odconv_mobilenet")
each_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in STAGES]
)
# the beginning of a config's name for the methods and settings of the tables
METHODS = {
    ("static", ""): "static",
    ("kw", "1x"): "kw1x",
    ("kw", "4x"): "kw4x",
    ("kw", "3/4x"): "kw3d4x",
    ("dyconv", "4x"): "dy4x",
    ("odconv", "1x"): "od1x",
    ("odconv", "4x"): "od4x",
    ("condconv", "8x"): "cond8x",
    ("dcd", ""): "dcd",
}
FOLDERS = {"KW T3": "kw", "OD T4": "odconv"}
ROWS = {
    f"{FOLDERS[r['source']]}/{r['detector']}_{METHODS[r['method'], r['setting']]}_{r['backbone']}": r for r in TABLE
}


def names(path):
    return f"{path.parent.name}/{path.stem}"


@functools.cache
def counted(path):
    """Parameters of a config's detector and of its backbone, in millions, without making a number of them."""
    with torch.device("meta"):
        model = MODELS.build(Config.fromfile(path).model)
    return tuple(sum(p.numel() for p in module.parameters()) / 1e6 for module in (model, model.backbone))


@each_model
def test_feature_maps_are_those_of_the_classifier(name):
    config, stages, last = STAGES[name]
    model, seen = build_model(config, num_classes=7, drop_path=0.0).eval(), {}
    for stage in [*stages[:-1], last or stages[-1]]:
        model.get_submodule(stage).register_forward_hook(lambda *a, stage=stage: seen.update({stage: a[2]}))
    backbone = ClassificationBackbone(config, num_classes=7).eval()
    backbone.model.load_state_dict({k: v for k, v in model.state_dict().items() if k in backbone.model.state_dict()})
    x = torch.randn(2, 3, 96, 64)
    maps = backbone(x)
    whole = model.forward_features(x)
    assert len(maps) == 4 == len(seen)
    for value, expected, channels, stride in zip(maps, seen.values(), backbone.channels, backbone.strides, strict=True):
        assert value.shape == (2, channels, 96 // stride, 64 // stride)
        assert_same(value, expected)
    assert_same(maps[-1], whole)
    some = ClassificationBackbone(config, out_indices=(1, 2)).eval()
    some.model.load_state_dict({k: v for k, v in model.state_dict().items() if k in some.model.state_dict()})
    for value, expected in zip(some(x), maps[1:3], strict=True):
        assert_same(value, expected)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mobilenetv2_100", [24, 32, 96, 1280]),
        ("resnet50", [256, 512, 1024, 2048]),
        ("convnext_tiny", [96, 192, 384, 768]),
    ],
)
def test_pyramids_of_the_papers(name, channels):
    model = MODELS.build({**Config.fromfile(ROOT / f"detection/configs/kw/mask_rcnn_static_{name}.py").model})
    assert [conv.conv.in_channels for conv in model.neck.lateral_convs] == channels
    assert model.backbone.strides == [4, 8, 16, 32]


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2), (0,)])
@each_model
def test_every_parameter_gets_a_gradient(name, out_indices):
    """Otherwise DistributedDataParallel stops."""
    backbone = ClassificationBackbone(STAGES[name][0], out_indices=out_indices).train()
    sum(y.square().mean() for y in backbone(torch.randn(8, 3, 64, 64))).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("frozen", [0, 1, 2])
@each_model
def test_frozen_stages(name, frozen):
    config, stages, _ = STAGES[name]
    x = torch.randn(8, 3, 64, 64)
    # statistics of this batch: with those of fresh models nothing would be left of it after the frozen stages
    fresh = ClassificationBackbone(config)
    take_statistics(fresh, x)
    backbone = ClassificationBackbone(config, frozen_stages=frozen)
    backbone.load_state_dict(fresh.state_dict())
    backbone.train()
    if frozen:
        prefixes = (*(f"{stage}." for stage in stages[:frozen]), "conv1.", "bn1.", "conv_stem.", "blocks.0.", "stem.")
    else:
        prefixes = ("conv1.", "bn1.", "conv_stem.", "blocks.0.", "stem.")
    users = warehouse_layers(backbone.model)
    still = {n for n in backbone.model.state_dict() if n.startswith(prefixes)}
    still |= {n for n, layers in users.items() if any(f"{layer}.".startswith(prefixes) for layer in layers)}
    before = copy.deepcopy(backbone.model.state_dict())
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(y.square().mean() for y in backbone(x)).backward()
        optimizer.step()
    after = backbone.model.state_dict()
    assert still and all(torch.equal(before[n], after[n]) for n in still)
    trained = {n for n, _ in backbone.model.named_parameters()} - still
    assert trained and all(not torch.equal(before[n], after[n]) for n in trained)


@pytest.mark.parametrize("config", [RESNET, STAGES["dcd"][0], STAGES["odconv"][0]], ids=["kw", "dcd", "odconv"])
def test_norm_eval_holds_for_attentions_and_its_absence_is_told(config):
    x = torch.randn(2, 3, 64, 64)
    backbone = ClassificationBackbone(config, norm_eval=True).train()
    before = copy.deepcopy(backbone.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone(x)
        backbone(x[:1])
    statistics = [n for n in before if "running" in n]
    # those of attentions (or of DCD's dynamic branches) beside the static network's
    assert len(statistics) > len([n for n in build_model({"model": "resnet10t"}).state_dict() if "running" in n])
    assert all(torch.equal(before[n], backbone.state_dict()[n]) for n in statistics)
    backbone = ClassificationBackbone(config).train()
    with pytest.warns(UserWarning, match="2 images a process; set norm_eval=True"):
        backbone(x)
    assert not any(torch.equal(before[n], backbone.state_dict()[n]) for n in statistics)


def test_options_reach_the_model():
    backbone = ClassificationBackbone(CONVNEXT, drop_path=0.4, layer_scale_init_value=1.0)
    assert any(getattr(m, "drop_prob", 0) == pytest.approx(0.4) for m in backbone.modules())
    assert all(float(p[0]) == 1.0 for n, p in backbone.named_parameters() if n.endswith("gamma"))
    synced = ClassificationBackbone(RESNET, sync_bn=True)
    kinds = {type(m).__name__ for m in synced.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == {"SyncBatchNorm"}


@pytest.mark.parametrize(("name", "last"), [("resnet", 0), ("odconv", 1), ("dyconv", 1)])
def test_temperatures_are_the_last_ones(name, last):
    """With which the backbone was evaluated: a detector's training does not anneal them (ODConv, section A.2)."""
    backbone = ClassificationBackbone({**STAGES[name][0], "temp_epoch": 10, "temp_init_value": 30 if last else 1})
    found = {float(module.temperature) for module in backbone.modules() if hasattr(module, "temperature")}
    assert found == {last}


@pytest.mark.parametrize("prefix", ["", "module."])
@each_model
def test_weights_of_a_classifier(name, prefix, tmp_path):
    config = STAGES[name][0]
    model = build_model(config, num_classes=7)
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "x.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "x.pth")}
    backbone = ClassificationBackbone(config, init_cfg=init_cfg)
    backbone.init_weights()
    own = backbone.model.state_dict()
    assert own and all(torch.equal(value, model.state_dict()[key]) for key, value in own.items())
    other = ClassificationBackbone({"model": "resnet26"}, init_cfg=init_cfg)
    with pytest.raises(ConfigError, match=r"x\.pth: .* of another model: .* missing"):
        other.init_weights()
    del state[f"{prefix}{next(iter(own))}"]
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="1 missing"):
        backbone.init_weights()


@pytest.mark.parametrize(
    "name", ["kw1x_resnet18", "kw1d2x_mobilenetv2_050", "kw1x_mobilenetv2_050", "kw1x_convnext_tiny", "resnet50"]
)
def test_released_weights_as_they_are(name, tmp_path):
    """Their foreign names, numbered warehouses, and a classifier that has a warehouse of its own."""
    config, state = RELEASED[name]["config"], released_state(RELEASED[name])
    torch.save({"model": state}, tmp_path / "x.pth")
    backbone = ClassificationBackbone(config, init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "x.pth")})
    backbone.init_weights()
    expected = load_weights(build_model(config), {"model": state}).state_dict()
    own = backbone.model.state_dict()
    assert len(own) > 100 and all(torch.equal(value, expected[key]) for key, value in own.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "resnet18", "out_indices": (0, 4)}, "stages 0 to 3"),
        ({"config": "resnet18", "out_indices": (2, 1)}, "ascending"),
        ({"config": "resnet18", "frozen_stages": 5}, "has 4 stages"),
        ({"config": "resnet19"}, "unknown model 'resnet19'"),
        ({"config": "configs/none.json"}, "none.json"),
        ({"config": "vit_tiny_patch16_224"}, "pyramid"),
        ({"config": "resnet18", "drop_paths": 1}, "drop_paths"),
        ({"config": "resnet18", "init_cfg": {"type": "Kaiming"}}, "Pretrained"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ClassificationBackbone(**arguments)


@pytest.mark.parametrize("path", [p for p in COCO_CONFIGS if p.parent.name == "odconv"], ids=names)
def test_parameters_are_those_of_the_paper(path):
    """ODConv's Table 4, whose totals count a static classifier of 1000 classes, too.

    Of a dynamic classifier CondConv's kernels and routing count nowhere, DCD's dynamic part in backbone and total.
    """
    row = ROWS[names(path)]
    total, backbone = counted(path)
    with torch.device("meta"):
        static, own = (
            sum(p.numel() for p in build_model(config).get_classifier().parameters()) / 1e6
            for config in ({"model": row["backbone"]}, ROOT / Config.fromfile(path).model.backbone.config)
        )
    dynamic = own - static if row["method"] == "dcd" else 0.0
    assert (dynamic > 0.1) == (row["method"] == "dcd")
    assert backbone + dynamic == pytest.approx(float(row["backbone_params_M"]), abs=0.02)
    assert total + static + dynamic == pytest.approx(float(row["params_M"]), abs=0.02)


def test_every_row_of_the_papers_has_a_config():
    assert ROWS.keys() == {names(path) for path in COCO_CONFIGS} and len(ROWS) == len(TABLE)


@pytest.mark.parametrize("path", CONFIGS, ids=names)
def test_configs_say_what_they_are(path):
    head = path.read_text().split("_base_")[0]
    total, backbone = counted(path)
    assert f"{total:.2f} M" in head
    if path.parent.name == "mini":
        return
    row = ROWS[names(path)]
    assert f"{backbone:.2f} M" in head
    assert f"box AP {row['box_ap']} (AP50 {row['box_ap50']}, AP75 {row['box_ap75']})" in head
    assert all(row[key] in head for key in ("mask_ap", "params_M", "backbone_params_M", "madds"))
    config = Path(Config.fromfile(path).model.backbone.config).stem
    assert path.stem == f"{row['detector']}_" + ("static_" if config == row["backbone"] else "") + config
    paper = f"{row['params_M']} M" if row["params_M"] else ""
    cells = [f"[{names(path)}](configs/{names(path)}.py)", row["box_ap"], row["mask_ap"], paper, f"{total:.2f} M"]
    assert f"| {' | '.join(cells)} |" in (ROOT / "detection" / "README.md").read_text()


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Two pictures in COCO's layout and with its categories."""
    root = tmp_path_factory.mktemp("coco")
    classes = DATASETS.get("CocoDataset").METAINFO["classes"]
    box = {
        "bbox": [60, 40, 100, 80],
        "area": 8000,
        "iscrowd": 0,
        "segmentation": [[60, 40, 160, 40, 160, 120, 60, 120]],
    }
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        images = [{"id": i, "file_name": f"{i}.jpg", "width": 320, "height": 240} for i in (1, 2)]
        for image in images:
            pixels = torch.randint(0, 255, (240, 320, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(root / f"{split}2017" / image["file_name"])
        content = {
            "images": images,
            "annotations": [{"id": i, "image_id": i, "category_id": 10 * i, **box} for i in (1, 2)],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(classes)],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def on(root, path):
    """A config of COCO on other data."""
    cfg = Config.fromfile(path)
    for phase in ("train", "val", "test"):
        cfg[f"{phase}_dataloader"].dataset.data_root = str(root)
    cfg.val_evaluator.ann_file = str(root / "annotations" / "instances_val2017.json")
    return cfg


def smaller(value):
    """A pipeline at 320 pixels."""
    if isinstance(value, dict):
        sizes = {"scale": (320, 320), "scales": [(320, 320)], "crop_size": (200, 300)}
        return {key: sizes.get(key, smaller(item)) for key, item in value.items()}
    return [smaller(item) for item in value] if isinstance(value, list) else value


def mostly_slow(path):
    """Three backbones and two detectors are enough for every day."""
    quick = path.stem.startswith(("mask_rcnn_kw1x", "faster_rcnn_static"))
    return pytest.param(path, id=names(path), marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("path", list(map(mostly_slow, COCO_CONFIGS)))
def test_every_config_trains_and_evaluates(path, coco):
    cfg = on(coco, path)
    # untrained heads are sure of nothing
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    # with the released initialisation, DCD's features are NaN until training has given BatchNorm its statistics
    cfg.model.backbone.initialisation = "timm"
    check_data(cfg, ("train", "val", "test"))
    train, val = (cfg[f"{phase}_dataloader"].dataset for phase in ("train", "val"))
    train.pipeline, val.pipeline = (smaller(d.to_dict()["pipeline"]) for d in (train, val))
    model = MODELS.build(cfg.model)
    model.eval()
    data = DATASETS.build(val)
    metric = METRICS.build(cfg.val_evaluator)
    metric.dataset_meta = data.metainfo
    batch = pseudo_collate([data[0]])
    with torch.no_grad():
        metric.process(batch, [sample.to_dict() for sample in model.test_step(batch)])
    assert any("bbox" in key for key in metric.evaluate(1))
    # a step from random weights at the full rate, so after the evaluation
    model.train()
    data = DATASETS.build(train)
    assert len(data) == 2
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    losses = model.train_step(pseudo_collate([data[0]]), optimizer)
    assert {"loss_rpn_cls", "loss_cls", "loss_bbox"} <= losses.keys()
    assert ("loss_mask" in losses) == (path.stem.startswith("mask"))
    assert all(torch.isfinite(value).all() for value in losses.values())


@pytest.mark.parametrize("released", [True, False], ids=["released", "default"])
def test_learning_rates_decay_by_layers(released):
    cfg = Config.fromfile(ROOT / "detection/configs/kw/mask_rcnn_kw1x_convnext_tiny.py")
    if not released:
        for setting in ("warehouses_at_full_rate", "decay_layer_scale"):
            assert cfg.optim_wrapper.paramwise_cfg.pop(setting)
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rate, decay = {}, {}
    for group in groups:
        for name in group["names"]:
            rate[name], decay[name] = group["lr"], group["weight_decay"]
    assert rate.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    steps = {
        "backbone.model.stem.1.weight": 0, "backbone.model.stages.0.blocks.2.norm.weight": 1,
        "backbone.model.stages.1.downsample.0.weight": 2, "backbone.model.stages.2.downsample.0.weight": 3,
        "backbone.model.stages.2.blocks.2.gamma": 3, "backbone.model.stages.2.blocks.3.gamma": 4,
        "backbone.model.stages.2.blocks.8.gamma": 5, "backbone.model.stages.3.downsample.0.weight": 6,
        "backbone.model.stages.3.blocks.0.gamma": 6, "neck.lateral_convs.0.conv.weight": 7,
        "roi_head.bbox_head.fc_cls.weight": 7,
    }  # fmt: skip
    for name, step in steps.items():
        assert rate[name] == pytest.approx(1e-4 * 0.95 ** (7 - step)), name
    for name, layers in warehouse_layers(model.backbone.model).items():
        stage = {int(layer.split(".")[1]) for layer in layers if layer.startswith("stages")} or {-1}
        expected = (7,) if released else {-1: (0,), 0: (1,), 1: (2,), 2: (3, 4, 5), 3: (6,)}[max(stage)]
        assert rate[f"backbone.model.{name}"] in [pytest.approx(1e-4 * 0.95 ** (7 - step)) for step in expected]
        assert decay[f"backbone.model.{name}"] == 0.05
    assert {decay[n] for n in decay if "norm" in n or n.endswith(".bias")} == {0.0}
    assert [decay[n] for n in decay if n.endswith("gamma")] == [0.05 if released else 0.0] * 18


def test_released_settings():
    """Rates, decays and schedules as in the papers' appendices."""
    kw, od = (Config.fromfile(ROOT / "detection/configs" / p) for p in
              ("kw/mask_rcnn_kw1x_resnet50.py", "odconv/faster_rcnn_static_resnet50.py"))  # fmt: skip
    assert dict(kw.optim_wrapper.optimizer) == {
        "type": "AdamW",
        "lr": 1e-4,
        "betas": (0.9, 0.999),
        "weight_decay": 0.05,
    }
    assert dict(od.optim_wrapper.optimizer) == {"type": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}
    convnext = Config.fromfile(ROOT / "detection/configs/kw/mask_rcnn_kw3d4x_convnext_tiny.py")
    for cfg, milestones in ((kw, [8, 11]), (od, [8, 11]), (convnext, [9, 11])):
        assert cfg.train_cfg.max_epochs == 12 and cfg.param_scheduler[-1].milestones == milestones
        assert cfg.train_dataloader.batch_size == 2 and cfg.auto_scale_lr.base_batch_size == 16
    assert kw.model.backbone.frozen_stages == 1 and kw.model.backbone.norm_eval
    model = MODELS.build(kw.model)
    wrapper = build_optim_wrapper(model, kw.optim_wrapper)
    # names with "norm" are exempt, as in the released files: norms of attentions, but not the backbone's BatchNorms
    decay = {id(p): group["weight_decay"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    names = {n: decay[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    assert all(value == (0.0 if "norm" in n else 0.05) for n, value in names.items())
    assert names["backbone.model.layer2.0.bn1.weight"] == 0.05
    assert names["backbone.model.layer2.0.conv1.attention.norm1.weight"] == 0.0


def test_warehouses_of_frozen_stages_train_where_the_released_code_lets_them():
    cfg = Config.fromfile(ROOT / "detection/configs/kw/mask_rcnn_kw1x_resnet50.py").model.backbone
    cfg = {key: value for key, value in cfg.items() if key != "type"}
    free, safe = ClassificationBackbone(**cfg), ClassificationBackbone(**{**cfg, "freeze_warehouses": True})
    frozen = [{n for n, p in backbone.model.named_parameters() if not p.requires_grad} for backbone in (free, safe)]
    cells = frozen[1] - frozen[0]
    assert cells == {"warehouses.stage0_layer_conv.cells"} and frozen[0] and not frozen[0] - frozen[1]
    rates = {m.drop_prob for m in free.model.modules() if type(m).__name__ == "DropPath"}
    assert rates == {0.1}


def damage(content, how, root):
    if how == "another name":
        content["categories"][3]["name"] = "zeppelin"
    elif how == "another order":
        content["categories"].reverse()
    elif how == "empty":
        content["images"] = []
    elif how == "no objects":
        content["annotations"] = []
    elif how == "unknown category":
        content["annotations"][0]["category_id"] = 999
    elif how == "not listed":
        content["annotations"][0]["image_id"] = 999
    elif how == "absent":
        content["images"][1]["file_name"] = "none.jpg"
    elif how in ("half", "text", "nothing"):
        whole = (root / "train2017" / "1.jpg").read_bytes()
        broken = {"half": whole[: len(whole) // 2], "text": b"<html>", "nothing": b""}[how]
        (root / "train2017" / "broken.jpg").write_bytes(broken)
        content["images"][1]["file_name"] = "broken.jpg"
    elif how == "size":
        content["images"][0]["width"] = 321
    elif how == "no list":
        del content["annotations"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("another name", "'zeppelin' is in one of them only"),
        ("another order", "the order differs"),
        ("empty", "lists no image"),
        ("no objects", "none of its 2 images has an object"),
        ("unknown category", "annotation 1 is of category 999"),
        ("not listed", "annotation 1 is of image 999"),
        ("absent", "none.jpg' is listed"),
        ("half", "broken.jpg' cannot be read"),
        ("text", "broken.jpg' cannot be read"),
        ("nothing", "broken.jpg' cannot be read"),
        ("size", "1.jpg' has 320 x 240 pixels, and 321 x 240"),
        ("no list", "no list of 'annotations'"),
        ("missing", "no such file"),
        ("cut", "not JSON"),
        ("heads", "num_classes 7"),
    ],
)
@pytest.mark.parametrize("many", [False, True], ids=["decoded", "ends"])
def test_bad_data_is_named(how, message, many, coco, monkeypatch):
    if many:
        monkeypatch.setattr("detection.check_data.DECODED", 0)
    cfg = on(coco, ROOT / "detection/configs/kw/mask_rcnn_kw1x_resnet50.py")
    whole = (coco / "annotations" / "instances_train2017.json").read_text()
    content, bad = json.loads(whole), coco / "annotations" / "bad.json"
    damage(content, how, coco)
    bad.write_text(whole[:100] if how == "cut" else json.dumps(content))
    cfg.train_dataloader.dataset.ann_file = f"annotations/{'none' if how == 'missing' else 'bad'}.json"
    if how == "heads":
        cfg.model.roi_head.bbox_head.num_classes = 7
    with pytest.raises(ConfigError, match=message) as error:
        check_data(cfg)
    assert "\n" not in str(error.value)


def test_what_is_saved_is_plain():
    import numpy as np
    from mmengine.logging import HistoryBuffer

    buffer = HistoryBuffer([1.0, 2.0], [1, 1], 10)
    value = plain({"a": buffer, "b": np.float32(3), "c": (np.arange(2), Path("x")), 4: [None, True]})
    expected = {"history": [1.0, 2.0], "counts": [1, 1], "max_length": 10}
    assert value == {"a": expected, "b": 3.0, "c": ([0, 1], "x"), 4: [None, True]}
