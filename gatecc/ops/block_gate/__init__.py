"""Gates of blocks: which blocks of keys the queries of a block see, and what such a gate learns from."""

from gatecc.ops.block_gate import registration
from gatecc.ops.block_gate.operator import block_choice, block_logits, block_peaks

__all__ = ["block_choice", "block_logits", "block_peaks", "registration"]
