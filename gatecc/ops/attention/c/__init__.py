"""``gatecc::attention`` on a CPU, in plain C. Importing this registers the kernels."""

from gatecc.ops.attention.c import kernels

__all__ = ["kernels"]
