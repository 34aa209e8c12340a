"""What is proved of the mask of an attention, for lowerings that leave the mask out or keep it in another form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.mask import Mask
from gatecc.ir.match.mask.evaluate import AT_EXAMPLE_ONLY
from gatecc.ir.program import Program
from gatecc.ir.sizes import Size, same


@dataclass(frozen=True)
class MaskProof:
    """``kind``: the mask is this and no more ("causal", "bidirectional"), so that its tensors may be left out; empty
    with a ``reason`` if they have to stay. ``all_see``: every query sees at least one key, whatever the inputs are.
    ``buffers``: names of the placeholders whose values the proof read. ``known``: what the mask says of its kind holds
    in every call."""

    kind: str
    reason: str
    all_see: bool
    buffers: tuple[str, ...]
    known: bool


def prove(
    mask: Mask, tensors: Iterable[fx.Node], lengths: tuple[Size, Size], flow: Flow, windows: bool = False
) -> MaskProof:
    """What a mask that is made of ``tensors`` does at these numbers of queries and keys. ``windows``: whoever asks has
    a word for a sliding window."""
    tensors = list(tensors)
    known = mask.kind != "unknown" and not mask.asserted
    if mask.reason == AT_EXAMPLE_ONLY and not all(isinstance(size, int) for size in lengths):
        known = False
    all_see = known and not mask.padding
    buffers = _buffers(tensors, flow.program) if known else ()
    reason = _kept(mask, tensors, lengths, flow, known, windows)
    return MaskProof("" if reason else mask.kind, reason, all_see, buffers, known)


def _kept(
    mask: Mask, tensors: list[fx.Node], lengths: tuple[Size, Size], flow: Flow, known: bool, windows: bool
) -> str:
    """Why the mask has to stay; empty if it says no more than its kind."""
    if mask.asserted:
        return "the mask is an input of the graph: it may be another one at the next call"
    if not known:
        return mask.reason or "nothing is proved of the mask"
    kinds = ("causal", "bidirectional", "sliding_window") if windows else ("causal", "bidirectional")
    if mask.kind not in kinds or mask.padding or mask.bias:
        return f"the mask says more than that no query sees a later key: {mask}"
    if any(node in flow.learned or node in flow.data for node in tensors):
        return "the mask is made of values that change"
    if mask.kind != "bidirectional" and not same(*lengths):
        return "there are more keys than queries, and is_causal counts queries from the first key"
    return ""


def _buffers(tensors: list[fx.Node], program: Program) -> tuple[str, ...]:
    """The buffers whose values are in the tensors. Constants of the graph do not change, parameters prove nothing."""
    found: set[fx.Node] = set()
    stack = list(tensors)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    held = (n for n in found if n.op == "placeholder" and n in program.lifted and not program.is_parameter(n))
    return tuple(sorted(n.name for n in held if isinstance(n.meta.get("val"), torch.Tensor)))
