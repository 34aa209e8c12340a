"""``gatecc::linear_attention``: attention by a recurrence, in four rules; its whole life, one matter a file."""

from gatecc.ops.linear_attention.operator import bidirectional, linear_attention
from gatecc.ops.linear_attention.step import linear_attention_step

__all__ = ["bidirectional", "linear_attention", "linear_attention_step"]
