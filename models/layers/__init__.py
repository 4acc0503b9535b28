"""Dynamic layers, one method a file."""

from .kernel_warehouse import KWAttention, KWConv1d, KWConv2d, KWConv3d, KWLinear
from .warehouse import Warehouse, Warehouses

__all__ = ["KWAttention", "KWConv1d", "KWConv2d", "KWConv3d", "KWLinear", "Warehouse", "Warehouses"]
