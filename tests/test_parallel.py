"""How processes exchange gradients: torch's defaults and this project's settings agree, and bfloat16 comes close."""

import contextlib
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import KW, ROOT, launch, quick, read_log, refused
from processes import in_processes
from states import difference_of
from tolerance import assert_same, difference

import utils
from checkpoints import read
from models import build_model
from models.config import ConfigError

MODEL = {"model": "kw_test_resnet", **KW}
DEFAULTS = {"gradient_as_bucket_view": False}


def _trained(net, rank, updates=3):
    """Weights after updates of two batches each, the first of which is not exchanged; and the gradient of the first."""
    gradient = None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(updates):
        optimizer.zero_grad(set_to_none=True)
        for waits in (True, False):
            with net.no_sync() if waits else contextlib.nullcontext():
                net(torch.randn(4, 3, 32, 32, generator=generator)).square().mean().backward()
        if gradient is None:
            gradient = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()]), gradient


def _exchanged(rank):
    """Weights, gradients and the types that were sent: with torch's defaults, with this project's, with bfloat16."""
    results, sent = {}, []
    original = dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: sent.append(tensor.dtype) or original(tensor, *args, **kwargs)
    for name, arguments in {"torch's": DEFAULTS, "ours": {}, "bf16": {"compression": "bf16"}}.items():
        torch.manual_seed(0)
        net = utils.in_parallel(build_model(MODEL, num_classes=3), torch.device("cpu"), **arguments)
        sent.clear()
        results[name] = (*_trained(net, rank), set(sent))
    return results


def test_settings_change_no_gradient_and_bfloat16_changes_it_little():
    first, second = in_processes(_exchanged)
    for name in first:
        assert torch.equal(first[name][0], second[name][0]), f"{name}: the processes have different weights"
    (weights, gradient, _), (own_weights, own_gradient, sent) = first["torch's"], first["ours"]
    assert torch.equal(weights, own_weights) and torch.equal(gradient, own_gradient) and not sent
    rounded_weights, rounded_gradient, sent = first["bf16"]
    assert sent == {torch.bfloat16}
    assert_same(rounded_gradient, gradient, torch.bfloat16)
    assert_same(rounded_weights, weights, torch.bfloat16)
    assert difference(rounded_gradient, gradient) > 0


@pytest.mark.parametrize("message", ["Invalid scalar type", "Unconvertible NCCL type BFloat16"])
def test_compression_is_refused_where_sums_are_impossible(message, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")

    def fails(tensor):
        assert tensor.dtype == torch.bfloat16
        raise RuntimeError(message)

    monkeypatch.setattr(dist, "all_reduce", fails)
    with pytest.raises(ConfigError, match=r"--grad_compression: gloo of torch .* leave it at none"):
        utils._require_sums(torch.bfloat16, torch.device("cpu"))
    message = "Connection closed by peer"
    with pytest.raises(RuntimeError, match="Connection closed"):
        utils._require_sums(torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("value", ["fp16", "true"])
def test_other_compressions_are_refused(value, tmp_path, capsys):
    assert "--grad_compression" in refused(capsys, quick(grad_compression=value))
    config = tmp_path / "config.json"
    config.write_text(f'{{"model": "test_resnet", "grad_compression": "{value}"}}')
    assert "grad_compression" in refused(capsys, ["--kw_config", str(config), "--data_set", "digits"])
    config.write_text('{"model": "test_resnet", "grad_compresion": "bf16"}')
    assert "grad_compression" in refused(capsys, ["--kw_config", str(config), "--data_set", "digits"])


@pytest.mark.slow
def test_compressed_run_is_resumed_exactly(tmp_path):
    """Three processes: the order of the gradients in the buckets decides how sums are rounded."""
    options = {"epochs": 2, "batch_size": 48, "update_freq": 2, "grad_compression": "bf16"}
    one, two = tmp_path / "one", tmp_path / "two"
    done = launch(quick(**options, output_dir=one), "torchrun", 3)
    assert done.returncode == 0, done.stderr
    two.mkdir()
    for name in ("checkpoint-0.pth", "log.txt"):
        (two / name).write_bytes((one / name).read_bytes())
    done = launch(quick(**options, output_dir=two), "torchrun", 3)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr
    ours, theirs = read(two / "checkpoint-1.pth"), read(one / "checkpoint-1.pth")
    assert difference_of(ours, theirs) == [] and read_log(two) == read_log(one)
    # without compression the run is another one, and the log says so
    plain = launch(quick(**{**options, "grad_compression": "none"}, resume=one / "checkpoint-0.pth"), "torchrun", 3)
    assert plain.returncode == 0 and "grad_compression bf16 -> none" in plain.stdout, plain.stderr


@pytest.mark.slow
def test_benchmark_of_settings():
    config = ROOT / "configs/mobilenetv2_050/kw1x_mobilenetv2_050.json"
    arguments = ["--kw_config", config, "--batch_size", "2", "--input_size", "32", "--repeats", "2"]
    command = [sys.executable, ROOT / "scripts/benchmark_parallel.py", *arguments, "--settings", "buckets of 1 MiB"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "2,854,522 values, 10.9 MiB" in done.stdout
    found = dict(re.findall(r"^  (\S.*?) +(\d+) buckets", done.stdout, re.MULTILINE))
    assert set(found) == {"torch's defaults", "this project's", "buckets of 1 MiB"}
    # the first bucket has at most 1 MiB and a parameter; the others 25 MiB
    assert int(found["this project's"]) == 2 < int(found["buckets of 1 MiB"])
