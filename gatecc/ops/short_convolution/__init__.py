"""``gatecc::short_convolution``: a causal convolution of few taps along tokens; its whole life, one matter a file."""

from gatecc.ops.short_convolution.operator import short_convolution

from gatecc.ops.short_convolution import c, triton  # isort: skip  (kernels, which register themselves)
from gatecc.ops.short_convolution import registration  # isort: skip  (of the operators above)

__all__ = ["c", "registration", "short_convolution", "triton"]
