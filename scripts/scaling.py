#!/usr/bin/env python
"""Estimate how long training takes on 1 to 512 GPUs, and write the tables of docs/scaling.md.

    python scripts/scaling.py --page docs/scaling.md
    python scripts/scaling.py --speed configs/resnet18/kw1x_resnet18.json=5200 --system "DGX A100"

It is arithmetic over published numbers, not a measurement: `INPUTS` has each with its source. The page says what is
assumed. --speed replaces the computed speed of one GPU (training, images per second) by a measured one, and prints the
row of that config.
"""

import argparse
import csv
import re
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GPUS = (1, 8, 16, 32, 64, 128, 256, 512)
EPOCHS, IMAGES_PER_UPDATE, MICRO_BATCH = 300, 4096, 128
IMAGES, DATA_BYTES = 1_281_167, 147_897_477_120
MIB = 2**20

NVIDIA = "https://github.com/NVIDIA"
EXAMPLES = f"{NVIDIA}/DeepLearningExamples, PyTorch ResNet50 v1.5, 1 GPU, mixed precision, container 21.03"
TUNING = f"{NVIDIA}/nccl, src/graph/tuning.cc"
A100 = "NVIDIA A100 datasheet (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf)"
BASEPOD = "NVIDIA DGX BasePOD reference architecture, core components (docs.nvidia.com/dgx-basepod)"
AWS = "https://docs.aws.amazon.com"
# name -> (value in SI units, unit to print, factor of it, source)
INPUTS = {
    "A100 80GB, bfloat16, dense": (312e12, "TFLOP/s", 1e12, A100),
    "A100 80GB, memory": (2039e9, "GB/s", 1e9, A100),
    "A100, all-reduce within a node (bus bandwidth)": (235e9, "GB/s", 1e9, f"{TUNING} (limit of its model for 8.0)"),
    "DGX A100, network of a node: 8 x 200 Gb/s": (200e9, "GB/s", 1e9, "NVIDIA DGX A100 user guide"),
    "DGX A100, cores of a node: 2 x 64": (128, "cores", 1, "NVIDIA DGX A100 user guide"),
    "H100 SXM, bfloat16, dense": (989e12, "TFLOP/s", 1e12, "NVIDIA H100 datasheet (1,979 with sparsity)"),
    "H100 SXM, memory": (3350e9, "GB/s", 1e9, "NVIDIA H100 datasheet"),
    "H100 SXM, NVLink in one direction": (450e9, "GB/s", 1e9, "NVIDIA H100 datasheet (900 in both)"),
    "DGX H100, network of a node: 8 x 400 Gb/s": (400e9, "GB/s", 1e9, BASEPOD),
    "DGX H100, cores of a node: 2 x 56": (112, "cores", 1, BASEPOD),
    "Ethernet, network of a node: 1 x 10 Gb/s": (1.25e9, "GB/s", 1e9, "IEEE 802.3ae"),
    "step of a ring over NVLink": (3.4e-6, "us", 1e-6, f"{TUNING} (ring, simple)"),
    "step of a ring over the network": (9.6e-6, "us", 1e-6, f"{TUNING} (ring, simple)"),
    "ResNet50 trained on an A100": (2470, "images/s", 1, EXAMPLES),
    "ResNet50 trained on a V100 16GB": (1200, "images/s", 1, EXAMPLES),
    "V100, float16": (125e12, "TFLOP/s", 1e12, "NVIDIA V100 datasheet"),
    "V100, memory": (900e9, "GB/s", 1e9, "NVIDIA V100 datasheet"),
    "training images": (IMAGES, "images", 1, "ImageNet, ILSVRC 2012"),
    "their bytes": (DATA_BYTES, "GB", 1e9, "ILSVRC2012_img_train.tar"),
    "gp3 volume, baseline": (125 * MIB, "MB/s", 1e6, f"{AWS}/ebs/latest/userguide/general-purpose.html"),
    "gp3 volume, operations, baseline": (3000, "1/s", 1, f"{AWS}/ebs/latest/userguide/general-purpose.html"),
    "gp3 volume, at most": (1000 * MIB, "MB/s", 1e6, f"{AWS}/ebs/latest/userguide/general-purpose.html (2020 to 2025)"),
    "object store, one connection": (
        87.5e6, "MB/s", 1e6, f"{AWS}/AmazonS3/latest/userguide/optimizing-performance-design-patterns.html (85 to 90)"
    ),
    "connections of a node": (4, "", 1, "AT_ONCE of loading/fetching.py"),
}  # fmt: skip

