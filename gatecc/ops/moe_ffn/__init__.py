"""``gatecc::moe_ffn``: k of E feed-forward networks per token; its whole life, one matter a file."""

from gatecc.ops.moe_ffn.operator import moe_ffn

from gatecc.ops.moe_ffn import c, triton  # isort: skip  (kernels, which register themselves)
from gatecc.ops.moe_ffn import registration  # isort: skip  (of the operators above)

__all__ = ["c", "moe_ffn", "registration", "triton"]
