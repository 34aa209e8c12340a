"""``gatecc::short_convolution``: a causal convolution of few taps along tokens, each channel by itself."""

from gatecc.ops.short_convolution.operator import DTYPES, TAPS

__all__ = ["DTYPES", "TAPS"]
