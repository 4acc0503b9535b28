"""Dynamic layers, one method a file."""

from .cgc import CGCConv1d, CGCConv2d, CGCConv3d
from .condconv import CondConv1d, CondConv2d, CondConv3d, CondLinear
from .dcd import DCDConv1d, DCDConv2d, DCDConv3d, DCDLinear
from .dyconv import DYConv1d, DYConv2d, DYConv3d, DYLinear
from .kernel_representation import KRClassifier, KRConv1d, KRConv2d, KRConv3d, KRLinear
from .kernel_warehouse import KWAttention, KWConv1d, KWConv2d, KWConv3d, KWLinear
from .odconv import ODConv1d, ODConv2d, ODConv3d, ODLinear
from .warehouse import Warehouse, Warehouses
from .weight_excitation import WEConv1d, WEConv2d, WEConv3d, WELinear
from .weightnet import WeightNetConv1d, WeightNetConv2d, WeightNetConv3d, WeightNetLinear

__all__ = [
    "CGCConv1d",
    "CGCConv2d",
    "CGCConv3d",
    "CondConv1d",
    "CondConv2d",
    "CondConv3d",
    "CondLinear",
    "DCDConv1d",
    "DCDConv2d",
    "DCDConv3d",
    "DCDLinear",
    "DYConv1d",
    "DYConv2d",
    "DYConv3d",
    "DYLinear",
    "KRClassifier",
    "KRConv1d",
    "KRConv2d",
    "KRConv3d",
    "KRLinear",
    "KWAttention",
    "KWConv1d",
    "KWConv2d",
    "KWConv3d",
    "KWLinear",
    "ODConv1d",
    "ODConv2d",
    "ODConv3d",
    "ODLinear",
    "WEConv1d",
    "WEConv2d",
    "WEConv3d",
    "WELinear",
    "Warehouse",
    "Warehouses",
    "WeightNetConv1d",
    "WeightNetConv2d",
    "WeightNetConv3d",
    "WeightNetLinear",
]
