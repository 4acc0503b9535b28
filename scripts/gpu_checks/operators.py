"""Every backend of the operator against its definition: outputs, gradients, devices, and Triton's configurations."""

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from models.ops import mixture_conv, mixture_conv_naive, sample_conv
from models.ops.backends import BACKENDS, available_backends, triton_support
from models.ops.control import forced_backend
from models.ops.dead_taps import WrittenGradients

from .cases import DEPTHWISE, TILES, WHOLE, Shapes, depthwise_shapes, odd_shapes, tile_shapes
from .report import Mismatch, Report

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest difference from the definition in float64, relative to the largest value, beside twice the difference of the
# definition in the data type itself; a few times the rounding of one number.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
RESULTS = ("output", "gradient of x", "gradient of alpha", "gradient of the cells")
BATCH = 3  # samples of the layers of networks
SOME = 3  # one of so many layers is checked in the less common data types and layouts
# whose kernels are compiled anew for other shapes, which takes seconds
COMPILED = ("triton", "triton_fused")


# --- settings -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Inside the context products of float32 numbers are not rounded to TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the context fresh memory is filled with NaN, so that an output that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # of operations that are not deterministic
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def _tuned_kernels() -> list[Any]:
    return [kernel for kernel in vars(triton_support.kernels()).values() if hasattr(kernel, "configs")]


@contextlib.contextmanager
def configuration(index: int) -> Iterator[None]:
    """Inside the context every Triton kernel uses its configuration of this number, and none is tuned."""
    tuned = _tuned_kernels()
    before = [kernel.configs for kernel in tuned]
    for kernel in tuned:
        kernel.configs = [kernel.configs[min(index, len(kernel.configs) - 1)]]
    try:
        yield
    finally:
        for kernel, configs in zip(tuned, before, strict=True):
            kernel.configs = configs


def untuned() -> contextlib.AbstractContextManager:
    """`configuration(0)`, where Triton can be loaded."""
    return contextlib.nullcontext() if _triton_error() else configuration(0)


def _triton_error() -> str:
    """Why Triton cannot be used; empty: it can, or it is not known why."""
    try:
        kernels = triton_support.kernels()
        if torch.cuda.is_available():
            kernels.triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# --- comparisons --------------------------------------------------------------------------------------------------


