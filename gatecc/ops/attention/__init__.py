"""``gatecc::attention``: softmax attention with gate, bias, soft cap and sinks; its whole life, one matter a file."""

from gatecc.ops.attention.operator import attention

from gatecc.ops.attention import c, triton  # isort: skip  (kernels, which register themselves)
from gatecc.ops.attention import registration  # isort: skip  (of the operators above)

__all__ = ["attention", "c", "registration", "triton"]
