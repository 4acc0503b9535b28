"""The estimate of docs/scaling.md: closed forms, what it counts, and that the page has what the script writes."""

import math
from dataclasses import replace

import pytest
import scaling
import torch
from helpers import KW, ROOT
from processes import in_processes
from scaling import Model, System, exposed, ring, update_of

from models import build_model

# 1 ms an image, which products' operations take; gradients of 100 MB, half of them ready in the middle
MODEL = Model(25_000_000, 1e9, 0, 0, 0, 0, ((5e7, 0.5), (5e7, 1.0)))
SYSTEM = System(peak=1e12, memory=float("inf"), link=1e11, network=1e10, cores=64, hop=0.0, far_hop=0.0)


def test_one_gpu_exchanges_nothing():
    update = update_of(MODEL, SYSTEM, 1, images=4096, micro=128)
    assert update.images == 4096 and update.compute == pytest.approx(4.096)
    assert update.exposed == update.optimizer == update.loading == 0 and update.bound == "GPU"
    assert update.hours(300) == pytest.approx(300 * 1_281_167 * 1e-3 / 3600)
    # AdamW, where the memory has a speed
    slow = update_of(MODEL, replace(SYSTEM, memory=7e11), 1)
    assert slow.optimizer == pytest.approx(28 * 25e6 / 7e11)


@pytest.mark.parametrize("gpus", [2, 8, 64, 512])
def test_links_without_end_scale_perfectly(gpus):
    fast = replace(SYSTEM, link=float("inf"), network=float("inf"))
    assert update_of(MODEL, fast, gpus).speed == pytest.approx(gpus * 1000)
    assert update_of(MODEL, fast, gpus).exposed == 0


def test_loader_is_the_limit():
    fed = replace(SYSTEM, decode=10.0)
    # 64 cores for 8 GPUs; one GPU has 8 of them
    for gpus, speed in ((1, 80), (8, 640), (64, 5120)):
        update = update_of(MODEL, fed, gpus)
        assert update.speed == pytest.approx(speed) and update.bound == "loader"
    assert update_of(MODEL, replace(fed, storage=100.0), 16).speed == pytest.approx(200)


def test_ring():
    """2 (n - 1) / n of the bytes over the slowest link, and a hop for each of the 2 (n - 1) steps."""
    assert ring(1e8, 2, SYSTEM) == pytest.approx(1e8 / 1e11)
    assert ring(1e8, 8, SYSTEM) == pytest.approx(2 * 7 / 8 * 1e8 / 1e11)
    assert ring(1e8, 16, SYSTEM) == pytest.approx(2 * 15 / 16 * 1e8 / 1e10)
    late = replace(SYSTEM, hop=1e-3, far_hop=1.0)
    assert ring(0, 8, late) == pytest.approx(14e-3) and ring(0, 16, late) == pytest.approx(28e-3 + 2)


def test_exchange_beside_the_backward_pass():
    each = ring(5e7, 8, SYSTEM)
    # the first half is sent before the end of a long backward pass, and no bucket waits for itself in a short one
    assert exposed(MODEL.buckets, 1.0, 8, SYSTEM) == pytest.approx(each)
    assert exposed(MODEL.buckets, 0.0, 8, SYSTEM) == pytest.approx(2 * each)
    assert exposed(MODEL.buckets, each, 8, SYSTEM) == pytest.approx(1.5 * each)
    assert exposed(MODEL.buckets, 0.0, 8, SYSTEM, compression=0.5) == pytest.approx(each)
    assert exposed(MODEL.buckets, 1.0, 1, SYSTEM) == 0


def test_roofline():
    """The longer of operations and bytes for products, then the bytes of all else, over the share that is reached."""
    model = replace(MODEL, product_bytes=1e6, product_step=2e6, other_bytes=3e6, other_step=4e6)
    system = replace(SYSTEM, memory=1e9, efficiency=0.5)
    assert scaling.compute(model, system, 10) == pytest.approx((12e-3 + 34e-3) / 0.5)
    assert scaling.compute(model, replace(system, peak=1e11), 10) == pytest.approx((100e-3 + 34e-3) / 0.5)
    assert scaling.compute(replace(model, slowdown=3), system, 10) == pytest.approx(3 * 46e-3 / 0.5)


def test_published_speed_is_met():
    """The model of a static ResNet50 on an A100 gives the number that the share of the roofline is from."""
    found = scaling.models()
    update = update_of(found["configs/resnet50/resnet50.json"], scaling.systems(found)["DGX A100"], 1, 2560, 256)
    assert 2560 / update.compute == pytest.approx(2470)


def test_page_has_the_tables_of_the_script():
    page = (ROOT / "docs/scaling.md").read_text()
    assert scaling.written(page, scaling.models()) == page
    for _, _, _, source in scaling.INPUTS.values():
        assert source and source in page
    with pytest.raises(ValueError, match="no place for the table check"):
        scaling.written(page.replace("<!-- check -->", ""), scaling.models())


def test_inputs_are_those_of_the_project():
    from loading.fetching import AT_ONCE

    assert scaling.value("connections of a node") == AT_ONCE
    with open(ROOT / "configs/recipes/advanced.json") as file:
        assert f'"epochs": {scaling.EPOCHS}' in file.read()


def test_counts():
    """A convolution's two gradients take its operations each; the first one's image needs none."""
    import scaling_counts

    row = scaling_counts.counted("configs/resnet18/resnet18.json")
    stem = 64 * 3 * 49 * 112 * 112
    assert row["flops_per_image"] == pytest.approx(2 * (3 * 1.814e9 - stem), rel=1e-3)
    assert row["parameters"] == 11_689_512
    # weights are read twice, and their gradients are written, in bfloat16
    assert row["product_bytes_per_step"] == pytest.approx(3 * 2 * 11_689_512, rel=2e-3)
    kept = scaling.models()[row["config"]]
    assert (kept.parameters, kept.flops, kept.other_bytes) == tuple(
        row[name] for name in ("parameters", "flops_per_image", "other_bytes_per_image")
    )
    assert sum(size for size, _ in kept.buckets) == pytest.approx(4 * kept.parameters, rel=1e-3)


def _rebuilt(rank):
    """Sizes of the buckets of DistributedDataParallel after its first backward pass, and what this project computes."""
    import scaling_counts

    torch.manual_seed(0)
    model = build_model({"model": "kw_test_resnet", **KW}, num_classes=100)
    ready = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: ready.append((4 * p.numel(), len(ready))))
    net = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.1)
    # torch notes the sizes at the beginning of the third
    for _ in range(3):
        net(torch.randn(2, 3, 32, 32)).sum().backward()
    sizes = [int(size) for size in net._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")]
    once = ready[: len(ready) // 3]
    return sizes, [size for size, _ in scaling_counts.buckets(once, int(0.1 * 2**20), int(0.1 * 2**20))]


def test_buckets_are_those_of_torch():
    ((theirs, ours),) = in_processes(_rebuilt, world=1)
    assert len(theirs) > 2 and sorted(ours) == sorted(theirs) and math.fsum(ours) > 1e6


@pytest.mark.parametrize("words", [("none.json=5",), ("configs/resnet18/resnet18.json=fast",), ("x",)])
def test_wrong_speed_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--speed", *words])
    assert "--speed" in capsys.readouterr().err.splitlines()[-1]


def test_measured_speed(capsys):
    scaling.main(["--speed", "configs/resnet18/kw1x_resnet18.json=1000"])
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.split()[2] == "1000" and 7900 < int(second.split()[2]) <= 8000
