"""``gatecc::evicted_attention``: attention to the keys that a flag per token and head keeps; its cache shrinks."""

from gatecc.ops.evicted_attention import registration as registration  # enters the operator
from gatecc.ops.evicted_attention.operator import evicted_attention

from gatecc.ops.evicted_attention import c  # isort: skip  (kernels, which register themselves)

__all__ = ["c", "evicted_attention"]
