"""``gatecc::chosen_blocks``: causal attention of each token to the blocks of keys that a gate chooses for it."""

from gatecc.ops.chosen_blocks import registration as registration  # enters the operators
from gatecc.ops.chosen_blocks.operator import chosen_loss

__all__ = ["chosen_loss"]
