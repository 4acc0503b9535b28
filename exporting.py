"""Writes trained models for runtimes that have neither this project nor, for ONNX, PyTorch.

Shapes: images are [B, 3, H, W], with any B; H and W are those of the export unless they were made dynamic.
"""

import contextlib
import copy
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import checkpoints
import utils
from loading.digits import DigitsData
from loading.images import ImageFolderData, UnreadableImage
from loading.transforms import make_transform
from measure import seconds
from models.config import ConfigError, check_value
from models.messages import first_line, quiet
from models.options import all_options
from models.temperature import get_temperature
from models.tracing import images_of, other_size, traced, without_source_lines
from trained import Trained

SUFFIXES = (".onnx", ".pt2", ".safetensors")
OPSET = 18
BATCHES = (1, 2, 5)
# Largest difference from PyTorch, relative to the largest output: this, or ten times PyTorch's own rounding error in
# networks that amplify rounding errors.
TOLERANCE, OWN_ERRORS = 1e-3, 10
# rules of onnxscript that simplify a program; each looks at a node and at those before it
RULES = (
    *("add_0_rule", "sub_0_rule", "mul_by_1_rule", "div_by_1_rule"),
    *("no_op_cast_rule", "no_op_expand_rule", "no_op_transpose_rule"),
    *("cast_cast_rule", "reshape_reshape_rule", "squeeze_reshape_1d_rule", "transpose_transpose_rule"),
    *("unsqueeze_unsqueeze_rule", "materialize_reshape_shape_rule", "collapse_slice_rule", "collapse_slice2_rule"),
    *("normalize_pad_format_conv_rule", "fuse_pad_into_conv_rule"),
    *("fuse_batchnorm_into_conv_rule", "fuse_batchnorm_into_gemm_rule"),
    *("remove_optional_bias_from_conv_rule", "remove_optional_bias_from_gemm_rule"),
)
REPEATS = 15
# images to measure the ranges of activations with, and operators that become int8
CALIBRATION, QUANTISED = 100, ["Conv", "MatMul", "Gemm"]


