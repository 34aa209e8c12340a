"""``gatecc::sequences``: the sequences that an attention mask lets tokens belong to."""

from gatecc.ops.sequences.operator import numbers, sequences, visible

from gatecc.ops.sequences import registration  # isort: skip  (of the operator above)

__all__ = ["numbers", "registration", "sequences", "visible"]
