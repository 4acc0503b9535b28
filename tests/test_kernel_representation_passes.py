"""Nothing of a forward pass of Kernel Representation meets another one, or outlives it, in any surroundings."""

import copy
import io
import threading
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from layer_checks import counting_backend
from naive_representation import LAYERS, SETTINGS, Net, assert_empty, image, make_net, relay_of
from processes import in_processes
from timm.utils import ModelEmaV3
from tolerance import RELATIVE, assert_same, difference
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from models import build_model, convert


def test_nothing_outlives_a_forward_pass():
    for net in (make_net(), make_net(classes=0)):
        for batch in (2, 5, 1):
            assert torch.equal(net(image(batch)), net(image(batch)))
            assert_empty(net)


@pytest.mark.parametrize("name", ["conv", "mlp.fc1", "mlp.fc2", "head"])
def test_nothing_outlives_an_exception(name):
    net = make_net()
    expected = net(image())

    def fail(module, args):
        raise KeyError("stopped")

    handle = net.get_submodule(name).register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="stopped"):
        net(image(4))
    assert_empty(net)
    handle.remove()
    assert torch.equal(net(image()), expected)


@pytest.mark.parametrize("backbone", ["vit_nano_cifar", "test_resnet", "mobilenetv2_050"])
def test_features_and_head_apart(backbone):
    """timm's two halves of a forward pass, of two images at once."""
    model = build_model({"model": f"kr_{backbone}"}, num_classes=5).eval()
    inputs = [image(batch, 32, torch.float32) for batch in (2, 3)]
    expected = [model(x) for x in inputs]
    features = [model.forward_features(x) for x in inputs]
    assert_empty(model)
    for value, y in zip(features[::-1], expected[::-1]):
        assert torch.equal(model.forward_head(value), y)
        assert_empty(model)
    # of other features nobody knows the representation
    with pytest.raises(RuntimeError, match="out of order"):
        model.forward_head(features[0].clone())
    assert_empty(model)


def test_features_alone_keep_nothing_alive():
    model = build_model({"model": "kr_vit_nano_cifar"}, num_classes=5)
    kept = []
    handle = model.blocks[-1].mlp.fc1.fusion.register_forward_hook(lambda *a: kept.append(weakref.ref(a[2])))
    features = model.forward_features(image(2, 32, torch.float32))
    assert features.requires_grad and kept[0]() is not None
    del features
    assert kept[0]() is None
    # layers that somebody else calls one after the other
    x = model.norm(model.blocks(model._pos_embed(model.patch_embed(image(2, 32, torch.float32)))))
    assert_empty(model)
    del x
    assert kept[1]() is None
    handle.remove()


def test_a_pass_within_a_pass():
    """A hook that runs the model again, whole or half, and one that fails in it."""
    net = build_model({"model": "kr_vit_nano_cifar"}, num_classes=5).eval()
    x, other = image(2, 32, torch.float32), image(3, 32, torch.float32)
    expected, inner = net(x), net(other)
    for call in (net, lambda x: net.forward_head(net.forward_features(x)), lambda x: net.forward_features(x[:, :1])):
        seen = []

        def again(module, args, output, call=call, seen=seen):
            if not seen:
                seen.append(None)
                try:
                    seen.append(call(other))
                except RuntimeError as error:
                    seen.append(error)

        for place in (net.patch_embed, net.blocks[0].mlp.fc1, net.blocks[-1], net.norm):
            seen.clear()
            handle = place.register_forward_hook(again)
            assert torch.equal(net(x), expected)
            handle.remove()
            assert isinstance(seen[1], RuntimeError) or torch.equal(seen[1], inner)
            assert_empty(net)


def test_threads_do_not_meet():
    """Two passes of different batches that wait for each other before every layer."""
    net = make_net()
    inputs = [image(2), image(5)]
    expected = [net(x) for x in inputs]
    barrier, results, errors = threading.Barrier(2, timeout=60), [None, None], []

    def wait(module, args):
        barrier.wait()

    handles = [net.get_submodule(name).register_forward_pre_hook(wait) for name in LAYERS]

    def run(i):
        try:
            for _ in range(3):
                results[i] = net(inputs[i])
            assert_empty(net)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    assert not errors, errors
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (lambda net: net.conv(torch.randn(2, 8, 5, 5).double()), ["'conv'", "after the model's first layer"]),
        (lambda net: net.mlp(torch.randn(2, 4, 12).double()), ["'mlp.fc1'", "after 'pointwise'"]),
        (lambda net: net.head(torch.randn(2, 12).double()), ["'head'", "after 'mlp.fc2'"]),
        (lambda net: [net.stem(image()), net.conv(torch.randn(3, 8, 6, 6).double())] * 2 + [net.conv(
            torch.randn(3, 8, 6, 6).double())], ["'conv'", "once"]),
    ],
    ids=["alone", "mlp", "classifier", "twice"],
)  # fmt: skip
def test_out_of_order_is_an_error(run, named):
    net = make_net()
    with pytest.raises(RuntimeError) as error:
        run(net)
    assert all(word in str(error.value) for word in named) and "\n" not in str(error.value)
    assert torch.equal(net(image()), net(image()))


def test_gradient_checkpointing_is_an_error():
    model = build_model({"model": "kr_vit_nano_cifar"}, num_classes=5).train()
    model.set_grad_checkpointing()
    loss = model(image(2, 32, torch.float32)).sum()
    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        loss.backward()


