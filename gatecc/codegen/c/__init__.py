"""Kernels in plain C, built by the system's compiler when they are first needed. Importing this registers them."""

from gatecc.codegen.c import linear_attention

__all__ = ["linear_attention"]
