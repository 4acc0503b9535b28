"""What a classifier does with single images: confusions, accuracy by class, and its worst mistakes."""

import argparse
import base64
import io
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import engine
from models.messages import printable
from stopping import leave_signals_to_parent

from .attentions import Attentions, Collector
from .images import chosen, shown_image

# the most images of a report, and the most seconds for them: on a GPU the images are the limit, on a CPU the seconds
IMAGES, SECONDS = 2000, 60.0
# mistakes that are kept of each kind, and the largest side of their thumbnails in pixels
MISTAKES, THUMBNAIL = 12, 96


@dataclass
class Results:
    """What was found out, in plain types, as JSON holds it.

    Attributes:
        count, total: images that were looked at, and those of the data.
        correct: of them.
        confusion: (true class, predicted class) -> images.
        classes: names of the classes.
        worst: the mistakes with the highest loss; `confident`: those with the highest probability of the wrong class.
    """

    total: int
    classes: list[str]
    count: int = 0
    correct: int = 0
    confusion: Counter = field(default_factory=Counter)
    worst: list[dict[str, Any]] = field(default_factory=list)
    confident: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        cells = [[true, predicted, count] for (true, predicted), count in sorted(self.confusion.items())]
        return {**vars(self), "confusion": cells}

    def add(self, logits: Tensor, labels: Tensor, images: Tensor, names: Sequence[str], args: Any) -> None:
        """Add a batch: logits [B, classes], labels [B], prepared images [B, 3, H, W], and names of the images."""
        probabilities = logits.double().softmax(1)
        best, predicted = probabilities.max(1)
        of_truth = probabilities.gather(1, labels[:, None])[:, 0]
        losses = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
        rows = zip(labels.tolist(), predicted.tolist(), best.tolist(), of_truth.tolist(), losses.tolist())
        for index, (label, guess, probability, truth, loss) in enumerate(rows):
            self.count += 1
            self.correct += label == guess
            self.confusion[label, guess] += 1
            if label == guess:
                continue
            mistake = {
                "true": label, "predicted": guess, "probability": probability, "of_true": truth, "loss": loss,
                "name": names[index],
            }  # fmt: skip
            for kept, key in ((self.worst, "loss"), (self.confident, "probability")):
                if len(kept) < MISTAKES or mistake[key] > kept[-1][key]:
                    if "png" not in mistake:
                        mistake["png"] = thumbnail(images[index], args)
                    kept.append(mistake)
                    kept.sort(key=lambda entry, key=key: -entry[key])
                    del kept[MISTAKES:]


def thumbnail(image: Tensor, args: argparse.Namespace) -> str:
    """A prepared image [3, H, W] as a small PNG in base64."""
    pixels = (shown_image(image, args) * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _name(data: Dataset, index: int) -> str:
    """The file of an image; its index where it has none of its own."""
    samples = getattr(data, "samples", None)
    return printable(samples[index][0] if samples is not None else f"image {index}")


@torch.no_grad()
def examine(
    model: nn.Module,
    data: Dataset,
    classes: Sequence[str] | None,
    args: argparse.Namespace,
    device: torch.device,
    workers: int = 0,
    stops: Callable[[], bool] = lambda: False,
) -> tuple[Results, Attentions]:
    """Pass at most `IMAGES` images through a classifier, for at most `SECONDS`, in the same order each time.

    Up to that number they are all images of the data, each once; above it, a random selection that is always the same.

    Args:
        model: without DistributedDataParallel; left in evaluation mode.
        data: images [3, H, W] and classes, by index.
        classes: names of the classes; None: their numbers.
        args: the options of the run.
        device: of the model.
        workers: processes that load images.
        stops: ends it early.
    """
    model.eval()
    indices = chosen(len(data), IMAGES)
    names = [printable(name) for name in classes] if classes else [str(i) for i in range(args.nb_classes)]
    results = Results(len(data), names)
    started, at = time.monotonic(), 0
    loader = DataLoader(
        Subset(data, indices), args.batch_size, num_workers=workers, worker_init_fn=leave_signals_to_parent,
        # a loader draws from the global generator otherwise
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    # hooks in compiled code would have it compiled again
    with torch.compiler.set_stance("force_eager"), Collector(model, samples=False) as collector:
        for images, labels in loader:
            with engine.autocast(args, device):
                logits = model(images.to(device)).float().cpu()
            collector.add(labels.tolist())
            own = [_name(data, index) for index in indices[at : at + len(labels)]]
            results.add(logits, labels, images, own, args)
            at += len(labels)
            if stops() or time.monotonic() - started > SECONDS:
                break
    return results, collector.found
