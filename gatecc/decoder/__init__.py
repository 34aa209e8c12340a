"""The derived decoder: a causal model's full-sequence graph already contains its decode step.

Nodes that do not depend on the tokens (masks, rotary tables, learned positions) are evaluated once for a capacity and
cut to the rows of the new tokens; data nodes are evaluated for the new tokens. Where positions meet, a step rule lets
the past in through a slot of the state: attention its keys and values, a window the last of them, linear attention a
d x d matrix, a causal convolution its last inputs, a cumulative sum the sum so far. A node that mixes positions and has
no rule is refused by name, and so is a mask that does not prove causal.

    analysis   sizes that are the length, what depends on what, the positions that axes run over
    rules      slots are put into the graph
    plan       all of it together
    emit       the step is written as a program, and lowered to what runs
    runtime    running it: tables, state, generation, serving transformers
"""

from gatecc.decoder.derive import decoder as decoder
from gatecc.decoder.runtime.decoder import Decoder as Decoder
