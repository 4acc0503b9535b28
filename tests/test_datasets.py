"""Data sets, transforms and samplers, against torchvision, scikit-learn and closed forms."""

import argparse
import gzip
import importlib.machinery
import importlib.util
import random

import numpy as np
import pytest
import torch
from helpers import EXIF_ORIENTATION, make_cifar, make_image_folder, quick, read_log
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data.auto_augment import rand_augment_transform
from torch.utils.data import DataLoader, get_worker_info
from torchvision import transforms

import main
from datasets import Loaders, make_data, make_loaders
from loading.images import CIFARData, UnreadableImage, read_image
from loading.readers import StreamData
from loading.sampling import EvalSampler, SeededData, TrainSampler
from loading.transforms import make_transform
from models.config import ConfigError, read_config
from models.options import OPTIONS
from utils import Process


def options(**changes):
    return argparse.Namespace(**{**{name: option.default for name, option in OPTIONS.items()}, **changes})


def process(rank=0, world=1):
    return Process(rank, world, rank, world, torch.device("cpu"))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 5, 10, 1001])
def test_evaluation_takes_every_image_once(size, world):
    shares = [list(EvalSampler(size, rank, world)) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(size))
    assert [len(share) for share in shares] == [len(EvalSampler(size, rank, world)) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_takes_the_same_permutation_in_all_processes(world):
    samplers = [TrainSampler(20, rank, world, seed=5) for rank in range(world)]
    epochs = []
    for epoch in range(2):
        for sampler in samplers:
            sampler.epoch = epoch
        shares = [[index for _, index in sampler] for sampler in samplers]
        assert {len(share) for share in shares} == {20 // world} == {len(sampler) for sampler in samplers}
        # interleaved, the shares are the order of a single process
        merged = [index for batch in zip(*shares) for index in batch]
        alone = TrainSampler(20, 0, 1, seed=5)
        alone.epoch = epoch
        assert merged == [index for _, index in alone][: len(merged)] and len(set(merged)) == len(merged)
        epochs.append(merged)
    assert epochs[0] != epochs[1]
    assert [index for _, index in TrainSampler(20, 0, 1, seed=6)] != [
        index for _, index in TrainSampler(20, 0, 1, seed=5)
    ]


def test_digits_are_those_of_scikit_learn():
    images, labels = load_digits(return_X_y=True)
    args = options(data_set="digits", input_size=8, imagenet_default_mean_and_std=False)
    train, test = make_data(args, True), make_data(args, False)
    assert (len(train), len(test)) == (1437, 360)
    assert np.bincount(test.labels).min() >= 34
    # every scan is in one of the two, and none in both
    stored = np.concatenate([train.images, test.images]).reshape(-1, 64).astype(int)
    expected = (images * 255 / 16).round().astype(int)
    assert sorted(map(bytes, stored.astype(np.uint8))) == sorted(map(bytes, expected.astype(np.uint8)))
    # at 8 x 8 the evaluation only normalises
    image, label = test[0]
    assert image.shape == (3, 8, 8) and label == test.labels[0]
    np.testing.assert_allclose((image[0].numpy() * 0.5 + 0.5) * 255, test.images[0], atol=1e-4)


def test_digits_are_split_by_scikit_learn():
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    for part, seed in zip(parts, (0, 9)):
        data = make_data(options(data_set="digits", input_size=8, seed=seed), part is parts[0])
        assert data.labels == labels[sorted(part)].tolist()
        expected = (images[sorted(part)] * 255 / 16).round().reshape(-1, 8, 8)
        assert (data.images == expected).all()


def test_digits_without_their_file(tmp_path, monkeypatch):
    package = importlib.machinery.ModuleSpec("sklearn", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    (tmp_path / "datasets/data").mkdir(parents=True)
    for content in (None, b"", gzip.compress(b"0,1,2"), gzip.compress(b"0,1,2")[:-9], gzip.compress(b"0,one")):
        if content is not None:
            (tmp_path / "datasets/data/digits.csv.gz").write_bytes(content)
        with pytest.raises(ConfigError, match=r"digits\.csv\.gz of scikit-learn cannot be read"):
            make_data(options(data_set="digits", input_size=8), True)


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_seed_epoch_and_index_alone(workers):
    args = options(data_set="digits", input_size=16)
    data = SeededData(make_data(args, True), seed=3)
    positions = [(0, 5), (1, 5), (0, 6)]
    expected = [data[position][0] for position in positions]
    assert not torch.equal(expected[0], expected[1])
    torch.manual_seed(workers)
    before = torch.get_rng_state()
    loader = DataLoader(data, sampler=positions[::-1], num_workers=workers, generator=torch.Generator())
    loaded = [image[0] for image, _ in loader]
    assert all(torch.equal(a, b) for a, b in zip(loaded[::-1], expected))
    # drop path and dropout draw from the same generator, and must not notice the loading
    assert torch.equal(torch.get_rng_state(), before)


def test_traditional_preprocessing_is_torchvision_s(tmp_path):
    args = options(traditional_preprocess=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    evaluation = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalise]
    )
    assert torch.equal(make_transform(args, False)(image), evaluation(image))
    training = transforms.Compose(
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise]
    )
    torch.manual_seed(0)
    expected = training(image)
    torch.manual_seed(0)
    assert torch.equal(make_transform(args, True)(image), expected)


@pytest.mark.parametrize(
    "size, crop_pct, resized", [(224, None, 256), (160, None, 182), (224, 0.95, 235), (32, None, 36), (384, None, None)]
)
def test_advanced_evaluation_sizes(size, crop_pct, resized):
    steps = make_transform(options(input_size=size, crop_pct=crop_pct), False).transforms
    assert steps[0].interpolation == transforms.InterpolationMode.BICUBIC
    if resized is None:
        assert tuple(steps[0].size) == (size, size) and not any(isinstance(s, transforms.CenterCrop) for s in steps)
    else:
        assert steps[0].size == resized and steps[1].size == (size, size)


def test_advanced_training_has_every_part():
    names = [type(step).__name__ for step in make_transform(options(), True).transforms]
    assert names == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "MaybeToTensor", "Normalize",
        "RandomErasing",
    ]  # fmt: skip
    names = [type(step).__name__ for step in make_transform(options(aa=None, reprob=0.0), True).transforms]
    assert "ColorJitter" in names and "RandAugment" not in names and "RandomErasing" not in names


