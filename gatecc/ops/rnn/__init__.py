"""RNN, GRU and LSTM layers: torch's own operators, and ``gatecc::rnn``, a layer that stays one operator."""

from gatecc.ops.rnn.operator import rnn

from gatecc.ops.rnn import registration  # isort: skip  (of the operators above)

__all__ = ["registration", "rnn"]
