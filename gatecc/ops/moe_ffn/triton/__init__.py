"""Experts on a GPU, in Triton: compiled when first needed. Importing this registers them, without Triton."""

from gatecc.ops.moe_ffn.triton import dispatch

__all__ = ["dispatch"]
