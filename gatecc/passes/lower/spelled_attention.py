"""spelled-attention: softmax attention that is written out becomes the fused operator.

A mask that proves causal becomes ``is_causal``, one that hides nothing goes; any other stays a tensor.
Repeated key heads are not repeated, and dropout stays with its probability (its random stream is another one).

**What is exact.** Queries that see no key: an additive mask of finite numbers gives them the mean of all values, a mask
of -inf gives NaN; the fused operator gives the same and zeros. So finite masks stay finite, and NaN is written where it
stood. But the fused operator's gradient of such a query is wrong (measured on the CPU: 1 in the place of 1/keys for
each weight): in training a mask has to prove that every query sees a key.

**Where it gains.** Measured on a CPU with AVX-512 as Inductor's CPU time for the spelled-out form over that for the
fused operator (1 thread, fp32, 8 heads of width 64), queries = keys = N:

    no mask      1.24 at N=16, 1.02 at 64, 1.06 at 128, 1.02 at 512 and 1024; with its backward 0.97 at 128, 1.44 at
                 1024
    causal       1.08 at 64, 1.03 at 128, 1.19 at 256, 1.26 at 512, 2.4 at 1024, 2.8 at 2048; with its backward 1.0 at
                 512, 1.6 at 1024, 2.0 at 2048
    padding      1.21 at 256
    bias (H,N,N) 0.66 at 16, 0.98 at 64, 0.93 at 128, 1.13 at 256 and 512; one for each sample 2.0 at 512
    one query    0.64

So a bias stays with a short sequence, and so does a single query. A length that changes counts as it is in the first
call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.attention.assemble import Parts
from gatecc.ir.match.attention.walk import spelled_out
from gatecc.ir.program import Program, fake
from gatecc.ir.site import Attention, Site
from gatecc.ir.sizes import node_shape, on_example
from gatecc.passes.lower.attention.autocast import autocasts
from gatecc.passes.lower.attention.fused_call import FusedCall
from gatecc.passes.lower.attention.mask_proof import MaskProof, prove
from gatecc.passes.lower.attention.operands import Operands, operands
from gatecc.passes.lower.attention.softmax_reading import Reading, Term, UnreadableError, read
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.restride import restride

SHORT = 192  # tokens, below which a bias is added faster by Inductor's own code


class SpelledAttention(Lowering):
    """softmax(q k^T) v in any spelling -> SDPA."""

    name = "spelled-attention"
    left = "weights that are read elsewhere, a row that may see no key in training, dropout on a CPU, one query"
    refuses = "attention"

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        spelled = [s for s in sites if isinstance(s, Attention) and s.spelling != "sdpa"]
        if not spelled:
            return
        flow = Flow(program)
        parts = spelled_out(program, flow)
        plans: list[tuple[Attention, FusedCall, set[fx.Node], MaskProof]] = []
        for site in spelled:
            try:
                plans.append((site, *plan(site, parts[site.core], flow, settings)))
            except UnreadableError as e:
                about = frozenset((site.core.name,))
                yield Outcome(self.name, site.owner, site.line, _found(site), reason=str(e), about=about)
        made: dict[fx.Node, fx.Node] = {}
        for site, call, inner, proof in plans:
            arguments = [made.get(node, node) for node in call.nodes]
            made[site.core] = replace_core(program, self.name, site.core, call, arguments, inner)
            became = "fused attention, " + _described(call)
            reason = "every operator between the two products was read"
            gain = "the scores are not written to memory" + ", half of them are not computed" * call.causal
            yield Outcome(self.name, site.owner, site.line, _found(site), became, reason, gain, proof.buffers)


def _found(site: Attention) -> str:
    return f"spelled-out attention, {site.mask}" + f", dropout {site.dropout:g}" * bool(site.dropout)


def _described(call: FusedCall) -> str:
    if call.causal:
        return "is_causal=True"
    return "with a mask" if call.terms or call.hidden else "without a mask"


# --- what is called ---------------------------------------------------------------------------------------------------


def plan(
    site: Attention, parts: Parts, flow: Flow, settings: Settings, own: bool = False
) -> tuple[FusedCall, set[fx.Node], MaskProof]:
    """The call in the place of a site, the nodes that go, and what its mask proves; ``own``: of gatecc's operator.

    Raises UnreadableError if the site has to stay.
    """
    reading = read(parts, flow, settings.training)
    found = operands(reading, flow)
    tensors = [one.node for one in (*reading.terms, *reading.hidden)]
    lengths = _length(found, found.queries), _length(found, found.keys)
    alone = reading.softcap is not None or reading.sinks is not None
    if reading.dropout and (own or alone):
        raise UnreadableError("weights are dropped out, which gatecc::attention does not")
    if reading.sinks is not None and not reading.sinks.now(reading.cuts).atoms <= set(found.batch):
        raise UnreadableError("the logit that is joined to the scores is not the same for all queries")
    if reading.softcap is not None and not own:
        raise UnreadableError("the scores are capped, which torch's fused operator cannot")
    if reading.sinks is not None and not own:
        raise UnreadableError("a further logit is in the softmax, for which torch's fused operator has no place")
    proof = prove(site.mask, tensors, lengths, flow, windows=own)
    call = _call(reading, found, proof, flow)
    if own:
        window = site.mask.window if proof.kind == "sliding_window" else None
        call = replace(call, own=True, window=window, causal=proof.kind in ("causal", "sliding_window"))
    for node in call.nodes:
        _check_operand(node, reading, flow)
    unclear = _unclear(reading, call, proof)
    if reason := unclear or _inexact(call, flow.program, proof, settings) or _unprofitable(call, flow, settings):
        raise UnreadableError(reason)
    return call, reading.inner, proof


def _call(reading: Reading, found: Operands, proof: MaskProof, flow: Flow) -> FusedCall:
    now, core = reading.cuts.layout, fake(reading.parts.core)
    terms = [] if proof.kind else [replace(t, layout=now(t.layout)) for t in reading.terms]
    hidden = [] if proof.kind else [replace(h, layout=now(h.layout)) for h in reading.hidden]
    endless = any(h.fill == -torch.inf for h in hidden) or any(t.node not in flow.learned for t in terms)
    zero = reading.empty_rows_are_zero or reading.sinks is not None  # a sink takes all the weight
    numbers = zero or reading.nan_is_zero or reading.floor is not None
    assert core is not None
    return FusedCall(
        found,
        found.q.factor * found.k.factor * reading.scale * (1.0 if reading.softcap is None else reading.uncapped),
        [replace(m, layout=now(m.layout)) for m in reading.multipliers],
        terms,
        hidden,
        causal=proof.kind == "causal",
        as_boolean=proof.all_see or zero,
        nan_rows=endless and not proof.all_see and not numbers,
        floor=reading.floor,
        dropout=reading.dropout,
        dtype=core.dtype,
        softcap=reading.softcap,
        sinks=None if reading.sinks is None else reading.sinks.now(reading.cuts),
    )


def _length(found: Operands, group: Any) -> Any:
    """The size of an axis of the queries or the keys."""
    for operand in (found.q, found.k):
        for size, held in zip(node_shape(operand.node) or (), operand.layout, strict=True):
            if held == group:
                return size
    raise UnreadableError("a length is not an axis of its own")


def _check_operand(node: fx.Node, reading: Reading, flow: Flow) -> None:
    """What is read later than before must be the same by then, and must not be made of what goes away.

    Raises UnreadableError.
    """
    end = flow.order[reading.parts.core]
    writers = flow.writers.get(flow.base[node], ())
    if any(flow.order[node] < flow.order[writer] < end for writer in writers):
        raise UnreadableError(f"{node.name} is written to in place before the values are weighed")
    stack, seen = [node], set[fx.Node]()
    while stack:
        one = stack.pop()
        if one in reading.inner:
            raise UnreadableError(f"{node.name} is made of the scores")
        if one not in seen and flow.order[one] > flow.order[reading.parts.product.node]:
            seen.add(one)
            stack.extend(one.all_input_nodes)


# --- whether to -------------------------------------------------------------------------------------------------------


def _unclear(reading: Reading, call: FusedCall, proof: MaskProof) -> str:
    """Why it is not known what a query gets that sees no key; empty if it is, or if there is none."""
    if proof.all_see or call.sinks is not None:  # a sink takes all the weight
        return ""
    if reading.zeroed and (call.terms or any(h not in reading.zeroed for h in reading.hidden)):
        return "nothing proves that every query sees a key, and after the softmax but a part of the mask hides keys"
    fills = {h.fill for h in call.hidden}
    if len(fills) > 1 or (call.terms and fills - {-torch.inf}):
        return "nothing proves that every query sees a key, and one that sees none is hidden by several numbers"
    return ""


def _inexact(call: FusedCall, program: Program, proof: MaskProof, settings: Settings) -> str:
    """Why the fused operator would not compute the same; empty if it does."""
    tensors = [fake(n) for n in call.nodes[:3]]
    if any(t is None or not t.is_floating_point() for t in tensors):
        return "queries, keys and values are no floating-point numbers"
    if any(t is not None and t.device.type not in ("cpu", "cuda") for t in tensors):
        return "nothing is known of the fused operator on this device"
    masked = bool(call.terms or call.hidden)
    if not masked or proof.all_see or call.sinks is not None:
        return ""
    finite = any(h.fill != -torch.inf for h in call.hidden) or bool(call.terms) or call.floor is not None
    if settings.training and finite and not call.as_boolean:
        return "nothing proves that every query sees a key, and one that sees none would get another gradient"
    if finite and (autocasts(program) or any(t is not None and t.dtype == torch.float16 for t in tensors)):
        return "nothing proves that every query sees a key, and half precision holds no number that hides all keys"
    return ""


def _unprofitable(call: FusedCall, flow: Flow, settings: Settings) -> str:
    """Why nothing would be gained; empty if something is."""
    o = call.operands
    q = fake(o.q.node)
    if q is None or q.device.type != "cpu":
        return ""
    if call.dropout:
        return "the fused operator of the CPU has no dropout"
    if o.width[0].size != o.v_width[0].size and not call.own:
        return "the fused operator of the CPU wants values as wide as keys"
    if any(_is_square(t, call) for t in call.terms) and max(hints(call)) < SHORT:
        return f"a bias for each pair of tokens gains nothing below {SHORT} tokens"
    if settings.training and any(t.node in flow.learned for t in call.terms):
        return "the fused operator of the CPU has no gradient for a learned bias"
    return ""


def _is_square(term: Term, call: FusedCall) -> bool:
    """Whether a term is another one for each pair of a query and a key."""
    atoms = {atom for group in term.layout for atom in group}
    return atoms.issuperset(call.operands.queries) and atoms.issuperset(call.operands.keys)


def hints(call: FusedCall) -> list[int]:
    """The numbers of queries and keys in this call."""
    sizes = [_length(call.operands, group) for group in (call.operands.queries, call.operands.keys)]
    return [on_example(size) or SHORT for size in sizes]


# --- the edit ---------------------------------------------------------------------------------------------------------


def replace_core(
    program: Program, name: str, core: fx.Node, call: FusedCall, arguments: Sequence[fx.Node], inner: set[fx.Node]
) -> fx.Node:
    """Put the call of a lowering in the place of the core, and take out what only the core read."""
    (made,) = insert(program, name, core, call, *arguments)
    readers = list(core.users)
    core.replace_all_uses_with(made)
    if not restride(program, made):  # somebody views the result as it lay before
        (laid_out,) = insert(program, name, core, replace(call, contiguous=True), *arguments)
        for reader in readers:
            reader.replace_input_with(made, laid_out)
        made = laid_out
        restride(program, made)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for node in sorted({core, *inner}, key=order.__getitem__, reverse=True):
        program.graph.erase_node(node)
    return made


__all__ = ["SpelledAttention", "hints", "plan", "replace_core"]
