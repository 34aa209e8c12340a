"""``gatecc::short_convolution`` on a CPU, in plain C. Importing this registers the kernels."""

from gatecc.ops.short_convolution.c import kernels

__all__ = ["kernels"]