# images per second at inference, by method and setting: the released code, ResNet50, batch 100 on a TITAN X
PAPER = "KernelWarehouse, Tables 12 and 16"
PAPER_SPEEDS = {
    ("static", ""): 647.0, ("dyconv", "4x"): 322.7, ("odconv", "4x"): 142.3, ("kw", "1/2x"): 227.8,
    ("kw", "1x"): 265.4, ("kw", "4x"): 191.1,
}  # fmt: skip
BACKBONES = {"resnet18": "ResNet18", "resnet50": "ResNet50", "convnext_tiny": "ConvNeXt-Tiny"}
METHODS = {"static": "static", "dyconv": "DY-Conv", "odconv": "ODConv", "kw": "KW"}


def value(name):
    return INPUTS[name][0]


@dataclass(frozen=True)
class System:
    """Nodes of 8 GPUs; operations, bytes and images per second.

    Args:
        peak, memory: operations of products, and bytes of the memory, of a GPU.
        link: bytes that a GPU sends to another one of its node.
        network: bytes that a node sends to another one.
        cores: of a node.
        hop, far_hop: seconds of a step of a ring within a node, and between two.
        decode: images that a core reads and prepares per second.
        storage: images per second that the storage gives a node; None: it is no limit.
        efficiency: share of the roofline that is reached.
        node: GPUs of a node.
    """

    peak: float
    memory: float
    link: float
    network: float
    cores: int
    hop: float = 3.4e-6
    far_hop: float = 9.6e-6
    decode: float = float("inf")
    storage: float | None = None
    efficiency: float = 1.0
    node: int = 8


@dataclass(frozen=True)
class Model:
    """What scripts/scaling_counts.py counts of a model, per image and per step.

    Args:
        buckets: bytes of each, and the share of the backward pass after which it is ready.
        slowdown: factor of the computed time.
    """

    parameters: int
    flops: float
    product_bytes: float
    product_step: float
    other_bytes: float
    other_step: float
    buckets: tuple[tuple[float, float], ...]
    slowdown: float = 1.0


def compute(model, system, batch):
    """Seconds of a forward and backward pass of a GPU on `batch` images.

    Products take as long as their operations or their bytes, the longer of the two; everything else as its bytes.
    """
    products = model.product_bytes * batch + model.product_step
    others = model.other_bytes * batch + model.other_step
    roofline = max(model.flops * batch / system.peak, products / system.memory) + others / system.memory
    return roofline / system.efficiency * model.slowdown