def target(path: str) -> Path:
    """The path of a file that can be written, and whose suffix tells what to write.

    Raises:
        ConfigError: the suffix is another one, or the file cannot be written.
    """
    if Path(path).suffix not in SUFFIXES:
        raise ConfigError(f"{path}: the suffix tells the format; use one of {', '.join(SUFFIXES)}")
    return utils.check_target(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """As `utils.replacing`, for a user's file.

    Raises:
        ConfigError: it cannot be written.
    """
    with utils.errors_name(path), utils.replacing(path) as temporary:
        yield temporary


class Features(nn.Module):
    """The features of a timm model, without its classifier: images -> [B, C, H', W'] or [B, N, C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not hasattr(model, "forward_features"):
            raise ConfigError(f"{type(model).__name__} has no features apart from its classifier; leave out --features")
        if hasattr(model, "kernel_representation"):
            raise ConfigError(
                "the features of Kernel Representation do not tell all that its classifier needs: it also reads the "
                "representation; leave out --features"
            )
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


def describe(trained: Trained) -> dict[str, Any]:
    """What a user of the file needs to know: the model's name, its temperature, its classes, its preprocessing."""
    return {
        "model": trained.args.model,
        "temperature": get_temperature(trained.model),
        "classes": None if trained.classes is None else [utils.shown(name) for name in trained.classes],
        "preprocessing": _preprocessing(trained.transform),
    }


def _preprocessing(transform: transforms.Compose) -> dict[str, Any]:
    """The steps of an evaluation's transform, in their order: resize (its interpolation), crop, grey, mean and std."""
    steps = {}
    for step in transform.transforms:
        if isinstance(step, transforms.Resize):
            steps.update(resize=step.size, interpolation=step.interpolation.value)
        elif isinstance(step, transforms.CenterCrop):
            steps["crop"] = list(step.size)
        elif isinstance(step, transforms.Grayscale):
            steps["grey"] = True
        elif isinstance(step, transforms.Normalize):
            steps.update(range=[0, 1], mean=list(step.mean), std=list(step.std))
    return steps


def at_size(trained: Trained, size: int) -> Trained:
    """The same model with the preprocessing for images of another size.

    Raises:
        ConfigError: it is no size that the option --input_size takes.
    """
    args = trained.args
    args.input_size = check_value(all_options()["input_size"], size, "--input_size")
    if hasattr(args, "given"):
        # what the file's readers take from it
        args.given = sorted({*args.given, "input_size"})
    return Trained(trained.model, trained.classes, trained.args, make_transform(trained.args, is_train=False))


def write_safetensors(trained: Trained, path: Path) -> None:
    """Write the weights, with the settings that `open_trained` builds the model from."""
    checkpoint = {
        "model": trained.model.state_dict(),
        "args": {**vars(trained.args), "classes": trained.classes},
        "temperature": get_temperature(trained.model),
    }
    about = {"preprocessing": _preprocessing(trained.transform)}
    checkpoints.write_weights(path, checkpoints.weights_of(checkpoint, path) | about)


def write_pt2(model: nn.Module, path: Path, size: int, about: dict[str, Any], dynamic_size: bool = False) -> None:
    """Write a program for `torch.export.load`, which runs without this project.

    Args:
        model: takes images, in evaluation mode.
        path: of the file.
        size: height and width of the images.
        about: is kept in the file as `about.json`.
        dynamic_size: accept other heights and widths, too.

    Raises:
        ConfigError: the model cannot be traced, its output is not finite, or the file cannot be written.
    """
    program = traced(model, size, dynamic_size)
    with torch.no_grad():
        _finite_outputs(model, images_of(model, 1, size, size))
    with replacing(path) as temporary, quiet():
        torch.export.save(program, temporary, extra_files={"about.json": json.dumps(about)})


def write_onnx(
    model: nn.Module,
    path: Path,
    size: int,
    about: dict[str, Any],
    dynamic_size: bool = False,
    names: tuple[str, ...] = ("logits",),
) -> dict[str, float]:
    """Write a model as ONNX, of standard operators only, once it has been compared with PyTorch in ONNX Runtime.

    Args:
        model: takes images, in evaluation mode.
        path: of the file.
        size: height and width of the images.
        about: becomes the metadata of the file, each value as JSON unless it is a string.
        dynamic_size: accept other heights and widths, too.
        names: of the outputs.

    Returns:
        What `compared` does.

    Raises:
        ConfigError: onnx or onnxruntime is missing, the model cannot be traced, its output is not finite, the file
            differs from it or cannot be written.
    """
    require_onnx()
    names_of_sizes = {0: "batch", 2: "height", 3: "width"} if dynamic_size else {0: "batch"}
    program = traced(model, size, dynamic_size)
    try:
        with quiet(), without_source_lines():
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=names,
                dynamic_shapes=(names_of_sizes,),
            )
            _simplify(onnx_program.model)
    except Exception as error:
        # the exporter raises exceptions of any type
        raise ConfigError(f"the model cannot be written as ONNX ({first_line(error)})") from error
    for key, value in about.items():
        onnx_program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    with replacing(path) as temporary:
        onnx_program.save(temporary, external_data=False)
        return compared(model, temporary, size, dynamic_size)


def _simplify(model: Any) -> None:
    """Fold constants and fuse operators of an `onnx_ir.Model`, in place.

    The exporter's own optimisation does the same, but in a time that grows with the square of the number of nodes: its
    rule for slices that are a split looks at all of them for each of them. Without that rule it takes seconds, where it
    took minutes.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    common.InlinePass()(model)
    # twice: what is fused first may leave more to fold and to fuse
    for _ in range(2):
        optimizer.fold_constants(model)
        rewriter.rewrite(model, [getattr(rules, name) for name in RULES])
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.NameFixPass()(model)


def require_onnx() -> None:
    """Raises ConfigError unless onnx, onnxscript and onnxruntime are installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{error.name or error} is not installed; ONNX files need: pip install -r requirements-export.txt"
        ) from None


