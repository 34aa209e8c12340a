"""attention-operator: fused attention becomes `gatecc::attention` where that is faster.

torch's kernel computes whole blocks of a causal mask, and has no word for a sliding window. Nor has it one for capped
scores, a logit beside them that belongs to no key (gpt-oss), or values that are not as wide as keys: what is spelled
out for their sake becomes the operator, too. What it gains on this kind of CPU is data (gatecc.ops.attention.c.profit);
where it gains nothing, all stays as it is. On a GPU, where nothing was measured, windows, caps and sinks alone become
the operator: a window's pairs are a part of those that torch's kernel goes through with a mask, and scores that are
capped or joined to a logit are written to memory otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.attention.walk import spelled_out
from gatecc.ir.ops import named
from gatecc.ir.program import Program, fake
from gatecc.ir.site import Attention, Site
from gatecc.ir.sizes import Size, on_example, same
from gatecc.ops.attention.c.profit import Kind, gain
from gatecc.ops.attention.cost import pairs
from gatecc.passes.lower.attention.autocast import autocasts
from gatecc.passes.lower.attention.fused_call import FusedCall
from gatecc.passes.lower.attention.mask_proof import MaskProof, prove
from gatecc.passes.lower.attention.numbers import number
from gatecc.passes.lower.attention.softmax_reading import UnreadableError
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.replace import replace as replace_node
from gatecc.passes.lower.restride import restride
from gatecc.passes.lower.spelled_attention import hints, plan, replace_core

LEAST = 1.05  # times the speed of torch's, of which the measurement is sure


class AttentionOperator(Lowering):
    """SDPA -> gatecc::attention."""

    name = "attention-operator"
    left = "where it was not measured to be faster; dropout, float16, float64, autocast"
    after = ("causal-mask", "gated-attention", "spelled-attention")

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        found = [s for s in sites if isinstance(s, Attention)]
        spelled = [s for s in found if s.spelling != "sdpa"]
        if spelled:
            yield from self._spelled(program, spelled, settings)
        fused = [s for s in found if s.spelling == "sdpa"]
        flow = Flow(program) if fused else None
        for site in fused:
            if flow is not None:
                yield self._at(site, flow, settings)

    def _spelled(self, program: Program, sites: list[Attention], settings: Settings) -> Iterator[Outcome]:
        """Those that are beyond torch's operator alone; what else keeps one from being fused was said before."""
        flow = Flow(program)
        parts = spelled_out(program, flow)
        plans: list[tuple[Attention, FusedCall, set[fx.Node], MaskProof]] = []
        for site in sites:
            try:
                plans.append((site, *plan(site, parts[site.core], flow, settings, own=True)))
            except UnreadableError:
                continue
        made: dict[fx.Node, fx.Node] = {}
        for site, call, inner, proof in plans:
            words = _beyond_torch(call)
            if not words:
                continue
            at = Outcome(self.name, site.owner, site.line, f"spelled-out attention, {site.mask}, {words}")
            at_gpu = on_gpu(site.core)
            held = fake(call.operands.q.node)
            kind: Kind = "causal" if call.causal else "masked" if call.terms or call.hidden else "full"
            on_cpu = held is not None and held.device.type == "cpu"
            queries, keys = hints(call)
            speed = gain(held.dtype, kind, queries, keys, training=settings.training) if held is not None else 0.0
            gains = call.softcap is not None or call.sinks is not None if at_gpu else on_cpu and speed >= LEAST
            if not gains or autocasts(program):
                yield replace(at, reason=f"on this device the operator gains nothing at {queries} x {keys} tokens")
                continue
            arguments = [made.get(node, node) for node in call.nodes]
            made[site.core] = replace_core(program, self.name, site.core, call, arguments, inner)
            reason, gained = "every operator between the two products was read", "the scores are not written to memory"
            yield replace(at, became=f"gatecc::attention, {words}", reason=reason, gain=gained, assumes=proof.buffers)

    def _at(self, site: Attention, flow: Flow, settings: Settings) -> Outcome:
        at = Outcome(self.name, site.owner, site.line, f"fused attention, {site.mask}")
        found = read_call(site, flow, settings)
        if isinstance(found, str):
            return replace(at, reason=found)
        call, assumes, proof = found
        tensors = [n for n in site.core.args[:4] if isinstance(n, fx.Node)]
        if not call.masked:
            tensors = tensors[:3]
        if on_gpu(site.core):
            if call.window is None:
                return replace(at, reason="on a GPU torch's fused attention serves all but windows")
            what = f"of the pairs of a query and a key {_share(site, call):.2f} are computed, and no mask is read"
        else:
            speed = _speed(site, call, settings)
            if speed < LEAST:
                slow = f"on this CPU the operator would run at {speed:.2f} times the speed of torch's"
                return replace(at, reason=slow)
            what = f"{speed:.2f} times the speed of torch's fused attention, measured on this kind of CPU"
        (made,) = insert(flow.program, self.name, site.core, call, *tensors)
        readers = list(site.core.users)
        site.core.replace_all_uses_with(made)
        if not restride(flow.program, made):  # somebody views the result as it lay before
            (laid_out,) = insert(flow.program, self.name, site.core, replace(call, contiguous=True), *tensors)
            for reader in readers:
                reader.replace_input_with(made, laid_out)
            made = laid_out
            restride(flow.program, made)
        replace_node(flow.program, site.core, made)
        return replace(at, became=str(call), reason=proof, gain=what, assumes=assumes)


