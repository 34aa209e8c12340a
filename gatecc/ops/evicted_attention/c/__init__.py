"""``gatecc::evicted_attention`` on a CPU, in plain C: one token over what each head holds."""

from gatecc.ops.evicted_attention.c import kernels

__all__ = ["kernels"]
