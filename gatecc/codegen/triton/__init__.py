"""Kernels in Triton for GPUs, compiled when they are first needed. Importing this registers them, without Triton."""

from gatecc.codegen.triton import linear_attention

__all__ = ["linear_attention"]
