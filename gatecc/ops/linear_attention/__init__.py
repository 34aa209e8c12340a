"""``gatecc::linear_attention``: attention by a recurrence, in four rules; its whole life, one matter a file."""

from gatecc.ops.linear_attention.operator import bidirectional, linear_attention
from gatecc.ops.linear_attention.step import linear_attention_step

from gatecc.ops.linear_attention import c, triton  # isort: skip  (kernels, which register themselves)
from gatecc.ops.linear_attention import registration  # isort: skip  (of the operators above)

__all__ = ["bidirectional", "c", "linear_attention", "linear_attention_step", "registration", "triton"]