def _beyond_torch(call: FusedCall) -> str:
    """What torch's operator has no word for, or no kernel on a CPU; empty if it is nothing."""
    widths = call.operands.width[0].size != call.operands.v_width[0].size
    words = [f"scores capped at {call.softcap:g}"] if call.softcap is not None else []
    words += ["sinks"] * (call.sinks is not None)
    return ", ".join(words + ["values of another width"] * widths)


@dataclass(frozen=True)
class Call:
    """The operator's call, as a function of (q, k, v), a mask if it is ``masked`` and, with an ``activation``, a gate
    (B, H, N, E or 1)."""

    scale: float | None
    causal: bool
    window: int | None
    masked: bool
    contiguous: bool = False
    activation: str = ""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        bias = others[0][(None,) * (4 - others[0].dim())] if self.masked else None
        options: dict[str, Any] = {"scale": self.scale, "causal": self.causal, "window": self.window}
        gate = others[-1] if self.activation else None
        if gate is not None:
            options["gate_activation"] = self.activation
        out = torch.ops.gatecc.attention(q, k, v, gate, bias, **options)[0]
        return out.contiguous() if self.contiguous else out

    def __str__(self) -> str:
        words = ["causal"] * self.causal + [f"window={self.window}"] * bool(self.window) + ["with a mask"] * self.masked
        return "gatecc::attention" + ", " * bool(words) + ", ".join(words)


def read_call(site: Attention, flow: Flow, settings: Settings) -> tuple[Call, tuple[str, ...], str] | str:
    """The call, the buffers that it rests on and what proved it; or why there is none."""
    core, learned = site.core, settings.training
    q, k, v = (fake(n) if isinstance(n, fx.Node) else None for n in core.args[:3])
    if q is None or k is None or v is None or {q.dim(), k.dim(), v.dim()} != {4}:
        return "queries, keys and values do not have four axes"
    if q.device.type not in ("cpu", "cuda"):
        return "on this device torch's fused attention serves"
    if autocasts(flow.program):
        return "operators run in another precision than the graph records"
    if named(core, "dropout_p"):
        return "weights are dropped out, which the operator does not"
    scale = named(core, "scale")
    scale = scale if scale is None else number(scale, flow)
    if scale is None and named(core, "scale") is not None:
        return "the scale is not known"
    heads: tuple[Any, Any] = q.size(1), k.size(1)
    if not (same(q.size(0), k.size(0)) and same(k.size(0), v.size(0)) and same(k.size(1), v.size(1))):
        return "keys are broadcast to the queries"
    if not all(isinstance(h, int) for h in heads) or heads[0] % heads[1]:
        return "the number of heads changes from call to call"
    mask, causal = named(core, "attn_mask"), bool(named(core, "is_causal"))
    if causal and not same(q.size(2), k.size(2)):
        return "there are more keys than queries, and is_causal counts queries from the first key"
    if not isinstance(mask, fx.Node):
        return Call(scale, causal, None, False), (), "the fused operator says what is hidden"
    return _masked(site, mask, scale, flow, learned)


def _masked(
    site: Attention, mask: fx.Node, scale: float | None, flow: Flow, training: bool
) -> tuple[Call, tuple[str, ...], str] | str:
    held = fake(mask)
    if held is None or (training and mask in flow.learned):
        return "the mask is learned"
    sizes = _lengths(site)
    proof = prove(site.mask, [mask], sizes, flow, windows=True)
    if proof.kind == "sliding_window":
        return Call(scale, True, site.mask.window, False), proof.buffers, "the mask was evaluated at several sizes"
    known = site.mask.causal and same(*sizes) and (held.dtype == torch.bool or proof.all_see)
    if known and proof.known:
        return Call(scale, True, None, True), proof.buffers, "no query sees a later key, and the mask says the rest"
    return Call(scale, False, None, True), (), "the mask stays as it is"


def _lengths(site: Attention) -> tuple[Size, Size]:
    """The numbers of queries and keys."""
    held = [fake(n) for n in site.core.args[:2] if isinstance(n, fx.Node)]
    queries, keys = (x.size(2) for x in held if x is not None)
    return queries, keys


def on_gpu(node: fx.Node) -> bool:
    """Whether a node's value is on a GPU."""
    return node.meta["val"].device.type == "cuda"


def _share(site: Attention, call: Call) -> float:
    """How many of all pairs a query sees."""
    N, S = (on_example(size) or 1 for size in _lengths(site))
    return pairs(N, S, causal=call.causal, window=call.window) / (N * S)


def _speed(site: Attention, call: Call, settings: Settings) -> float:
    query = site.core.args[0]
    held = fake(query) if isinstance(query, fx.Node) else None
    assert held is not None
    kind: Kind = "causal" if call.causal else "masked" if call.masked else "full"
    queries, keys = (on_example(size) or 0 for size in _lengths(site))
    return gain(held.dtype, kind, queries, keys, training=settings.training)


__all__ = ["AttentionOperator", "Call", "on_gpu", "read_call"]
