"""Estimated time of a backend where nothing was measured: every step takes as long as its slowest resource.

A step multiplies tiles of matrices on all multiprocessors, reads tiles through the cache, and moves tensors to and from
memory; the slowest of the three decides (S. Williams et al., "Roofline", 2009).  Every launch adds a fixed time.  Peak
rates are in `peaks.py`.

Legend: as in `geometry.py`; S = B * groups folded samples, O and I output and input channels of a group.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .backends.batched import GPU_BYTES, PATCH_BYTES
from .backends.winograd import squares_of
from .geometry import Geometry, patches_are_copies
from .peaks import Peak

# Shares of the peak rate that programs reach on large shapes: matrix products and convolutions of libraries, Triton's
# kernels, and the compiled loops of the CPU, which keep their operands in registers and in the cache.  A grouped
# convolution with one group per sample reaches far less on a GPU: cuDNN's kernels for groups are made for many small
# ones.  Those of GPUs are assumptions, those of the CPU are near what its fitted costs say.
LIBRARY, OWN, COMPILED, GROUPED = 0.7, 0.5, 0.9, 0.15
# shortest part of an inner size that a product is split into
SPLIT = 128
# ordinary cores, without matrix units, compute small products such as depth-wise convolutions at about this share
SCALAR = 0.3


@dataclass(frozen=True)
class Step:
    """One or more launches of a kernel.

    Attributes:
        name: what it does.
        numbers: how many numbers it reads and writes in memory.
        product: (count, rows, columns, inner size) of the products that it computes, or None.
        share: of the peak rate that its program reaches.
        launches: how many launches it takes.
        item: bytes of a number where it is not that of the inputs.
        tf32: whether its products are rounded to tf32.
        tiles: sides of its tiles where they are not those of the processor.
    """

    name: str
    numbers: float
    product: tuple[int, int, int, int] | None = None
    share: float = LIBRARY
    launches: float = 1
    item: int | None = None
    tf32: bool = False
    tiles: tuple[tuple[int, ...], tuple[int, ...], int] | None = None

    @property
    def macs(self) -> float:
        """Multiply-adds, without padding."""
        return math.prod(self.product) if self.product else 0


class _Sizes:
    """Amounts that the steps of all backends share, in numbers."""

    def __init__(self, geo: Geometry, gpu: bool, item: int) -> None:
        self.geo, self.gpu, self.item = geo, gpu, item
        self.low = item == 2
        self.samples = geo.batch * geo.groups
        self.outputs, self.inputs = max(1, geo.c_out // geo.groups), geo.c_in
        self.window = geo.taps * geo.q if geo.per_tap else math.prod(geo.kernel) * geo.cell[1]
        self.window *= geo.g_in
        self.rows = geo.batch * geo.taps * geo.g_out * geo.g_in
        self.cell = geo.cell[0] * geo.q
        self.kernels, self.warehouse, self.alpha = self.rows * self.cell, geo.n * self.cell, self.rows * geo.n
        dims = zip(geo.out, geo.stride, geo.kernel, geo.dilation, geo.pads, strict=True)
        seen = math.prod((o - 1) * s + (k - 1) * d + 1 - left - right for o, s, k, d, (left, right) in dims)
        self.x = self.samples * geo.c_in * seen
        self.y = geo.batch * geo.c_out * geo.positions
        self.patches = self.samples * geo.taps * geo.g_in * geo.q * geo.positions
        self.copied = self.patches if patches_are_copies(geo) else 0

    def assemble(self, share: float = LIBRARY) -> Step:
        moved = self.alpha + self.warehouse + self.kernels
        return Step("mix kernels", moved, (1, self.rows, self.cell, self.geo.n), share)

    def unmix(self, share: float = LIBRARY, item: int | None = None, tf32: bool = False) -> list[Step]:
        """Gradients of alpha and cells from those of the kernels."""
        moved, n = self.alpha + self.warehouse + self.kernels, self.geo.n
        return [
            Step("gradient of alpha", moved, (1, self.rows, n, self.cell), share, item=item, tf32=tf32),
            Step("gradient of cells", moved, (1, n, self.cell, self.rows), share, item=item, tf32=tf32),
        ]

    def convolve(self, name: str, share: float, launches: float = 1) -> Step:
        product = (self.samples, self.geo.positions, self.outputs, self.window)
        return Step(name, self.x + self.kernels + self.y, product, share, launches)

    def kernel_gradient(self, share: float, launches: float = 1) -> Step:
        product = (self.samples, self.outputs, self.window, self.geo.positions)
        return Step("gradient of kernels", self.x + self.kernels + self.y, product, share, launches)


def _grouped(sizes: _Sizes, backward: bool) -> Iterator[Step]:
    # on a CPU every sample is convolved by itself; on a GPU grouped convolutions need channels outermost
    gpu, geo = sizes.gpu, sizes.geo
    share, launches = (GROUPED, 1) if gpu else (LIBRARY, geo.batch if geo.groups == 1 else 1)
    yield sizes.assemble()
    yield Step("permute kernels", 2 * sizes.kernels)
    if gpu and geo.last:
        yield Step("transpose", 2 * (sizes.x + sizes.y), launches=2)
    yield sizes.convolve("gradient of the input" if backward else "convolve", share, launches)
    if backward:
        yield sizes.kernel_gradient(share, launches)
        yield Step("permute kernels", 2 * sizes.kernels)
        yield from sizes.unmix()


def _batched(sizes: _Sizes, backward: bool) -> Iterator[Step]:
    geo, samples = sizes.geo, sizes.samples
    taps = geo.taps * geo.g_in
    limit = GPU_BYTES if sizes.gpu else PATCH_BYTES
    pieces = max(1, math.ceil(sizes.copied * sizes.item / limit))
    yield sizes.assemble()
    if sizes.copied:
        yield Step("patches", sizes.x + sizes.copied, launches=2 * pieces)
    product = (samples, geo.positions, sizes.outputs, taps * geo.q)
    moved = sizes.patches + sizes.kernels + sizes.y
    if backward:
        # in low precision the gradients of patches that are added up are copied to float32
        yield Step("gradient of patches", moved + 4 * sizes.low * sizes.copied, product, launches=taps * pieces)
        product = (samples * taps, sizes.outputs, geo.q, geo.positions)
        yield Step("gradient of kernels", moved, product, launches=taps * pieces)
        if sizes.copied:
            yield Step("add up patches", 3 * sizes.copied + sizes.x, launches=taps * pieces, item=4)
        yield from sizes.unmix()
    elif sizes.low and taps > 1:
        yield Step("reorder", 2 * (sizes.kernels + sizes.copied), launches=2 * pieces)
        yield Step("multiply", moved, product, launches=pieces)
    else:
        # every product but the first is added to the output in memory
        yield Step("multiply", moved + 2 * sizes.y * (taps - 1), product, launches=taps * pieces)


def _mixed(sizes: _Sizes, backward: bool) -> Iterator[Step]:
    geo, samples = sizes.geo, sizes.samples
    g_out, taps = max(1, geo.g_out // geo.groups), geo.taps * geo.g_in
    mixed = samples * g_out * geo.n * geo.positions * geo.q
    one = sizes.low or geo.cell[0] * geo.q < 64 * 64
    if sizes.copied:
        yield Step("patches", sizes.x + sizes.copied, launches=2)
    yield Step("mix inputs", sizes.patches + mixed, (samples, g_out * geo.n, geo.positions * geo.q, taps))
    yield Step("reorder", (4 if one else 2) * mixed, launches=2)
    rows = samples * g_out * geo.positions
    launches = 1 if one else geo.n
    sums = 2 * sizes.y * (launches - 1)
    product = (1, rows, geo.cell[0], geo.n * geo.q)
    if not backward:
        yield Step("multiply", mixed + sizes.warehouse + sizes.y + sums, product, launches=launches)
        yield Step("reorder", 2 * sizes.y)
        return
    yield Step("gradient of cells", mixed + sizes.y, (1, geo.cell[0], geo.n * geo.q, rows), launches=launches)
    yield Step("gradient of mixed inputs", mixed + sizes.y, (1, rows, geo.n * geo.q, geo.cell[0]), launches=launches)
    yield Step("reorder", 2 * mixed)
    yield Step("gradient of the input", mixed + sizes.patches, (samples, taps, geo.positions * geo.q, g_out * geo.n))
    yield Step("gradient of alpha", mixed + sizes.patches, (samples, g_out * geo.n, taps, geo.positions * geo.q))
    if sizes.copied:
        yield Step("add up patches", 3 * sizes.copied + sizes.x, launches=taps)


def _outputs(sizes: _Sizes, backward: bool) -> Iterator[Step]:
    geo, samples = sizes.geo, sizes.samples
    g_out, channels = max(1, geo.g_out // geo.groups), geo.n * geo.cell[0]
    outputs = samples * channels * geo.positions
    product = (1, samples * geo.positions, channels, geo.q)
    mix = (samples, g_out, geo.cell[0] * geo.positions, geo.n)
    yield Step("convolve with every cell", sizes.x + sizes.warehouse + outputs, product)
    yield Step("gradient of alpha" if backward else "mix outputs", outputs + sizes.y, mix)
    if backward:
        yield Step("gradient of outputs", outputs + sizes.y, mix)
        yield Step("gradient of the input", sizes.x + sizes.warehouse + outputs, product)
        yield Step("gradient of cells", sizes.x + sizes.warehouse + outputs, (1, channels, geo.q, product[1]))


def _compiled(
    sizes: _Sizes, backward: bool, first: bool = True, pad: int = 1, winograd: bool = False
) -> Iterator[Step]:
    """The compiled backends of the CPU, which compute in float32 and keep kernels in the cache.

    Args:
        first: whether they want channels outermost in memory, and copy others.
        pad: the input channels of a cell are padded to a multiple of this.
        winograd: whether they multiply spectra.
    """
    moved, inputs = sizes.alpha + sizes.warehouse, sizes.geo.cell[1]
    copies = 2 * (sizes.x + sizes.y) if sizes.geo.last == first or sizes.low else 0
    samples, positions, outputs, window = sizes.convolve("", COMPILED).product
    window = window // inputs * math.ceil(inputs / pad) * pad
    if winograd:
        # 16 spectra of every 2 x 2 outputs, and of every 3 x 3 taps
        positions, window = math.prod(squares_of(sizes.geo.out)), window // 9 * 16
    product = (samples, positions, outputs, window)
    yield Step("mix kernels", moved, (1, sizes.rows, sizes.cell, sizes.geo.n), COMPILED, item=4)
    name = "gradient of the input" if backward else "convolve"
    yield Step(name, sizes.x + sizes.y + copies, product, COMPILED, 0, 4)
    if backward:
        yield Step("gradient of kernels", sizes.x + sizes.y, (samples, window, outputs, positions), COMPILED, 0, 4)
        yield from (Step(step.name, moved, step.product, COMPILED, 0, 4) for step in sizes.unmix())


def _fused(sizes: _Sizes, backward: bool) -> Iterator[Step]:
    return _compiled(sizes, backward, first=False, pad=16)


def _winograd(sizes: _Sizes, backward: bool) -> Iterator[Step]:
    return _compiled(sizes, backward, first=False, pad=16, winograd=True)


def _triton_gradients(sizes: _Sizes) -> Iterator[Step]:
    yield Step("gradient of kernels", sizes.x + sizes.y + 2 * sizes.kernels, sizes.kernel_gradient(OWN).product, OWN)
    # the gradients of kernels are kept in float32, and rounded to tf32 where the inputs have less
    yield from sizes.unmix(OWN, 4, sizes.low)


def _triton(sizes: _Sizes, backward: bool) -> Iterator[Step]:
    if not sizes.geo.last:
        yield Step("transpose", 2 * (sizes.x + sizes.y), launches=2)
    yield sizes.assemble(OWN)
    yield sizes.convolve("gradient of the input" if backward else "convolve", OWN)
    if backward:
        yield from _triton_gradients(sizes)


def _triton_fused(sizes: _Sizes, backward: bool) -> Iterator[Step]:
    geo = sizes.geo
    if not geo.last:
        yield Step("transpose", 2 * (sizes.x + sizes.y), launches=2)
    # 16 samples share a tile of cells, which is mixed again for every 64 positions
    times = math.ceil(geo.positions / 64)
    mix = (math.ceil(geo.batch * geo.groups / 16) * times, 16, sizes.kernels // max(1, sizes.samples), geo.n)
    yield Step("mix tiles", sizes.alpha + sizes.warehouse, mix, OWN, 0, tiles=((16,), (512,), 32))
    product = (sizes.samples, geo.positions, sizes.outputs, sizes.window)
    name = "gradient of the input" if backward else "convolve"
    yield Step(name, sizes.x + sizes.y, product, OWN, tiles=((64,), (32,), 32))
    if backward:
        yield from _triton_gradients(sizes)


_STEPS: dict[str, Callable[[_Sizes, bool], Iterator[Step]]] = {
    "grouped": _grouped,
    "batched": _batched,
    "mixed": _mixed,
    "outputs": _outputs,
    "fused": _fused,
    "depthwise": _compiled,
    "pointwise": _compiled,
    "streamed": _compiled,
    "winograd": _winograd,
    "triton": _triton,
    "triton_fused": _triton_fused,
}


def steps(backend: str, geo: Geometry, item_bytes: int, gpu: bool, backward: bool = False) -> list[Step]:
    """What a backend does in a pass.

    Args:
        backend: its name.
        geo: the shapes of the call.
        item_bytes: bytes of one number.
        gpu: whether it runs on a GPU.
        backward: whether the pass computes the gradients of input, alpha and cells.
    """
    return list(_STEPS[backend](_Sizes(geo, gpu, item_bytes), backward))


def microseconds(step: Step, peak: Peak, item_bytes: int) -> float:
    """Least time of a step on a processor.

    Args:
        item_bytes: bytes of one number of the inputs.
    """
    item = step.item or item_bytes
    time = step.numbers * item / (peak.bandwidth * 1e3)
    if step.product and min(step.product):
        time = max(time, _multiplied(step, peak, item))
    return time + step.launches * peak.launch


def _multiplied(step: Step, peak: Peak, item: int) -> float:
    """Microseconds of a step's products with the best tiles, or on the ordinary cores."""
    count, m, n, k = step.product
    rate = peak.half if item == 2 else peak.tf32 if step.tf32 else peak.single
    rows, columns, inner = step.tiles or peak.tiles
    times = [math.prod(step.product) / (peak.single * SCALAR * 1e6)]
    for row in rows:
        for column in columns:
            tiles = count * math.ceil(m / row) * math.ceil(n / column)
            # few tiles split the inner size among the multiprocessors; the last tiles leave some idle
            parts = max(1, min(peak.units // tiles, k // SPLIT))
            waves = math.ceil(tiles * parts / peak.units) * peak.units / parts
            filled = math.ceil(k / inner) * inner
            computed = waves * row * column * filled / (rate * step.share * 1e6)
            read = tiles * (row + column) * filled * item / (peak.bandwidth * peak.cache * 1e3)
            times.append(max(computed, read))
    return min(times)


def roofline(
    backend: str, geo: Geometry, item_bytes: int, peak: Peak, gpu: bool = True, backward: bool = False
) -> float:
    """Estimated microseconds of a pass; the arguments are those of `steps` and a processor's peak rates."""
    return sum(microseconds(step, peak, item_bytes) for step in steps(backend, geo, item_bytes, gpu, backward))
