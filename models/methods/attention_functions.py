"""The attention functions of kernels, and the temperatures that they are annealed with."""

import torch
import torch.nn.functional as F

KERNEL_FUNCTIONS = ("softmax", "caf")
# attention function -> (first, last) temperature of the training schedule
TEMPERATURES = {"softmax": (30.0, 1.0), "caf": (1.0, 0.0)}


def check_temperature(temperature, function):
    """Raises ValueError for a temperature outside of what an attention function takes."""
    if function == "caf" and not 0.0 <= temperature <= 1.0:
        raise ValueError(f"temperature {temperature} is not in [0, 1]")
    if function == "softmax" and not temperature > 0.0:
        raise ValueError(f"temperature {temperature} must be above 0: logits are divided by it (30 to 1 in training)")


def last_temperature(function, **kwargs):
    """The temperature after training, as a tensor."""
    return torch.tensor(TEMPERATURES[function][1], **kwargs)


def total(z, dim):
    """What KernelWarehouse divides logits by (equation 4); 1e-3 keeps the division finite, as in the released code."""
    return z.abs().sum(dim=dim, keepdim=True) + 1e-3


def caf(z, temperature):
    """KernelWarehouse's attention function (equation 4) over logits [B, n]; the first kernel is the initial one."""
    alpha = z / total(z, dim=1)
    beta = F.one_hot(torch.zeros((), dtype=torch.long, device=z.device), z.shape[1]).to(z.dtype)
    return torch.lerp(alpha, beta.expand_as(alpha), temperature.to(z.dtype))


class Annealed:
    """A layer whose `attention` has an `attention_function` among these, and a `temperature`."""

    @property
    def schedule(self):
        """The attention function whose temperatures count."""
        return self.attention.attention_function

    def set_temperature(self, temperature):
        """T that the logits are divided by, from 30 to 1; with the schedule "caf" its tau, from 1 to 0."""
        check_temperature(temperature, self.schedule)
        self.attention.temperature.fill_(temperature)

    @property
    def temperatures(self):
        """(first, last) temperature of the training schedule."""
        return TEMPERATURES[self.schedule]
