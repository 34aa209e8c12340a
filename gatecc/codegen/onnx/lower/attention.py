"""attention: softmax attention, fused or spelled out, is one node with tokens before heads.

``GroupQueryAttention`` of ONNX Runtime where no query sees a later key, as is proved of the mask: it takes the rotary
embedding, a sliding window, a soft cap, sinks, shared heads and one packed product of queries, keys and values.
``Attention`` of the standard (opset 24) where nothing is masked, and where contrib operators are not wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject, lacking_kernel
from gatecc.codegen.onnx.lower.packing import packed, tokens_first
from gatecc.codegen.onnx.lower.rotation import Rotation, rotation
from gatecc.codegen.onnx.lower.sizes import key_counts, positions
from gatecc.codegen.onnx.lower.views import Views, equal_shapes
from gatecc.codegen.onnx.lower.write import UnwritableError, Writer, aten
from gatecc.ir.dataflow import Flow
from gatecc.ir.evaluate import Evaluator, UnprovableError
from gatecc.ir.match.mask.evaluate import AT_EXAMPLE_ONLY
from gatecc.ir.ops import CONTRACTIONS, opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.program import fake
from gatecc.ir.site import Attention
from gatecc.ir.sizes import node_shape, same

_TRIES = 6  # values that may be the queries before their rotary embedding
_STEP = 16  # channels: the rotary embedding of GroupQueryAttention turns a multiple of so many


@dataclass(eq=False)
class Call:
    """One attention as the nodes take it: q, k, v are (B, heads, N, D) before any rotary embedding that they do."""

    site: Attention
    q: fx.Node
    k: fx.Node
    v: fx.Node
    rotation: Rotation | None = None
    kept_rotary: str = ""  # why the rotary embedding stays outside

    @property
    def out(self) -> fx.Node:
        return self.site.core

    @property
    def widths(self) -> tuple[int, int]:
        """Of keys and values."""
        return int(node_shape(self.k)[-1]), int(node_shape(self.v)[-1])  # pyright: ignore[reportOptionalSubscript]


class AttentionNode(GraphLowering):
    """softmax(q k^T) v -> GroupQueryAttention or Attention."""

    name = "attention"
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
            reason = _unfit(site, subject, flow) if call is not None else "queries, keys or values have other axes"
            if call is None or reason:
                yield self.left(site.core, _found(site), reason)
                continue
            self._turn(call, subject, evaluator)
            plans.append((call, _found(site)))
        for call, found in plans:
            try:
                became = _written(Writer(subject.program, call.out, self.name), subject, call, views)
            except UnwritableError as e:
                yield self.left(call.out, found, str(e))
                continue
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
    for candidate in [*known, *_before(turned, evaluator.flow)][:_TRIES]:
        try:
            return _tables(subject, candidate, turned, evaluator), candidate
        except UnprovableError as e:
            reason = str(e)
    raise UnprovableError(reason)


def _before(turned: fx.Node, flow: Flow) -> list[fx.Node]:
    """The values of the same shape that a value is made of, the latest first, up to the product that made them."""
    found: list[fx.Node] = []
    seen, stack = set[fx.Node](), [turned]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in seen or node not in flow.data or opname(node) in CONTRACTIONS:
                continue
            seen.add(node)
            stack.append(node)
            found += [node] if equal_shapes(node, turned) else []
    return sorted(found, key=flow.order.__getitem__, reverse=True)


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


def _unfit(site: Attention, subject: Subject, flow: Flow) -> str:
    """Why a node would compute something else; empty if it does not."""
    mask, widths = site.mask, [node_shape(site.values[name].node) for name in "qkv"]
    lengths = [s[2] for s in widths if s is not None][:2]
    if site.scale is None or site.scale <= 0:
        return "the scale of the scores is no positive number"
    if site.dropout or site.over != "tokens":
        return "weights are dropped out" if site.dropout else "channels attend to channels"
    if mask.kind == "unknown" or mask.asserted:
        return mask.reason or "nothing is proved of the mask"
    if mask.padding or mask.bias or mask.kind == "packed":
        return f"the mask says more than a node without a mask does: {mask}"
    if mask.reason == AT_EXAMPLE_ONLY and not all(isinstance(size, int) for size in lengths):
        return "the mask is proved at the length of the example alone"
    if mask.kind != "bidirectional" and not same(*lengths):
        return "there are more keys than queries"
    if any(isinstance(size, torch.SymInt) for s in widths if s is not None for size in (s[1], s[3])):
        return "heads or channels are free sizes"
    if site.heads % max(site.kv_heads, 1):
        return f"{site.heads} heads do not share {site.kv_heads}"
    if mask.kind == "sliding_window" and not _is_grouped(subject, site):
        return "Attention of the standard has no sliding window"
    if site.sinks:
        return "a further logit takes part in the softmax"
    return lacking_kernel(*(site.values[name].node for name in "qkv"))


# --- the nodes --------------------------------------------------------------------------------------------------------


def _is_grouped(subject: Subject, site: Attention) -> bool:
    """Whether GroupQueryAttention takes it, if any node does."""
    k_width, v_width = (int((node_shape(site.values[name].node) or (0,))[-1]) for name in "kv")
    causal = site.mask.kind != "bidirectional"
    return subject.target == "ort" and causal and k_width == v_width and k_width % 8 == 0


def _written(writer: Writer, subject: Subject, call: Call, views: Views) -> str:
    """Put the node in the place of the core; its name."""
    op, y = (_grouped if _is_grouped(subject, call.site) else _standard)(writer, subject, call, views)
    shape = call.out.meta["val"].shape
    apart = writer.call(aten.reshape.default, y, [shape[0], shape[2], shape[1], shape[3]])
    call.out.replace_all_uses_with(writer.call(aten.transpose.int, apart, 1, 2))
    return op


def _grouped(writer: Writer, subject: Subject, call: Call, views: Views) -> tuple[str, fx.Node]:
    site, width = call.site, call.widths[0]
    inside = call.rotation is not None and call.rotation.width % _STEP == 0
    if call.rotation is None or inside:
        q, k, v = packed(writer, views, call.q, call.k, call.v)
    else:
        q, k, v = _turned(writer, subject, call, views)
    counts = key_counts(writer, subject, call.out, call.q)
    cos, sin = _caches(writer, call) if inside else (None, None)
    window = site.mask.window if site.mask.kind == "sliding_window" else None
    attributes: dict[str, Any] = {
        "num_heads": site.heads,
        "kv_num_heads": site.kv_heads,
        "scale": float(site.scale or 0.0),
        "do_rotary": int(inside),
        "rotary_interleaved": int(call.rotation is not None and call.rotation.interleaved),
        "local_window_size": window or -1,
    }
    if site.soft_cap:
        attributes["softcap"] = float(site.soft_cap)
    B, _, N, _ = call.out.meta["val"].shape
    cache = (B, site.kv_heads, N, width)
    y, *_ = writer.several(
        "com.microsoft::GroupQueryAttention",
        [q, k, v, None, None, *counts, cos, sin],
        attributes,
        [(B, N, site.heads * width), cache, cache],
        call.out.meta["val"].dtype,
    )
    return "GroupQueryAttention" + _told(call), y


def _told(call: Call) -> str:
    inside = ["rotary"] * (call.rotation is not None) + [f"window {call.site.mask.window}"] * bool(
        call.site.mask.window
    )
    return f" with {', '.join(inside)}" if inside else ""


def _caches(writer: Writer, call: Call) -> tuple[fx.Node | None, fx.Node | None]:
    if call.rotation is None:
        return None, None
    dtype = call.out.meta["val"].dtype
    tables = zip(("cos", "sin"), (call.rotation.cos, call.rotation.sin), strict=True)
    cos, sin = (writer.constant(f"{name}_cache", table.to(dtype)) for name, table in tables)
    return cos, sin


def _standard(writer: Writer, subject: Subject, call: Call, views: Views) -> tuple[str, fx.Node]:
    site = call.site
    q, k, v = _turned(writer, subject, call, views)
    attributes = {
        "is_causal": int(site.mask.kind != "bidirectional"),
        "q_num_heads": site.heads,
        "kv_num_heads": site.kv_heads,
        "scale": float(site.scale or 0.0),
    }
    if site.soft_cap:
        attributes["softcap"] = float(site.soft_cap)
    B, _, N, _ = call.out.meta["val"].shape
    y = writer.shaped("Attention", [q, k, v], attributes, (B, N, site.heads * call.widths[1]), fake_dtype(call.out))
    return "Attention" + _told(call), y


def _turned(writer: Writer, subject: Subject, call: Call, views: Views) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Queries, keys and values with tokens first, turned by nodes of their own."""
    q, k, v = (tokens_first(writer, views, node) for node in (call.q, call.k, call.v))
    if call.rotation is None:
        return q, k, v
    cos, sin = _caches(writer, call)
    at = positions(writer, subject, call.out)
    width = 0 if call.rotation.width == call.widths[0] else call.rotation.width
    attributes = {"interleaved": int(call.rotation.interleaved), "rotary_embedding_dim": width}
    q, k = (
        writer.onnx("RotaryEmbedding", [x, cos, sin, at], {**attributes, "num_heads": heads}, x)
        for x, heads in ((q, call.site.heads), (k, call.site.kv_heads))
    )
    return q, k, v


def fake_dtype(node: fx.Node) -> torch.dtype:
    """The dtype of a value."""
    held = fake(node)
    assert held is not None
    return held.dtype


__all__ = ["AttentionNode"]
