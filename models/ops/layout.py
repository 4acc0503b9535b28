"""Where the channels of an image or a feature map lie in memory."""

from collections.abc import Sequence

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are innermost in memory (as in torch.channels_last, in any number of dimensions)."""
    return x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()


def in_layout(x: Tensor, last: bool) -> Tensor:
    """x without gaps in memory, with channels innermost if `last`."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


def empty_like_layout(x: Tensor, channels: int, out: Sequence[int]) -> Tensor:
    """An uninitialised output [B, channels, *out], with channels innermost in memory if those of x are."""
    if is_channels_last(x):
        return x.new_empty(x.shape[0], *out, channels).movedim(-1, 1)
    return x.new_empty(x.shape[0], channels, *out)
