"""``gatecc::cached_attention``: causal softmax attention of new tokens over what is kept of earlier ones."""

from gatecc.ops.cached_attention import registration
from gatecc.ops.cached_attention.operator import cached_attention

__all__ = ["cached_attention", "registration"]
