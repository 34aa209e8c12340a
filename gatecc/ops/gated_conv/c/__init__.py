"""``gatecc::gated_conv`` on a CPU, in plain C: rows of the kernel are read where they lie."""

from gatecc.ops.gated_conv.c import kernels

__all__ = ["kernels"]
