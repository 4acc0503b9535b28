"""Dynamic layers, one method a file."""

from .kernel_warehouse import KWAttention, KWConv1d, KWConv2d, KWConv3d, KWLinear
from .warehouse import Warehouse

__all__ = ["KWAttention", "KWConv1d", "KWConv2d", "KWConv3d", "KWLinear", "Warehouse"]
