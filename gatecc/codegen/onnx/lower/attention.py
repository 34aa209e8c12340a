"""attention: softmax attention, fused or spelled out, is one node with tokens before heads.

``GroupQueryAttention`` of ONNX Runtime where no query sees a later key, as is proved of the mask: it takes the rotary
embedding, a sliding window, a soft cap, sinks, shared heads and one packed product of queries, keys and values.
``Attention`` of the standard (opset 24) where nothing is masked, and where contrib operators are not wanted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from gatecc.codegen.onnx.lower.attention_nodes import Call, is_grouped, is_multi_head, write_attention
from gatecc.codegen.onnx.lower.bias import constant_bias
from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject, lacking_kernel
from gatecc.codegen.onnx.lower.padding import padding_input
from gatecc.codegen.onnx.lower.rotation import Rotation, rotation, values_before
from gatecc.codegen.onnx.lower.views import Views
from gatecc.codegen.onnx.lower.write import UnwritableError, Writer
from gatecc.ir.evaluate import Evaluator, UnprovableError
from gatecc.ir.match.mask.evaluate import AT_EXAMPLE_ONLY
from gatecc.ir.outcome import Outcome
from gatecc.ir.program import fake
from gatecc.ir.site import Attention
from gatecc.ir.sizes import node_shape, same

_WITHOUT_PADDING = " (GroupQueryAttention if the example inputs hold no padding; decode=True takes padded prompts)"
_TRIES = 6  # values that may be the queries before their rotary embedding


class AttentionNode(GraphLowering):
    """softmax(q k^T) v -> GroupQueryAttention or Attention."""

    name = "attention"
    after = ("flat",)
    since = 23

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        sites = [s for s in subject.sites if isinstance(s, Attention)]
        if not sites:
            return
        flow = subject.flow()
        evaluator, views = Evaluator(flow), Views(flow)
        plans: list[tuple[Call, str]] = []
        for site in sites:
            call = _call(site)
            reason = _unfit(call, subject, evaluator) if call is not None else "queries, keys or values have other axes"
            if call is None or reason:
                yield self.left(site.core, _found(site), reason)
                continue
            self._turn(call, subject, evaluator)
            if call.padding is not None and not is_multi_head(call):  # no other node takes it as it is
                call.padding, call.mask = None, _tensor_mask(site)
            plans.append((call, _found(site)))
        for call, found in plans:
            try:
                became = write_attention(Writer(subject.program, call.out, self.name), subject, call, views)
            except UnwritableError as e:
                yield self.left(call.out, found, str(e))
                continue
            if call.mask is not None and call.site.mask.padding and is_grouped(subject, call.site):
                became += _WITHOUT_PADDING
            kept = f"; the rotary embedding stays outside: {call.kept_rotary}" if call.kept_rotary else ""
            yield self.done(call.out, found, became, "the mask was evaluated at several sizes" + kept)
        views.settle_all()

    def _turn(self, call: Call, subject: Subject, evaluator: Evaluator) -> None:
        """Take the rotary embedding into the node, where it is proved to be one."""
        if not call.site.rotary:
            return
        try:
            turned = [_unturned(subject, call.site, name, evaluator) for name in ("q", "k")]
        except UnprovableError as e:
            call.kept_rotary = str(e)
            return
        found, before = [one for one, _ in turned], [raw for _, raw in turned]
        if not found[0].equals(found[1]):
            call.kept_rotary = "queries and keys are turned differently"
            return
        call.rotation, (call.q, call.k) = found[0], before


def _unturned(subject: Subject, site: Attention, name: str, evaluator: Evaluator) -> tuple[Rotation, fx.Node]:
    """What turns the queries or keys of a site, and what they are before. Raises UnprovableError."""
    turned, raw = site.values[name].node, site.find(f"{name}_raw")
    known = [raw.node] if raw is not None and str(raw.axes) in ("bhnd", "bhmd") else []
    reason = "what it turns is not found"
    for candidate in [*known, *values_before(turned, evaluator.flow)][:_TRIES]:
        try:
            return _tables(subject, candidate, turned, evaluator), candidate
        except UnprovableError as e:
            reason = str(e)
    raise UnprovableError(reason)


def _tables(subject: Subject, raw: fx.Node, turned: fx.Node, evaluator: Evaluator) -> Rotation:
    """The tables of one embedding; layers that share them are evaluated once."""
    part = evaluator.slice(turned, given=frozenset({raw}))
    key = ("rotation", evaluator.signature(part), str(node_shape(raw)))
    if key not in subject.shared:
        subject.shared[key] = rotation(raw, turned, evaluator, subject.context)
    return subject.shared[key]


def _found(site: Attention) -> str:
    cap = f", soft cap {site.soft_cap:g}" if site.soft_cap else ""
    return f"attention, {site.mask}{cap}" + ", sinks" * site.sinks + ", rotary" * site.rotary


def _call(site: Attention) -> Call | None:
    """The site as a call; None if its values have other axes than (b, h, n, d)."""
    values = [site.find(name) for name in "qkv"]
    out = node_shape(site.core)
    if out is None or len(out) != 4 or any(v is None or str(v.axes) not in ("bhnd", "bhmd") for v in values):
        return None
    q, k, v = (value.node for value in values if value is not None)
    shapes = [node_shape(n) for n in (q, k, v)]
    heads = [s[1] for s in shapes if s is not None]
    fits = heads[0] == site.heads and heads[1] == heads[2] == site.kv_heads and same(out[1], site.heads)
    return Call(site, q, k, v) if fits and all(same(out[0], s[0]) for s in shapes if s is not None) else None


def _unfit(call: Call, subject: Subject, evaluator: Evaluator) -> str:
    """Why a node would compute something else; empty if it does not. Notes what the node has to be told of the mask."""
    site = call.site
    widths = [node_shape(site.values[name].node) for name in "qkv"]
    if site.scale is None:
        return "scores are changed by more than a number, a soft cap and a mask behind it"
    if site.scale <= 0:
        return "the scale of the scores is no positive number"
    if site.dropout or site.over != "tokens":
        return "weights are dropped out" if site.dropout else "channels attend to channels"
    if any(isinstance(size, torch.SymInt) for s in widths if s is not None for size in (s[1], s[3])):
        return "heads or channels are free sizes"
    if site.heads % max(site.kv_heads, 1):
        return f"{site.heads} heads do not share {site.kv_heads}"
    if site.sinks:
        return "a further logit takes part in the softmax"
    if reason := lacking_kernel(*(site.values[name].node for name in "qkv")):
        return reason
    reason = _masked(site, subject)
    if not reason:
        return ""
    if site.mask.kind == "bidirectional" and subject.target == "ort" and not site.mask.bias:
        call.padding = padding_input(site, evaluator)
    if call.padding is None:
        call.mask = _tensor_mask(site)
    if call.padding is None and call.mask is None:
        call.bias = constant_bias(site, evaluator)
    return "" if any(given is not None for given in (call.padding, call.mask, call.bias)) else reason


def _masked(site: Attention, subject: Subject) -> str:
    """Why a node has to be told more than whether the mask is causal; empty if that says all."""
    mask, lengths = site.mask, [site.values[name].node.meta["val"].shape[2] for name in "qk"]
    if mask.kind == "unknown" or mask.asserted:
        return mask.reason or "nothing is proved of the mask"
    if mask.padding or mask.bias or mask.kind == "packed":
        return f"the mask says more than a node without a mask does: {mask}"
    if mask.reason == AT_EXAMPLE_ONLY and not all(isinstance(size, int) for size in lengths):
        return "the mask is proved at the length of the example alone"
    if mask.kind != "bidirectional" and not same(*lengths):
        return "there are more keys than queries"
    if mask.kind == "sliding_window" and not is_grouped(subject, site):
        return "Attention of the standard has no sliding window"
    return ""


def _tensor_mask(site: Attention) -> fx.Node | None:
    """The mask of a fused operator, where ONNX Runtime has it right as a tensor: True where a query sees a key."""
    given = site.core.args[3] if site.spelling == "sdpa" and not site.core.args[5] else None
    held = fake(given) if isinstance(given, fx.Node) else None
    if held is None or held.dtype != torch.bool or held.dim() != 4 or not isinstance(given, fx.Node):
        return None
    return given


__all__ = ["AttentionNode"]
