"""The evaluation orders by name: forward and backward pass, and where each is available."""

from . import mixed, orders
from .depthwise import depthwise_available, depthwise_backward, depthwise_forward
from .fused import fused_available, fused_backward, fused_forward
from .pointwise import pointwise_available, pointwise_backward, pointwise_forward
from .triton_orders import (
    triton_available,
    triton_backward,
    triton_forward,
    triton_fused_backward,
    triton_fused_forward,
)

ORDERS = {
    "grouped": (orders.grouped_forward, orders.grouped_backward),
    "batched": (orders.batched_forward, orders.batched_backward),
    "mixed": (mixed.mixed_forward, mixed.mixed_backward),
    "outputs": (mixed.outputs_forward, mixed.outputs_backward),
    "fused": (fused_forward, fused_backward),
    "depthwise": (depthwise_forward, depthwise_backward),
    "pointwise": (pointwise_forward, pointwise_backward),
    "triton": (triton_forward, triton_backward),
    "triton_fused": (triton_fused_forward, triton_fused_backward),
}
# they work in float32 (or float64) whatever the type of the input
COMPILED = ("fused", "depthwise", "pointwise")


def available_orders(geo, dtype, device):
    """The orders that can evaluate a call with an input of a data type, on a type of device."""
    available = {"grouped": True, "fused": fused_available(geo, dtype, device)}
    available["outputs"] = mixed.outputs_available(geo)
    available["depthwise"] = depthwise_available(geo, dtype, device)
    available["pointwise"] = pointwise_available(geo, dtype, device)
    available["triton"] = available["triton_fused"] = triton_available(geo, dtype, device)
    return [name for name in ORDERS if available.get(name, geo.foldable)]
