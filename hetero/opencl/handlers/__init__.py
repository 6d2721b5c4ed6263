"""The operations that are neither views nor elementwise: each hands its views to a kernel, or says why it can't."""

from hetero.opencl.handlers import attention, indexing, movement, ordering, products, random, reductions, rows
from hetero.opencl.handlers.registry import HANDLERS, Handler

__all__ = [
    "HANDLERS",
    "Handler",
    "attention",
    "indexing",
    "movement",
    "ordering",
    "products",
    "random",
    "reductions",
    "rows",
]