def test_samples_are_independent_in_eval_mode():
    net = make_net()
    together = net(image(4))
    for i in range(4):
        assert difference(net(image(4)[i : i + 1])[0], together[i]) < 1e-12


def test_single_sample_in_train_mode():
    net = make_net()
    expected, before = net(image(1)), copy.deepcopy(net.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        result = net.train()(image(1))
    assert len([w for w in caught if "running statistics" in str(w.message)]) == 1
    assert_same(result, expected)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


# --- copies and surroundings ------------------------------------------------------------


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "ema": lambda model: ModelEmaV3(model, decay=0.5).module}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole_and_apart(how):
    net = make_net()
    other = COPIES[how](net)
    expected = net(image())
    assert torch.equal(other(image()), expected)
    assert other.state_dict().keys() == net.state_dict().keys()
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in net.parameters()}
    relay = relay_of(other)
    assert relay is not relay_of(net)
    assert all(m._relay is relay for m in other.modules() if hasattr(m, "_relay"))
    # the hooks are the copy's own
    with torch.no_grad():
        other.kernel_representation.start.weight += 1
    assert difference(other(image()), expected) > 1e-3
    assert torch.equal(net(image()), expected)
    assert_empty(other)


def test_hooks_of_an_unpickled_model_are_not_overwritten(monkeypatch):
    """A new process counts its hooks from 0 again."""
    file = io.BytesIO()
    net = make_net()
    torch.save(net, file)
    file.seek(0)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    other = torch.load(file, weights_only=False)
    last = max(other.stem._forward_pre_hooks)
    for _ in range(last + 2):
        other.stem.register_forward_pre_hook(lambda *_: None)
        other.register_forward_hook(lambda *_: None)
    assert torch.equal(other(image()), net(image()))


def test_state_dict_round_trip():
    net, other = make_net(), make_net()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(image()), net(image()))
    assert not [key for key in net.state_dict() if "temperature" in key]


def test_ema_follows():
    net = make_net()
    ema = ModelEmaV3(net, decay=0.75)
    before = net.kernel_representation.start.weight.clone()
    with torch.no_grad():
        net.kernel_representation.start.weight += 1
    ema.update(net)
    assert_same(ema.module.kernel_representation.start.weight, before + 0.25)


def _ddp_gradients(rank, state):
    net = convert(Net(), "kr", **SETTINGS).double().eval()
    net.load_state_dict(state)
    parallel = DistributedDataParallel(net)
    for _ in range(2):
        # the second pass would complain of parameters without a gradient
        net.zero_grad()
        parallel(image(4)[rank * 2 : rank * 2 + 2]).square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters()}


def test_distributed_data_parallel(tmp_path):
    net = make_net(training=True)
    other = copy.deepcopy(net)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(net)
        for _ in range(2):
            # the second pass would complain of parameters without a gradient
            for model in (parallel, other):
                model.zero_grad()
                model(image(4)).square().mean().backward()
            assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), other.parameters()))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one():
    net = make_net()
    gradients, _ = in_processes(_ddp_gradients, net.state_dict())
    net(image(4)).square().mean().backward()
    for key, parameter in net.named_parameters():
        assert difference(gradients[key], parameter.grad) < 1e-10, key


@pytest.mark.parametrize("settings", [{}, {"representation": False}, {"representation_start": "learned"}], ids=str)
def test_compile_without_graph_breaks(settings):
    net = make_net(dtype=torch.float32, **settings)
    graphs = []
    compiled = torch.compile(net, backend=counting_backend(graphs), fullgraph=True)
    for batch in range(1, 5):
        assert_same(compiled(image(batch, 12, torch.float32)), net(image(batch, 12, torch.float32)))
    # one for the first batch size, one for all others
    assert len(graphs) <= 2


def test_compiled_gradients():
    net = make_net(training=True, dtype=torch.float32)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = image(4, 12, torch.float32)
    values = torch.autograd.grad(compiled(x).square().sum(), list(net.parameters()))
    assert_empty(net)
    references = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    # observed at most 4e-6
    assert max(difference(v, r) for v, r in zip(values, references)) < 1e-4


@pytest.mark.slow
def test_inductor():
    net = make_net(dtype=torch.float32)
    x = image(4, 12, torch.float32)
    compiled = torch.compile(net, fullgraph=True)
    assert_same(compiled(x), net(x))
    compiled(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_export():
    net = make_net(dtype=torch.float32)
    x = image(2, 12, torch.float32)
    program = torch.export.export(net, (x,))
    assert_same(program.module()(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_network_in_another_type(dtype):
    net = make_net()
    expected = net(image())
    y = net.to(dtype)(image(dtype=dtype))
    assert y.dtype == dtype
    # a dozen layers of rounding; observed 6e-7 and 2e-2
    assert difference(y, expected) <= 5 * RELATIVE[dtype]


def test_autocast():
    net = make_net(dtype=torch.float32)
    x = image(3, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = net.train()(x)
        y.float().sum().backward()
        result = net.eval()(x)
    assert y.dtype == torch.bfloat16 and all(p.grad.isfinite().all() for p in net.parameters())
    assert difference(result, net(x)) <= 5 * RELATIVE[torch.bfloat16]


def test_channels_last():
    net = make_net(dtype=torch.float32, kernel_num=4)
    x = image(2, 12, torch.float32)
    expected = net(x)
    net.to(memory_format=torch.channels_last)
    assert net.conv.weight.is_contiguous()
    assert_same(net(x.to(memory_format=torch.channels_last)), expected)
