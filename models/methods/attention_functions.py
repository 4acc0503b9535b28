"""The attention functions of kernels, and the temperatures by which they are annealed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_FUNCTIONS = ("softmax", "caf")
# attention function -> (first, last) temperature of the training schedule
TEMPERATURES = {"softmax": (30.0, 1.0), "caf": (1.0, 0.0)}


def check_temperature(temperature: float, function: str) -> None:
    """Raise ValueError for a temperature that an attention function does not take."""
    if function == "caf" and not 0.0 <= temperature <= 1.0:
        raise ValueError(f"temperature {temperature} is not in [0, 1]")
    if function == "softmax" and not temperature > 0.0:
        raise ValueError(f"temperature {temperature} must be above 0: logits are divided by it (30 to 1 in training)")


def last_temperature(function: str, **kwargs: Any) -> Tensor:
    """The temperature at the end of training as a tensor []; `kwargs` are its device and dtype."""
    return torch.tensor(TEMPERATURES[function][1], **kwargs)


# as in the released code, it keeps the division of `total` finite
EPSILON = 1e-3


def total(z: Tensor, dim: int) -> Tensor:
    """The sum of |z| along a dimension, which is kept, and `EPSILON`: KernelWarehouse divides logits by it (eq. 4)."""
    return z.abs().sum(dim=dim, keepdim=True) + EPSILON


def caf(z: Tensor, temperature: Tensor) -> Tensor:
    """KernelWarehouse's attention function (equation 4), annealed from the first of n kernels.

    Args:
        z: logits [B, n].
        temperature: tau, [].

    Returns:
        The attentions [B, n]; at temperature 1 the first kernel has attention 1, and the others 0.
    """
    alpha = z / total(z, dim=1)
    beta = F.one_hot(torch.zeros((), dtype=torch.long, device=z.device), z.shape[1]).to(z.dtype)
    return torch.lerp(alpha, beta.expand_as(alpha), temperature.to(z.dtype))


class Annealed:
    """A layer whose `attention` has a `temperature` and, unless the class sets `schedule`, an `attention_function`."""

    @property
    def schedule(self) -> str:
        """The attention function that defines the range of temperatures."""
        return self.attention.attention_function

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature: T, by which logits are divided (from 30 to 1), or tau of "caf" (from 1 to 0).

        Raises:
            ValueError: the attention function does not take this temperature.
        """
        check_temperature(temperature, self.schedule)
        self.attention.temperature.fill_(temperature)

    @property
    def temperatures(self) -> tuple[float, float]:
        """The (first, last) temperature of the training schedule."""
        return TEMPERATURES[self.schedule]
