"""Operators of namespace gatecc, one a file. Importing this package registers them."""

from gatecc.ops import estimators, linear_attention, rnn, sequences

__all__ = ["estimators", "linear_attention", "rnn", "sequences"]
