"""The derived decoder: a causal model's full-sequence graph already contains its decode step.

Nodes that do not depend on the tokens (masks, rotary tables, learned positions) are evaluated once for a capacity and
cut to the rows of the new tokens; data nodes are evaluated for the new tokens. Where positions meet, a step rule lets
the past in through a slot of the state: attention its keys and values, a window the last of them, linear attention a
d x d matrix, a causal convolution its last taps, a cumulative sum the sum so far. A node that mixes positions and has
no rule is refused by name, and so is a mask that does not prove causal.

    inputs, kinds    what depends on what                plan      all of it together
    rules, mixers    slots are put into the graph        emit      the step program is written
    labels           positions that axes run over        tables, state, runtime, generate      running it
"""

from gatecc.decoder.derive import decoder as decoder
from gatecc.decoder.runtime.decoder import Decoder as Decoder
