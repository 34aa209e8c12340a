"""``gatecc::gated_conv``: a convolution of which each sample computes the output channels that its gate leaves on."""

from gatecc.ops.gated_conv import registration as registration  # enters the operator
from gatecc.ops.gated_conv.operator import gated_conv

from gatecc.ops.gated_conv import c  # isort: skip  (kernels, which register themselves)

__all__ = ["c", "gated_conv"]
