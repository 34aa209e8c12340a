"""``gatecc::linear_attention``: attention by a recurrence, in four rules; its whole life, one matter a file."""

from gatecc.ops.linear_attention.operator import bidirectional, linear_attention
from gatecc.ops.linear_attention.step import linear_attention_step

from gatecc.ops.linear_attention import cost  # isort: skip  (formulas of the operators above)
from gatecc.ops.linear_attention import c, triton  # isort: skip  (kernels, which register themselves)

__all__ = ["bidirectional", "c", "cost", "linear_attention", "linear_attention_step", "triton"]