def session_of(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """A function from images to the outputs of an ONNX file, in ONNX Runtime with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(y) for y in session.run(None, {name: images.numpy()})]


@torch.no_grad()
def compared(model: nn.Module, path: Path, size: int, dynamic_size: bool = False) -> dict[str, float]:
    """Compare an ONNX file with its model at several batches, and measure both at batch 1.

    Returns:
        "error" and "own_error", the largest differences of ONNX Runtime and of PyTorch in float32 from PyTorch in
        float64, relative to the largest output; "torch" and "onnx", the median seconds of a batch of 1.

    Raises:
        ConfigError: the difference is greater than `TOLERANCE` and `OWN_ERRORS` times PyTorch's own, or the model's
            output is not finite, so that there is none.
    """
    run, exact = session_of(path), copy.deepcopy(model).double()
    result = {"error": 0.0, "own_error": 0.0}
    for batch in BATCHES:
        images = images_of(model, batch, *(other_size(size) if dynamic_size and batch == BATCHES[-1] else (size, size)))
        expected = _finite_outputs(exact, images.double())
        for key, values in (("error", run(images)), ("own_error", _finite_outputs(model, images))):
            result[key] = max(result[key], *map(_difference, values, expected))
    limit = max(TOLERANCE, OWN_ERRORS * result["own_error"])
    if not result["error"] <= limit:
        raise ConfigError(
            f"ONNX Runtime differs from PyTorch by {result['error']:.1e} of the largest output, more than {limit:.1e}; "
            "nothing was written"
        )
    images, times = images_of(model, 1, size, size), {"torch": [], "onnx": []}
    for _ in range(REPEATS):
        times["torch"].append(seconds(lambda: model(images), "cpu"))
        times["onnx"].append(seconds(lambda: run(images), "cpu"))
    return {**result, **{name: statistics.median(values) for name, values in times.items()}}


def labelled_images(trained: Trained, source: str, is_train: bool) -> Dataset:
    """Images and labels in the preprocessing of a model's evaluation.

    Args:
        trained: the model.
        source: "digits" for the embedded ones, or a folder with a folder of images for each class.
        is_train: of digits, those to train with.

    Raises:
        ConfigError: there is no such folder, it holds no images, or those to evaluate are of a class that the model
            does not have.
    """
    if source == "digits":
        return DigitsData(is_train, trained.transform)
    data = ImageFolderData(Path(source), trained.transform, "--int8" if is_train else "--evaluate")
    if data.note:
        utils.log(data.note)
    if trained.classes is not None and not is_train:
        _number_as(trained.classes, data, source)
    return data


def _number_as(classes: Sequence[str], data: ImageFolderData, source: str) -> None:
    """Give the images of a folder the indices of a model's classes; by themselves they have those of the folders there.

    Raises:
        ConfigError: names a folder that is none of the classes.
    """
    index = {name: i for i, name in enumerate(classes)}
    for name in data.classes:
        if name not in index:
            raise ConfigError(
                f"--evaluate {source}: its folder {name} is none of the model's {len(classes)} classes "
                f"({', '.join(classes[:3])}, ...); rename or remove it"
            )
    data.samples = [(path, index[data.classes[label]]) for path, label in data.samples]
    data.classes = list(classes)


def quantised(path: Path, data: Dataset) -> None:
    """Make an ONNX file int8, weights and activations, with ranges measured on `CALIBRATION` images of the data.

    It is ONNX Runtime's static quantisation: weights per channel, and pairs of QuantizeLinear and DequantizeLinear.

    Raises:
        ConfigError: an image cannot be read, onnxruntime cannot quantise the file, or it cannot be written.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    indices = range(0, len(data), max(1, len(data) // CALIBRATION))[:CALIBRATION]
    images = ({"images": data[index][0].unsqueeze(0).numpy()} for index in indices)

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(images, None)

    with replacing(path) as temporary, quiet():
        try:
            quant_pre_process(path, temporary, skip_symbolic_shape=True)
            quantize_static(
                temporary, temporary, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=QUANTISED,
            )  # fmt: skip
        except UnreadableImage as error:
            raise ConfigError(f"--int8: {error}") from None
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"the ONNX file cannot be quantised ({first_line(error)})") from error


def accuracy(path: Path, data: Dataset) -> float:
    """Top-1 accuracy of an ONNX classifier in percent.

    Raises:
        ConfigError: an image cannot be read.
    """
    run, right = session_of(path), 0
    try:
        for images, labels in DataLoader(data, batch_size=32):
            right += int(run(images)[0].argmax(1).eq(labels).sum())
    except UnreadableImage as error:
        raise ConfigError(f"--evaluate: {error}") from None
    return 100 * right / len(data)


def _finite_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The outputs of a model, of which all numbers are finite.

    Raises:
        ConfigError: some are not.
    """
    result = model(images)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise ConfigError("the model's output is not finite; nothing was written")
    return outputs


def _difference(value: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value; infinite where it is not finite."""
    error = (value.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return float(error.nan_to_num(nan=torch.inf, posinf=torch.inf))
