"""The operations that are neither views nor elementwise: each hands its views to a kernel, or says why it can't."""

from hetero.opencl.handlers import attention, movement, products, reductions, rows
from hetero.opencl.handlers.registry import HANDLERS, Handler

__all__ = ["HANDLERS", "Handler", "attention", "movement", "products", "reductions", "rows"]
