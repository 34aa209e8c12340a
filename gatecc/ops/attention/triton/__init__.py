"""Attention on a GPU, in Triton: compiled when first needed. Importing this registers it, without Triton."""

from gatecc.ops.attention.triton import dispatch

__all__ = ["dispatch"]
