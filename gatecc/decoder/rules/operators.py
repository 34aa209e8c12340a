"""Step rules of operators that carry a state of their own: linear attention, and RNN, GRU and LSTM layers.

They start from the state that they returned in the last step.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from gatecc.decoder.analysis.axes import Lengths
from gatecc.decoder.analysis.labels import named
from gatecc.decoder.refuse import refusal
from gatecc.decoder.rules.slots import Slot, recalled, resumed
from gatecc.ir.ops import opname
from gatecc.ir.program import META, origin
from gatecc.ir.sizes import described_shape, node_shape, symbols

LAYERS = frozenset("gru lstm rnn_tanh rnn_relu".split())
_ZEROS = frozenset("zeros new_zeros zeros_like".split())


def linear_attention(node: fx.Node, slots: list[Slot]) -> None:
    """gatecc::linear_attention. State: (B, H, Dk, Dv)."""
    for name, plain in (("reverse", False), ("cu_seqlens", None)):
        found = named(node, name)
        if found is not plain:
            raise refusal(node, f"linear attention with {name}", do="a decoder runs forwards over one text a sample")
    start = _start(node, named(node, "initial_state"), 1, slots)
    args = list(node.args) + [None] * (6 - len(node.args))
    node.args = (*args[:5], start, *args[6:])
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "initial_state"}


def layers(node: fx.Node, slots: list[Slot], lengths: Lengths) -> None:
    """A stack of recurrent layers over the positions: aten.gru and its like. States: (layers, B, H), an LSTM has two.

    Layers that run along another axis (of patches, say) mix no positions and stay as they are.
    """
    x, given = node.args[0], node.args[1]
    assert isinstance(x, fx.Node)
    axis = 1 if named(node, "batch_first", False) else 0
    if str(node.target).endswith(".data") or not lengths.has((node_shape(x) or (1, 1))[axis]):
        return
    if lengths.axes(x) != [axis] or not lengths.pure((node_shape(x) or (1, 1))[axis]):
        raise refusal(node, f"recurrent layers over a tensor of shape ({described_shape(x)})")
    if named(node, "bidirectional"):
        raise refusal(
            node, "recurrent layers that read the tokens in both directions", do="a decoder needs one: forwards"
        )
    if not symbols((node_shape(x) or (1, 1, 1))[1 - axis]) & lengths.batch:  # torch does not check the size of states
        raise refusal(
            node, "the batch is fixed while the model is captured", do="write x.shape[0] in the place of len(x)"
        )
    given = [given] if isinstance(given, fx.Node) else given
    assert isinstance(given, list | tuple)
    starts = [_start(node, state, i + 1, slots) for i, state in enumerate(given)]
    node.args = (x, starts if opname(node) == "lstm" else starts[0], *node.args[2:])


def _start(node: fx.Node, given: object, output: int, slots: list[Slot]) -> fx.Node:
    """A mark for the state that ``node`` returns in its ``output`` and starts from: at first from what is ``given``."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == output:
            raise refusal(user, "it reads the state after the last token, which no token before it may see")
    state = node.meta["val"][output]
    assert isinstance(state, torch.Tensor)
    slots.append(Slot("state", node, value=state, owner=origin(node).owner, output=output))
    at = len(slots) - 1
    own = given if isinstance(given, fx.Node) and opname(given) not in _ZEROS else None
    with node.graph.inserting_before(node):
        call = node.graph.call_function
        start = call(recalled, (at,)) if own is None else call(resumed, (own, at))
    start.meta = {"val": state, META: node.meta.get(META)}
    return start
