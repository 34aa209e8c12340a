"""``gatecc::moe_ffn`` on a CPU, in plain C. Importing this registers the kernels."""

from gatecc.ops.moe_ffn.c import kernels

__all__ = ["kernels"]
