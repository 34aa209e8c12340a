"""Short convolutions on a GPU, in Triton: compiled when first needed. Importing this registers them, without Triton."""

from gatecc.ops.short_convolution.triton import dispatch

__all__ = ["dispatch"]