def ring(count, gpus, system):
    """Seconds to add `count` bytes over the GPUs by a ring: 2 (n - 1) / n of them pass every link, in 2 (n - 1) steps.

    Between nodes, as many rings as there are network cards divide the bytes, and so have a node's whole network.
    """
    nodes = -(-gpus // system.node)
    slowest = system.link if nodes == 1 else min(system.link, system.network)
    far = 2 * (nodes - 1)
    return 2 * (gpus - 1) / gpus * count / slowest + (2 * (gpus - 1) - far) * system.hop + far * system.far_hop


def exposed(buckets, backward, gpus, system, compression=1.0):
    """Seconds of the exchange after the end of a backward pass. Buckets are sent one after another, once ready."""
    if gpus == 1:
        return 0.0
    end = 0.0
    for count, ready in buckets:
        end = max(end, ready * backward) + ring(count * compression, gpus, system)
    return max(0.0, end - backward)


@dataclass(frozen=True)
class Update:
    """Seconds of an optimizer update, and its images. It takes the longer of the GPUs' work and the loader's."""

    images: int
    compute: float
    exposed: float
    optimizer: float
    loading: float

    @property
    def seconds(self):
        return max(self.compute + self.exposed + self.optimizer, self.loading)

    @property
    def speed(self):
        return self.images / self.seconds

    @property
    def bound(self):
        """What takes the longest."""
        work = self.compute + self.exposed + self.optimizer
        return "loader" if self.loading > work else "exchange" if self.exposed > self.compute else "GPU"

    def hours(self, epochs=EPOCHS):
        return epochs * IMAGES / self.speed / 3600


def update_of(model, system, gpus, images=IMAGES_PER_UPDATE, micro=MICRO_BATCH, compression=1.0):
    """An update of `images`, in batches of at most `micro` images a GPU, of which the last exchanges the gradients."""
    micro = min(micro, images // gpus)
    batches = images // (gpus * micro)
    one = compute(model, system, micro)
    nodes = -(-gpus // system.node)
    # fewer GPUs than a node has come with their share of its cores
    cores = system.cores * gpus / system.node
    rate = min(cores * system.decode, float("inf") if system.storage is None else nodes * system.storage)
    return Update(
        images=gpus * micro * batches,
        compute=batches * one,
        # the backward pass is two thirds of both
        exposed=exposed(model.buckets, one * 2 / 3, gpus, system, compression),
        # AdamW reads weight, gradient and two averages, and writes all but the gradient, in float32
        optimizer=7 * 4 * model.parameters / system.memory,
        loading=gpus * micro * batches / rate,
    )


def models(path=ROOT / "results/scaling_models.csv"):
    """Config -> its counts."""
    result = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            buckets = (pair.split("@") for pair in row["buckets"].split())
            names = ("flops_per_image", "product_bytes_per_image", "product_bytes_per_step")
            numbers = [float(row[name]) for name in (*names, "other_bytes_per_image", "other_bytes_per_step")]
            sent = tuple((float(size) * MIB, float(share)) for size, share in buckets)
            result[row["config"]] = Model(int(row["parameters"]), *numbers, sent)
    return result


def decoding(path=ROOT / "results/loading.csv"):
    """Images per second and core: the fastest loader over the threads of the machine that measured it."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["what"].startswith("loader")]
    threads = int(re.search(r"(\d+) threads", rows[0]["device"])[1])
    return max(float(row["images_per_s"]) for row in rows) / threads


def efficiency(gpu, found):
    """The published speed of ResNet50 over its roofline."""
    names = {"A100": ("A100 80GB, bfloat16, dense", "A100 80GB, memory", "ResNet50 trained on an A100"),
             "V100": ("V100, float16", "V100, memory", "ResNet50 trained on a V100 16GB")}  # fmt: skip
    peak, memory, speed = map(value, names[gpu])
    bare = System(peak, memory, 1, 1, 1)
    return speed * compute(found["configs/resnet50/resnet50.json"], bare, 256) / 256


def systems(found):
    """Name -> system."""
    common = {"decode": decoding(), "efficiency": efficiency("A100", found)}
    common |= {"hop": value("step of a ring over NVLink"), "far_hop": value("step of a ring over the network")}
    a100 = System(
        value("A100 80GB, bfloat16, dense"), value("A100 80GB, memory"),
        value("A100, all-reduce within a node (bus bandwidth)"), value("DGX A100, network of a node: 8 x 200 Gb/s"),
        value("DGX A100, cores of a node: 2 x 64"), **common,
    )  # fmt: skip
    h100 = System(
        value("H100 SXM, bfloat16, dense"), value("H100 SXM, memory"), value("H100 SXM, NVLink in one direction"),
        value("DGX H100, network of a node: 8 x 400 Gb/s"), value("DGX H100, cores of a node: 2 x 56"), **common,
    )  # fmt: skip
    slow = replace(a100, network=value("Ethernet, network of a node: 1 x 10 Gb/s"))
    return {"DGX A100": a100, "DGX H100": h100, "A100, 10 Gb/s Ethernet": slow}


def rows_of_table_2(found):
    """Title, config, model and source of its speed, for every row of Table 2.

    Where the papers measured a method on the row's network, its model is as much slower than the static one as there.
    """
    rows = []
    with open(ROOT / "configs/tables.csv", newline="") as file:
        papers = {row["config"]: row for row in csv.DictReader(file) if row["config"] in found}
    for config, model in found.items():
        row = papers[config]
        title = f"{BACKBONES[row['backbone']]}, {METHODS[row['method']]} {row['setting']}".strip()
        speed = PAPER_SPEEDS.get((row["method"], row["setting"])) if row["backbone"] == "resnet50" else None
        if speed is None or row["method"] == "static":
            rows.append((title, config, model, "roofline"))
            continue
        static = found["configs/resnet50/resnet50.json"]
        slower = replace(static, parameters=model.parameters, buckets=model.buckets)
        rows.append((title, config, replace(slower, slowdown=PAPER_SPEEDS["static", ""] / speed), "papers"))
    return rows


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def number(quantity):
    """Three digits, without an exponent."""
    return f"{quantity:,.0f}" if quantity >= 100 else f"{quantity:.3g}"


def inputs_table(found):
    rows = [
        (name, f"{number(v / factor)} {unit}".strip(), source) for name, (v, unit, factor, source) in INPUTS.items()
    ]
    rows.append(("images that a core decodes and augments", f"{number(decoding())} 1/s", "results/loading.csv"))
    for gpu in ("A100", "V100"):
        share = efficiency(gpu, found)
        use = "used for all" if gpu == "A100" else "for comparison only"
        rows.append((f"ResNet50 on a {gpu} over its roofline", f"{share:.2f}", f"from the above; {use}"))
    rows += [
        (f"ResNet50, {METHODS[method]} {setting}".strip(), f"{speed} images/s", PAPER)
        for (method, setting), speed in PAPER_SPEEDS.items()
    ]
    return table(("input", "value", "source"), rows)


def hours_table(found):
    head = ["row", "compute", "gradients, MiB", "images/s of an A100"]
    rows = []
    chosen = [("DGX A100", 8), ("DGX A100", 64), ("DGX A100", 512), ("DGX H100", 8), ("DGX H100", 64)]
    all_systems = systems(found)
    for title, _, model, source in rows_of_table_2(found):
        one = MICRO_BATCH / compute(model, all_systems["DGX A100"], MICRO_BATCH)
        cells = [title, source, f"{4 * model.parameters / MIB:.0f}", number(one)]
        for name, gpus in chosen:
            update = update_of(model, all_systems[name], gpus)
            cells.append(number(update.hours()) + (" L" if update.bound == "loader" else ""))
        rows.append(cells)
    return table([*head, *(f"hours, {gpus} {name.split()[1]}" for name, gpus in chosen)], rows)


def check_table(found):
    """Speed over the static ResNet50's: the roofline of training on an A100, and what the papers measured."""
    system, size = systems(found)["DGX A100"], MICRO_BATCH
    static = found["configs/resnet50/resnet50.json"]
    rows = []
    for title, config, model, source in rows_of_table_2(found):
        if source == "papers":
            ratio = compute(static, system, size) / compute(found[config], system, size)
            rows.append((title, f"{ratio:.2f}", f"{1 / model.slowdown:.2f}"))
    return table(("row", "roofline of the naive order, training", "papers, inference on a TITAN X"), rows)


def steps_table(found, config="configs/resnet50/kw1x_resnet50.json"):
    model = next(model for _, name, model, _ in rows_of_table_2(found) if name == config)
    rows = []
    for name, system in systems(found).items():
        for gpus in GPUS:
            plain, half = (update_of(model, system, gpus, compression=share) for share in (1.0, 0.5))
            times = (plain.compute, plain.exposed, half.exposed, plain.optimizer, plain.loading, plain.seconds)
            cells = [number(1e3 * seconds) for seconds in times]
            rows.append((name, gpus, *cells, number(plain.speed), number(plain.hours()), plain.bound))
    head = ("system", "GPUs", "GPU, ms", "exchange left, ms", "with bf16", "optimizer", "loader", "update, ms")
    return table((*head, "images/s", "hours", "bound"), rows)


def storage_table(found):
    size = DATA_BYTES / IMAGES
    names = {"gp3 volume, baseline": value("gp3 volume, baseline"), "gp3 volume, at most": value("gp3 volume, at most")}
    names["object store, fetched once"] = value("object store, one connection") * value("connections of a node")
    rows = []
    for name, speed in names.items():
        files = min(value("gp3 volume, operations, baseline"), speed / size) if name.endswith("baseline") else None
        hours = f"{DATA_BYTES / speed / 60:.0f}"
        rows.append((name, number(speed / size), number(files) if files else "", hours))
    node = systems(found)["DGX A100"]
    rows.append(("loader of a DGX A100 (all cores)", number(node.cores * node.decode), "", ""))
    return table(("storage of a node", "shards, images/s", "files, images/s", "minutes for all images"), rows)


TABLES = {
    "check": check_table,
    "inputs": inputs_table,
    "hours": hours_table,
    "steps": steps_table,
    "storage": storage_table,
}


def written(page, found):
    """The text of the page with its tables made anew; each is between two comments that name it."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page has no place for the table {name}: <!-- {name} --> and <!-- end of {name} -->")
        page = page[: page.index(begin) + len(begin)] + make(found) + page[page.index(end) :]
    return page


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    parser.add_argument("--speed", metavar="CONFIG=IMAGES", help="measured training speed of one GPU, for this config")
    parser.add_argument("--system", default="DGX A100", help="name of the system; default: %(default)s")
    args = parser.parse_args(argv)
    found = models()
    if args.page:
        args.page.write_text(written(args.page.read_text(), found))
    if args.speed:
        config, _, speed = args.speed.partition("=")
        known = systems(found)
        if config not in found or args.system not in known or not re.fullmatch(r"[1-9]\d*(\.\d+)?", speed):
            names = f"CONFIG one of {', '.join(found)}; --system one of {', '.join(known)}"
            parser.error(f"--speed {args.speed}: give CONFIG=IMAGES_PER_SECOND with {names}")
        system = known[args.system]
        now = MICRO_BATCH / compute(found[config], system, MICRO_BATCH)
        model = replace(found[config], slowdown=now / float(speed))
        for gpus in GPUS:
            update = update_of(model, system, gpus)
            print(f"{gpus:4d} GPUs: {update.speed:9.0f} images/s, {update.hours():7.1f} h, bound by the {update.bound}")


if __name__ == "__main__":
    main()
