"""cached-attention: attention of new tokens over kept keys and values is GroupQueryAttention of ONNX Runtime.

The node puts new keys and values behind the old ones, in the same buffer where the runtime hands one over, and takes
the rotary embedding, a sliding window, a soft cap, and one packed product of queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject, lacking_kernel
from gatecc.codegen.onnx.lower.packing import packed
from gatecc.codegen.onnx.lower.rotation import Rotation, rotation, values_before
from gatecc.codegen.onnx.lower.views import Views
from gatecc.codegen.onnx.lower.write import Writer, aten
from gatecc.ir.evaluate import Evaluator, UnprovableError
from gatecc.ir.ops import named, opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.sizes import expression

_STEP = 16  # channels: the node turns a multiple of so many
_TRIES = 6  # values that may be queries or keys before their rotary embedding


class CachedAttention(GraphLowering):
    """gatecc::cached_attention -> GroupQueryAttention."""

    name = "cached-attention"
    targets = ("ort",)

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        flow = subject.flow()
        evaluator, views = Evaluator(flow), Views(flow)
        for node in [n for n in subject.program.calls() if opname(n) == "cached_attention"]:
            reason = _unfit(node)
            if reason:
                yield self.left(node, "attention over kept keys", reason)
                continue
            turned, kept = _unturned(subject, node, evaluator)
            _write(Writer(subject.program, node, self.name), subject, node, turned, views)
            became = "GroupQueryAttention" + " with rotary" * (turned is not None)
            yield self.done(node, "attention over kept keys", became, kept)
        views.settle_all()


Turned = tuple[Rotation, fx.Node, fx.Node]  # and queries and keys before it


def _unfit(node: fx.Node) -> str:
    q, k, v = (n.meta["val"] for n in node.all_input_nodes[:3])
    if not isinstance(named(node, "mask"), fx.Node):
        return "nothing counts the tokens of each row"
    if q.shape[3] % 8 or k.shape[3] != v.shape[3]:
        return "heads of queries and values are of other widths than the node has"
    return lacking_kernel(*node.all_input_nodes[:3])


def _unturned(subject: Subject, node: fx.Node, evaluator: Evaluator) -> tuple[Turned | None, str]:
    """The rotary embedding of queries and keys, where it is proved to be one; why it stays outside."""
    try:
        (one, q), (other, k) = (_before(subject, x, node, evaluator) for x in node.all_input_nodes[:2])
    except UnprovableError as e:
        return None, f"a rotary embedding, if there is one, stays outside: {e}"
    if not one.equals(other) or one.width % _STEP:
        return None, "the rotary embedding stays outside: it is not one that the node does"
    return (one, q, k), "the rotary embedding was evaluated at all positions"


def _before(subject: Subject, turned: fx.Node, node: fx.Node, evaluator: Evaluator) -> tuple[Rotation, fx.Node]:
    past = expression(node.all_input_nodes[3].meta["val"].shape[2])
    assert isinstance(past, sympy.Symbol)
    reason = "nothing turns them"
    for candidate in values_before(turned, evaluator.flow)[:_TRIES]:
        part = evaluator.slice(turned, given=frozenset({candidate}))
        key = ("cached rotation", evaluator.signature(part), str(candidate.meta["val"].shape))
        try:
            if key not in subject.shared:
                subject.shared[key] = rotation(candidate, turned, evaluator, subject.context, past)
        except UnprovableError as e:
            reason = str(e)
            continue
        return subject.shared[key], candidate
    raise UnprovableError(reason)


def _write(writer: Writer, subject: Subject, node: fx.Node, turned: Turned | None, views: Views) -> None:
    q, k, v, past_k, past_v = node.all_input_nodes[:5]
    (B, H, T, D), K = q.meta["val"].shape, k.meta["val"].shape[1]
    if turned is not None:
        _, q, k = turned
    parts, factor = packed(writer, views, q, k, v)
    counts = _counts(writer, subject, named(node, "mask"))
    present = tuple(node.meta["val"][1].shape)
    attributes: dict[str, Any] = {
        "num_heads": H,
        "kv_num_heads": K,
        "scale": named(node, "scale") * factor,
        "do_rotary": int(turned is not None),
        "rotary_interleaved": int(turned is not None and turned[0].interleaved),
        "local_window_size": named(node, "window") or -1,
    }
    if named(node, "softcap"):
        attributes["softcap"] = named(node, "softcap")
    y, *kept = writer.several(
        "com.microsoft::GroupQueryAttention",
        [*parts, past_k, past_v, *counts, *_caches(writer, turned, q)],
        attributes,
        [(B, T, H * D), present, present],
        q.meta["val"].dtype,
    )
    apart = writer.call(aten.reshape.default, y, [B, T, H, D])
    results = [writer.call(aten.transpose.int, apart, 1, 2), *kept]
    for user in list(node.users):
        user.replace_all_uses_with(results[int(str(user.args[1]))])


def _counts(writer: Writer, subject: Subject, mask: Any) -> tuple[fx.Node, fx.Node]:
    """The place of each row's last token (B,), and the number of all places (), both as the node wants them."""
    key = ("counts", mask)
    if key not in subject.shared:
        one, int32 = torch.ones((), dtype=torch.int64), torch.int32
        B = mask.meta["val"].shape[0]
        if mask.meta["val"].dtype != torch.int64:
            mask = writer.shaped("Cast", [mask], {"to": 7}, tuple(mask.meta["val"].shape), torch.int64)
        count = writer.shaped("ReduceSum", [mask, writer.constant("axis", one.reshape(1))], {"keepdims": 0}, (B,),
                              torch.int64)  # fmt: skip
        last = writer.shaped("Sub", [count, writer.constant("one", one)], {}, (B,), torch.int64)
        shape = writer.shaped("Shape", [mask], {}, (2,), torch.int64)
        places = writer.shaped("Gather", [shape, writer.constant("one", one)], {"axis": 0}, (), torch.int64)
        casts = (((last, (B,))), (places, ()))
        subject.shared[key] = tuple(writer.shaped("Cast", [x], {"to": 6}, size, int32) for x, size in casts)
    return subject.shared[key]


def _caches(writer: Writer, turned: Turned | None, like: fx.Node) -> list[fx.Node]:
    if turned is None:
        return []
    tables = (("cos_cache", turned[0].cos), ("sin_cache", turned[0].sin))
    return [writer.constant(name, table.to(like.meta["val"].dtype)) for name, table in tables]


__all__ = ["CachedAttention"]