def test_every_random_augmentation_works_at_its_strongest():
    """The recipe draws strengths up to the largest, where Pillow 13 refuses to posterise."""
    random.seed(0)
    augment = rand_augment_transform("rand-m10-mstd0-n60-inc1", {"translate_const": 4})
    for _ in range(5):
        assert augment(Image.new("RGB", (16, 16), (90, 120, 200))).size == (16, 16)


def test_bad_augmentation_policy_is_refused():
    with pytest.raises(ConfigError, match="rand-q9"):
        make_transform(options(aa="rand-q9"), True)


def test_image_modes_and_rotation(tmp_path):
    """Every kind of image becomes the same upright RGB picture."""
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :10] = 200
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    image.save(tmp_path / "rgb.png")
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png", transparency=0)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=100, exif=exif)
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    for path in sorted(tmp_path.iterdir()):
        read = read_image(str(path), path.name)
        assert read.mode == "RGB" and read.size == (30, 20), path.name
        assert np.abs(np.asarray(read).astype(int) - pixels).max() <= 12, path.name


@pytest.mark.parametrize("damage", ["half", "empty", "html", "missing"])
@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(tmp_path, damage, workers):
    root = make_image_folder(tmp_path, train=6, val=3)
    bad = root / "val" / "bee" / "1.JPEG"
    content = bad.read_bytes()
    data = make_data(options(data_path=str(root), input_size=32), False)
    bad.unlink()
    if damage != "missing":
        bad.write_bytes({"half": content[: len(content) // 2], "empty": b"", "html": b"<html></html>"}[damage])
    with pytest.raises(UnreadableImage) as caught:
        list(DataLoader(data, num_workers=workers))
    message = str(caught.value)
    assert message.startswith(str(bad)) and "\n" not in message


def test_folder_errors_name_the_folder(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            make_data(options(data_path=str(path)), True)
    root = make_image_folder(tmp_path / "data", train=6, val=3)
    (root / "val" / "cat").rename(root / "val" / "dog")
    args = options(data_path=str(root), input_size=32, batch_size=2, num_workers=0)
    with pytest.raises(ConfigError, match="cat, dog"):
        make_loaders(args, {}, process())


def test_classes_come_from_the_data(tmp_path):
    root = make_image_folder(tmp_path, train=6, val=3)
    args = options(data_path=str(root), input_size=32, batch_size=2, num_workers=0)
    assert make_loaders(args, {}, process()).nb_classes == 3
    with pytest.raises(ConfigError, match=r"1000.*3 classes"):
        make_loaders(args, {"nb_classes": 1000}, process())
    with pytest.raises(ConfigError, match="too few"):
        make_loaders(options(data_path=str(root), input_size=32, batch_size=4), {}, process(0, 2))


def test_image_folder_data_set(tmp_path):
    root = make_image_folder(tmp_path, train=6, val=5)
    names = {"data_set": "image_folder", "data_path": str(root / "train"), "eval_data_path": str(root / "val")}
    args = options(**names, input_size=32, batch_size=2, num_workers=0)
    loaders = make_loaders(args, {}, process())
    assert (len(loaders.train.dataset), len(loaders.evaluation.dataset), loaders.nb_classes) == (6, 5, 3)
    with pytest.raises(ConfigError, match="eval_data_path"):
        make_loaders(options(data_set="image_folder", data_path=str(root / "train")), {}, process())


CIFARS = pytest.mark.parametrize("name, classes", [("CIFAR", 100), ("CIFAR100", 100), ("CIFAR10", 10)])


@CIFARS
@pytest.mark.parametrize("inside", [False, True], ids=["the folder above", "the folder itself"])
def test_cifar_is_read_from_its_binary_version(tmp_path, name, classes, inside):
    drawn = make_cifar(tmp_path, f"CIFAR{classes}")
    root = next(tmp_path.iterdir()) if inside else tmp_path
    args = options(data_set=name, data_path=str(root), input_size=32, batch_size=2, num_workers=0)
    loaders = make_loaders(args, {}, process())
    assert loaders.nb_classes == classes
    for split, loader in (("train", loaders.train), ("test", loaders.evaluation)):
        data = loader.dataset if split == "test" else loader.dataset.data
        assert len(data) == len(drawn[split])
        data.transform = np.asarray
        for (image, label), (expected, planes) in zip(map(data.__getitem__, range(len(data))), drawn[split]):
            assert label == expected
            # the planes one after the other, row by row
            assert np.moveaxis(image, 2, 0).tobytes() == planes


@pytest.mark.parametrize("head, name", [(b"\x09", "CIFAR10"), (b"\x13\x63", "CIFAR100")])
def test_cifar_planes_are_red_green_and_blue(tmp_path, head, name):
    red, green, blue = bytearray(1024), bytearray(1024), bytearray(1024)
    # the second pixel of the first row, the first of the second row, the last of all
    red[1], green[32], blue[1023] = 200, 150, 100
    make_cifar(tmp_path, name)
    path = next(tmp_path.rglob("test*.bin"))
    path.write_bytes(head + bytes(red + green + blue))
    data = CIFARData(name, tmp_path, False, lambda image: image)
    (image, label) = data[0]
    assert len(data) == 1 and label == head[-1] and image.mode == "RGB" and image.size == (32, 32)
    pixels = {(x, y): image.getpixel((x, y)) for x in range(32) for y in range(32)}
    lit = {position: pixel for position, pixel in pixels.items() if any(pixel)}
    assert lit == {(1, 0): (200, 0, 0), (0, 1): (0, 150, 0), (31, 31): (0, 0, 100)}


@CIFARS
def test_cifar_says_where_to_get_it(tmp_path, name, classes):
    archive = rf"https://www\.cs\.toronto\.edu/~kriz/cifar-{classes}-binary\.tar\.gz"
    args = options(data_set=name, data_path=str(tmp_path), input_size=32)
    for is_train in (True, False):
        with pytest.raises(ConfigError, match=rf"no CIFAR{classes} here.*is missing.*{archive}"):
            make_data(args, is_train)
    # pickles are named, not read
    python = tmp_path / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    python.mkdir()
    for file in ("data_batch_1", "test_batch") if classes == 10 else ("train", "test"):
        (python / file).write_bytes(b"not even a pickle")
    for root in (tmp_path, python):
        for is_train in (True, False):
            with pytest.raises(ConfigError, match=rf"{root}: .*only its Python version is.*{archive}"):
                make_data(options(data_set=name, data_path=str(root), input_size=32), is_train)
    make_cifar(tmp_path, f"CIFAR{classes}")
    next(tmp_path.rglob("data_batch_4.bin" if classes == 10 else "train.bin")).unlink()
    with pytest.raises(ConfigError, match=r"no CIFAR10 here .*data_batch_4.bin" if classes == 10 else "no CIFAR100"):
        make_data(args, True)
    assert len(make_data(args, False)) == 11


@pytest.mark.parametrize("name, bad_label", [("CIFAR10", b"\x0a"), ("CIFAR100", b"\x00\x64")])
def test_damaged_cifar_is_named(tmp_path, name, bad_label):
    make_cifar(tmp_path, name)
    path = next(tmp_path.rglob("test*.bin"))
    args = options(data_set=name, data_path=str(tmp_path), input_size=32)
    content = path.read_bytes()
    length = len(bad_label) + 3072
    damages = {
        "no multiple": content[:-1],
        f"image 1 has the label {bad_label[-1]}": content[:length] + bad_label + content[length + len(bad_label) :],
        "holds no images": b"",
    }
    for message, damaged in damages.items():
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=message) as caught:
            make_data(args, False)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert len(make_data(args, True)) == 13


def test_cifar_recipe_is_padding_crop_and_flip(tmp_path):
    """Kernel Representation, section 4.1: 4 pixels on each side, a random 32 x 32 region, a flip, normalised."""
    args = options(**read_config({"recipe": "cifar"}), data_set="CIFAR10")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    to_tensor = [transforms.ToTensor(), normalise]
    assert torch.equal(make_transform(args, False)(image), transforms.Compose(to_tensor)(image))
    training = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *to_tensor])
    for seed in range(4):
        torch.manual_seed(seed)
        expected = training(image)
        torch.manual_seed(seed)
        assert torch.equal(make_transform(args, True)(image), expected)


@pytest.mark.parametrize("name, classes", [("CIFAR10", 10), ("CIFAR100", 100)])
def test_cifar_trains_and_is_evaluated(tmp_path, name, classes, capsys):
    make_cifar(tmp_path / "data", name)
    common = {"data_set": name, "data_path": tmp_path / "data", "recipe": "cifar", "input_size": 32, "batch_size": 4}
    assert main.main(quick(**common, epochs=1, output_dir=tmp_path / "out")) == 0
    (line,) = read_log(tmp_path / "out")
    assert 0 <= line["test_acc1"] <= 100
    assert f"{classes} classes" in capsys.readouterr().out
    assert main.main(quick(**common, eval=True, resume=tmp_path / "out" / "checkpoint-0.pth")) == 0
    assert "* Acc@1 " in capsys.readouterr().out


class Shards:
    """As timm's readers of streams: the images of a process, divided among its loader processes."""

    def __init__(self, rank, world):
        self.share, self.num_samples = range(rank, 24, world), 24

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return len(self.share)

    def __iter__(self):
        worker = get_worker_info()
        for index in self.share[worker.id :: worker.num_workers] if worker else self.share:
            yield Image.new("RGB", (4, 4), (index, 0, 0)), index


@pytest.mark.parametrize("workers", [0, 2])
def test_random_choices_in_streams(workers):
    """They differ between images, processes and epochs, and a resumed run makes those of the unbroken one."""

    def draws(rank, epochs):
        transform = lambda image: torch.tensor([random.random(), np.random.rand(), torch.rand(1).item()])  # noqa: E731
        data = StreamData(Shards(rank, 2), transform, True, seed=3)
        data.rank = rank
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(data, 3, num_workers=workers, persistent_workers=workers > 0, generator=generator)
        loaders, result = Loaders(loader, None, 24), []
        for epoch in epochs:
            loaders.set_epoch(epoch)
            result.append(
                {int(label): tuple(row) for rows, labels in loader for row, label in zip(rows.tolist(), labels)}
            )
        return result

    first, second = draws(0, range(3)), draws(1, range(3))
    assert [len(epoch) for epoch in first + second] == [12] * 6
    for generator in range(3):
        assert len({row[generator] for epoch in first + second for row in epoch.values()}) == 6 * 12
    assert draws(1, [2]) == second[2:]


class ShuffledShards(Shards):
    """As timm's reader of TFDS: every loader process shuffles with its seed; without any, the reader's seed counts."""

    def __init__(self, rank, world):
        super().__init__(rank, world)
        self.worker_seed, self.workers = 0, None

    def set_loader_cfg(self, workers):
        self.workers = workers

    def __iter__(self):
        worker = get_worker_info()
        draws = random.Random(worker.seed if worker else self.worker_seed)
        for image, _ in super().__iter__():
            yield image, draws.randrange(1 << 40)


def shuffled(monkeypatch, rank, world, **changes):
    """What the reader of a run draws in an epoch, and the number of loader processes."""
    args = options(data_set="tfds/x", data_path="x", batch_size=4, disable_eval=True, **changes)
    data = StreamData(ShuffledShards(rank, world), transforms.ToTensor(), True, args.seed)
    monkeypatch.setattr("datasets.make_data", lambda *arguments, **named: data)
    loaders = make_loaders(args, {}, process(rank, world))
    assert data.reader.workers == loaders.train.num_workers
    return [draw for _, labels in loaders.train for draw in labels.tolist()], loaders.train.num_workers


@pytest.mark.parametrize("workers", [0, 1])
def test_readers_of_streams_shuffle_differently_in_every_process(monkeypatch, workers):
    (alone, workers_alone), first, again, second, other = (
        shuffled(monkeypatch, rank, world, num_workers=workers, seed=seed)
        for rank, world, seed in ((0, 1, 0), (0, 2, 0), (0, 2, 0), (1, 2, 0), (0, 2, 1))
    )
    assert first == again and len(first[0]) == 12 and len(alone) == 24 and workers_alone == workers
    assert not set(first[0]) & set(second[0]) and not set(first[0]) & set(other[0])
    # timm divides the images of TFDS by loader processes, and gives all processes the same ones without any
    assert first[1] == second[1] == 1


def test_timm_reader_string(tmp_path):
    """A folder through timm's own reader gives the images of the plain folder."""
    root = make_image_folder(tmp_path, train=6, val=5)
    common = {"data_path": str(root), "input_size": 32, "batch_size": 2, "num_workers": 0}
    plain = make_data(options(**common), False)
    read = make_data(options(**common, data_set="folder/"), False)
    key = lambda sample: (sample[1], sample[0].sum().item())  # noqa: E731
    assert sorted(map(key, map(plain.__getitem__, range(5)))) == sorted(map(key, map(read.__getitem__, range(5))))
    assert read.classes == plain.classes
    with pytest.raises(ConfigError, match="wds/nosuch"):
        make_data(options(**common, data_set="wds/nosuch"), False)