def difference(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest value of the reference.

    Raises:
        Mismatch: the shapes differ, or the value is not finite.
    """
    if value.shape != reference.shape:
        raise Mismatch(f"{list(value.shape)} instead of {list(reference.shape)}")
    error = float((value.double() - reference).abs().max())
    if not error < float("inf"):
        raise Mismatch("is not finite")
    return error / max(float(reference.abs().max()), 1e-30)


def _with_gradients(function, tensors: Sequence[Tensor], arguments: Sequence, **options) -> list[Tensor]:
    """Output and gradients of all tensors, for the same random gradient of the output."""
    own = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*own, *arguments, **options)
    generator = torch.Generator(y.device).manual_seed(1)
    # rounded as bfloat16, so that it is the same in every data type
    dy = torch.randn(y.shape, generator=generator, device=y.device).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, own, dy)]


class Expected:
    """What a call should give: in float64, and how far the definition in its own data type is from that."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: str, last: bool) -> None:
        self.tensors, self.arguments = shapes.tensors(dtype, device, last), shapes.arguments
        doubles = [tensor.double() for tensor in self.tensors]
        self.exact = _with_gradients(mixture_conv_naive, doubles, self.arguments)
        # oneDNN forgets to write some of the gradients of the definition
        with WrittenGradients() if device == "cpu" else contextlib.nullcontext():
            naive = _with_gradients(mixture_conv_naive, self.tensors, self.arguments)
        self.limits = [2 * difference(a, b) + LIMITS[dtype] for a, b in zip(naive, self.exact, strict=True)]

    def compare(self, backend: str) -> float:
        """The largest difference of a backend's results.

        Raises:
            Mismatch: it is more than rounding.
        """
        values = _with_gradients(mixture_conv, self.tensors, self.arguments, backend=backend)
        return self.largest(values)

    def largest(self, values: Sequence[Tensor]) -> float:
        """The largest difference of any results; raises `Mismatch` as `compare` does."""
        errors = []
        for name, value, exact, limit in zip(RESULTS, values, self.exact, self.limits, strict=True):
            try:
                errors.append(difference(value, exact))
            except Mismatch as error:
                raise Mismatch(f"{name} {error}") from None
            if errors[-1] > limit:
                raise Mismatch(f"{name} differs by {errors[-1]:.1e} of its largest value, more than {limit:.1e}")
        return max(errors)


# --- the checks -----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What was compared of a backend."""

    calls: int = 0
    failed: bool = False
    worst: dict[str, float] = field(default_factory=dict)  # data type -> largest difference


def check(report: Report, layers: Sequence[Shapes], skip: Sequence[str] = ()) -> set[str]:
    """All checks of the operator; returns the names of the backends that failed any.

    Args:
        report: receives the outcome.
        layers: the layers of networks.
        skip: names of backends to leave out.
    """
    outcomes = {backend: Outcome() for backend in BACKENDS if backend not in skip}
    kinds = list(itertools.product((True, False), DTYPES))
    if report.dry:
        kinds, layers = kinds[::2], sorted(layers, key=lambda shapes: math.prod(shapes.x + shapes.cells))[:2]
    if report.device == "cpu":
        for backend, outcome in outcomes.items():
            outcome.failed = not report.check(f"backend {backend}, devices", _check_devices, backend)
    with exact_float32(), untuned():
        with poisoned_memory():
            for shapes, (last, dtype) in itertools.product(odd_shapes(report.dry), kinds):
                _check_call(report, shapes, dtype, last, outcomes)
        for (i, (last, dtype)), (j, shapes) in itertools.product(enumerate(kinds), enumerate(layers)):
            # for lack of time, the less common data types and layouts take some layers each
            if not (last and dtype != "fp16") and (i + j) % SOME and not report.dry:
                continue
            # other kinds would compile Triton's kernels anew for every shape
            compiled = last and dtype == "bf16"
            some = {backend: outcome for backend, outcome in outcomes.items() if compiled or backend not in COMPILED}
            _check_call(report, shapes.of_batch(BATCH), dtype, last, some)
        _check_sample_conv(report)
    for backend in COMPILED:
        if backend in outcomes:
            _check_configurations(report, backend, outcomes[backend])
            _require_triton(report, backend, outcomes[backend])
    for backend, outcome in outcomes.items():
        errors = ", ".join(f"{error:.0e} in {dtype}" for dtype, error in outcome.worst.items())
        if errors:
            report.note(f"{backend}: {outcome.calls} calls agree with the definition; largest difference {errors}")
    return {backend for backend, outcome in outcomes.items() if outcome.failed}


def _check_call(report: Report, shapes: Shapes, dtype: str, last: bool, outcomes: dict[str, Outcome]) -> None:
    """One call with all backends that can evaluate it."""
    geo, device = shapes.geometry(last), report.device
    backends = [backend for backend in available_backends(geo, DTYPES[dtype], device) if backend in outcomes]
    about = f"{shapes}, {dtype}, {'channels-last' if last else 'contiguous'}"
    if not backends or report.time_left() <= 0:
        report.left += [f"backend {backend}, {about}" for backend in backends]
        return
    expected = report.check(f"definition, {about}", Expected, shapes, DTYPES[dtype], device, last)
    for backend in backends if expected is not None else ():
        _compare(report, f"backend {backend}, {about}", outcomes[backend], dtype, expected.compare, backend)


def _compare(report: Report, name: str, outcome: Outcome, dtype: str, function: Callable, *arguments: Any) -> None:
    """Check a comparison that returns the largest difference."""
    left = len(report.left)
    error = report.check(name, function, *arguments)
    if error is not None:
        outcome.calls += 1
        outcome.worst[dtype] = max(outcome.worst.get(dtype, 0.0), error)
    else:
        outcome.failed |= len(report.left) == left


def _check_devices(backend: str) -> bool:
    """Forward and backward function on fake tensors of a GPU, which this machine need not have.

    Raises:
        Mismatch: a tensor is on another device, or a number is read from the GPU.
    """
    if backend in COMPILED:
        # kernels of Triton need memory
        return True
    for shapes in (tile_shapes(*TILES[1]), tile_shapes(*TILES[2]), depthwise_shapes(*DEPTHWISE[1]), WHOLE[0]):
        with FakeTensorMode():
            tensors = [torch.empty(shape, device="cuda") for shape in (shapes.x, shapes.alpha, shapes.cells)]
            geo = shapes.geometry(False)
            if not BACKENDS[backend].available(geo, torch.float32, "cuda"):
                continue
            try:
                y = BACKENDS[backend].forward(*tensors, geo)
                results = [y, *BACKENDS[backend].backward(torch.empty_like(y), *tensors, geo, [True] * 3)]
            except Exception as error:
                text = " ".join(str(error).split())
                raise Mismatch(f"{shapes} on a GPU: {type(error).__name__}: {text[:200]}") from None
            wrong = [r for r, result in zip(RESULTS, results, strict=True) if result.device.type != "cuda"]
            if wrong:
                raise Mismatch(f"{shapes} on a GPU: on the CPU: {', '.join(wrong)}")
    return True


def _check_sample_conv(report: Report) -> None:
    """The operator of methods that assemble their kernels themselves."""
    for size, kernel, groups, stride in ((9, 3, 1, 1), (5, 1, 1, 2), (7, 3, 4, 2)):
        for name, dtype in DTYPES.items():
            report.check(
                f"sample_conv, map {size}, kernel {kernel}, {groups} groups, {name}",
                _compare_sample_conv, size, kernel, groups, stride, dtype, report.device,
            )  # fmt: skip


def _compare_sample_conv(size, kernel, groups, stride, dtype, device):
    generator = torch.Generator(device).manual_seed(size)
    x = torch.randn(3, 8, size, size, generator=generator, device=device).to(dtype)
    kernels = torch.randn(3, 12, 8 // groups, kernel, kernel, generator=generator, device=device).to(dtype)
    arguments = (None, stride, kernel // 2, 1, groups)
    with forced_backend("naive"):
        exact = _with_gradients(sample_conv, [x.double(), kernels.double()], arguments)
        naive = _with_gradients(sample_conv, [x, kernels], arguments)
    for value, own, reference in zip(_with_gradients(sample_conv, [x, kernels], arguments), naive, exact, strict=True):
        error, limit = difference(value, reference), 2 * difference(own, reference) + LIMITS[dtype]
        if error > limit:
            raise Mismatch(f"differs by {error:.1e} of its largest value, more than {limit:.1e}")


def _check_configurations(report: Report, backend: str, outcome: Outcome) -> None:
    """Every configuration of a backend's Triton kernels, on shapes that leave tiles partly empty."""
    shapes, device = tile_shapes(*TILES[3 if report.dry else 1]), report.device
    if backend not in available_backends(shapes.geometry(True), torch.float32, device):
        return
    count = max(len(kernel.configs) for kernel in _tuned_kernels())
    with exact_float32():
        for dtype in DTYPES if device == "cuda" else ("float32",):
            expected = report.check(f"definition, {shapes}, {dtype}", Expected, shapes, DTYPES[dtype], device, True)
            for index in range(1, 2 if report.dry else count) if expected is not None else ():
                name = f"backend {backend}, configuration {index}, {dtype}"
                _compare(report, name, outcome, dtype, _compare_configuration, expected, backend, index)


def _compare_configuration(expected: Expected, backend: str, index: int) -> float:
    with configuration(index):
        try:
            return expected.compare(backend)
        except Exception as error:
            # tuning leaves out what does not fit the GPU, too
            if type(error).__name__ == "OutOfResources":
                return 0.0
            raise


def _require_triton(report: Report, backend: str, outcome: Outcome) -> None:
    """On a GPU that Triton supports, its backends must have been compared."""
    if outcome.calls or outcome.failed:
        return
    supported = report.device == "cuda" and torch.cuda.get_device_capability() >= triton_support.CAPABILITY
    if supported and triton_support.installed() and not report.left:
        reason = _triton_error() or "no error is known"
        report.fail(f"backend {backend}", f"is not available on this GPU, though Triton is installed ({reason})")
        outcome.failed = True
    else:
        report.note(f"{backend}: not checked, since Triton does not run here")
