"""Transfer: how the axes of a data node go through its operator, one rule for each family of operators.

An operator without a rule is refused as soon as one of its operands runs along the positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from gatecc.decoder.analysis.axes import ALL, NOW, Span, Spans
from gatecc.decoder.analysis.dependence import Dependence
from gatecc.decoder.analysis.labels import CUT, Labels, Rule
from gatecc.decoder.refuse import refusal
from gatecc.decoder.rules import slots as marks
from gatecc.decoder.rules.slots import Slot
from gatecc.ir.match.axes import axis_map
from gatecc.ir.match.product import product
from gatecc.ir.ops import CASTS, DROPOUTS, RESHAPES, SAME_SHAPE, SHAPE_ONLY, SOFTMAXES, TRANSPOSES, named, opname
from gatecc.ir.sizes import node_shape, same
from gatecc.ops import registry
from gatecc.ops.registry import StepRule

_POINTWISE = (
    CASTS
    | DROPOUTS
    | SAME_SHAPE
    | frozenset(
        "masked_fill where type_as copy fill zero floor_divide true_divide divide subtract multiply negative absolute "
        "rsub __and__ __or__ __xor__ isclose isnan isfinite isinf greater less not_equal hardswish log_sigmoid "
        "bucketize ldexp special_expit complex polar real imag conj resolve_conj".split()
    )
)
_REDUCTIONS = (
    frozenset(
        "sum mean amax amin max min prod any all var std var_mean std_mean norm linalg_vector_norm logsumexp argmax "
        "argmin median count_nonzero topk sort argsort kthvalue cumsum cumprod logcumsumexp cummax cummin "
        "log_softmax glu".split()
    )
    | SOFTMAXES
)
_DISPATCH = frozenset(
    "index index_select gather scatter scatter_add scatter_reduce index_add index_put index_copy one_hot bincount "
    "histc _grouped_mm grouped_mm_fallback masked_select masked_scatter nonzero".split()
)
_NORMS = frozenset("layer_norm rms_norm native_layer_norm _fused_rms_norm".split())
_CHANNELWISE = frozenset("batch_norm _native_batch_norm_legit_no_training".split())
_CONVS = frozenset("conv1d conv2d convolution".split())
_CREATE = frozenset("zeros ones full empty arange scalar_tensor".split()) | SHAPE_ONLY
_SPLITS = frozenset("split split_with_sizes chunk unbind tensor_split".split())
_SAME_PLACE = frozenset("pad constant_pad_nd repeat repeat_interleave tile roll flip narrow".split())


def label(dependence: Dependence, slots: Sequence[Slot], nodes: Iterable[fx.Node]) -> Labels:
    """The labels of a graph. Raises DecoderError for a node that mixes positions and has no step rule."""
    return Labels(dependence, slots, nodes, _rule)


def _rule(node: fx.Node) -> Rule | None:
    name, found = opname(node), registry.find(node.target)
    if found is not None and found.step is not None:
        return _registered(found.step)
    if name in _RULES and not (name in ("max", "min") and _has_argument(node, "other")):
        return _RULES[name]
    pointwise = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
    return _pointwise if pointwise or name in ("max", "min") else None


def _has_argument(node: fx.Node, name: str) -> bool:
    return isinstance(node.target, OpOverload) and any(a.name == name for a in node.target._schema.arguments)


def _pointwise(labels: Labels, node: fx.Node) -> Spans:
    """Broadcasting: axes meet from the right."""
    shape = node_shape(node) or ()
    out: list[Span | None] = [None] * len(shape)
    for source in labels.data(node):
        spans = labels.of[source]
        if not isinstance(spans, tuple):
            raise refusal(node, "it reads a list of tensors")
        for i, span in enumerate(spans):
            at = i + len(shape) - len(spans)
            if span is None:
                continue
            if out[at] is not None and out[at] != span:
                raise refusal(node, f"positions {span} meet positions {out[at]}")
            out[at] = span
    for i, size in enumerate(shape):  # axes that a position operand brings in
        if out[i] is None and labels.lengths.has(size):
            out[i] = ALL if NOW in out else NOW
    for source in node.all_input_nodes:
        if labels.depends_on(source) in CUT and labels.lengths.axes(source):
            labels.cut(node, source, labels.along(node, source, out))
    return tuple(out)


def _moved(labels: Labels, node: fx.Node) -> Spans:
    """Views that keep whole axes: each output axis runs along one of the input's."""
    source = node.all_input_nodes[0]
    if labels.depends_on(source) in CUT:
        return labels.one(node)
    spans = labels.of[source]
    if isinstance(spans, list):
        return _piece(labels, node)
    axes = axis_map(node, source)
    known = {span for span in spans if span is not None}
    out: list[Span | None] = []
    for i, size in enumerate(node_shape(node) or ()):
        if not labels.lengths.has(size):
            out.append(None)
            continue
        at = axes[i] if axes is not None else None
        span = spans[at] if at is not None else None
        if span is None and len(known) > 1:
            raise refusal(node, "it joins the axes of queries and keys")
        out.append(span or (next(iter(known)) if known else NOW))
    return tuple(out)


def _piece(labels: Labels, node: fx.Node) -> Spans:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return labels.of[source][int(str(node.args[1]))]


def _expand(labels: Labels, node: fx.Node) -> Spans:
    source = node.all_input_nodes[0]
    if labels.depends_on(source) in CUT:
        return labels.one(node)
    spans = labels.of[source]
    shape = node_shape(node) or ()
    out = (*[None] * (len(shape) - len(spans)), *spans)
    return tuple(span or NOW if labels.lengths.has(size) else None for span, size in zip(out, shape, strict=True))


def _slice(labels: Labels, node: fx.Node) -> Spans:
    source = node.all_input_nodes[0]
    if labels.depends_on(source) in CUT:
        return labels.one(node)
    axis = int(named(node, "dim", 0)) % len(node_shape(source) or ())
    if not same((node_shape(source) or ())[axis], (node_shape(node) or ())[axis]):
        labels.forbid(node, source, axis)
    return labels.of[source]


def _select(labels: Labels, node: fx.Node) -> Spans:
    source = node.all_input_nodes[0]
    if labels.depends_on(source) in CUT:
        return labels.one(node)
    axis = int(named(node, "dim", 0)) % len(node_shape(source) or ())
    labels.forbid(node, source, axis)
    return tuple(span for i, span in enumerate(labels.of[source]) if i != axis)


def _split(labels: Labels, node: fx.Node) -> list[Spans]:
    source = node.all_input_nodes[0]
    rank = len(node_shape(source) or ())
    axis = int(named(node, "dim", 0)) % rank
    labels.forbid(node, source, axis)
    spans = labels.of[source]
    kept = tuple(s for i, s in enumerate(spans) if i != axis) if opname(node) == "unbind" else spans
    return [kept for _ in node.meta["val"]]


def _same_place(labels: Labels, node: fx.Node) -> Spans:
    """Operators that change the size of axes in place: none of them may run over NOW."""
    source = node.all_input_nodes[0]
    if labels.depends_on(source) in CUT:
        raise refusal(node, "it has no step rule for an operand that does not depend on the tokens")
    before, after = node_shape(source) or (), node_shape(node) or ()
    shift = len(after) - len(before)
    if opname(node) in ("roll", "flip"):
        for dim in named(node, "dims", ()) or range(len(before)):
            labels.forbid(node, source, int(dim) % len(before))
    pad = list(named(node, "pad")) if "pad" in opname(node) else []
    for i, size in enumerate(before):
        at = 2 * (len(before) - 1 - i)
        if not same(size, after[i + shift]) or any(pad[at : at + 2]):
            labels.forbid(node, source, i)
    return (None,) * shift + labels.of[source]


def _reduction(labels: Labels, node: fx.Node) -> Any:
    """Reductions, sorts and the like: none of their axes may run over NOW."""
    source = node.all_input_nodes[0]
    shape = node_shape(source) or ()
    if labels.depends_on(source) != "data":
        return labels.one(node)
    dims = named(node, "dim", named(node, "dims"))
    dims = list(range(len(shape))) if dims is None or dims == [] else dims if isinstance(dims, list | tuple) else [dims]
    axes = {int(d) % len(shape) for d in dims} if shape else set()
    has_rule = any(user.target is marks.carried for user in node.users)
    for axis in axes if not has_rule else ():
        labels.forbid(node, source, axis, flat=_counts(node, source))
    spans = labels.of[source]

    def of(x: Any) -> Spans:
        if not isinstance(x, torch.Tensor):
            return ()
        whole = len(x.shape) == len(shape)
        out = tuple(s for i, s in enumerate(spans) if whole or i not in axes)
        return tuple(s if labels.lengths.has(size) else None for s, size in zip(out, x.shape, strict=True))

    held = node.meta["val"]
    return [of(x) for x in held] if isinstance(held, list | tuple) else of(held)


def _counts(node: fx.Node, source: fx.Node) -> bool:
    """Whether a reduction only sorts flattened tokens, or counts them by the expert that they go to."""
    held = source.meta["val"]
    return opname(node) in ("sort", "argsort") or (opname(node) == "sum" and not held.is_floating_point())


def _norm(labels: Labels, node: fx.Node) -> Any:
    source = node.all_input_nodes[0]
    rank = len(node_shape(source) or ())
    for axis in range(rank - len(named(node, "normalized_shape")), rank):
        labels.forbid(node, source, axis)
    return labels.of[source] if isinstance(node.meta["val"], torch.Tensor) else labels.one(node)


def _channelwise(labels: Labels, node: fx.Node) -> Any:
    if named(node, "training", False):
        raise refusal(node, "batch statistics mix positions", do="put the model in eval mode")
    return labels.one(node)


def _embedding(labels: Labels, node: fx.Node) -> Spans:
    indices = named(node, "indices")
    if labels.depends_on(indices) != "data":
        raise refusal(node, "a table that depends on the tokens")
    return (*labels.of[indices], None)


def _joined(labels: Labels, node: fx.Node) -> Spans:
    """cat and stack: allowed along the keys (attention sinks) or features, not along NOW."""
    rank = len(node_shape(node) or ())
    axis = int(named(node, "dim", 0)) % rank
    stacked = opname(node) == "stack"
    out: list[Span | None] = [None] * (rank - stacked)
    for source in labels.data(node):
        if not stacked:
            labels.forbid(node, source, axis)
        out = [span or labels.of[source][i] for i, span in enumerate(out)]
    for source in node.all_input_nodes:
        if labels.depends_on(source) in CUT and labels.lengths.axes(source):
            labels.cut(node, source, labels.along(node, source, out))
    if stacked:
        out.insert(axis, None)
    return tuple(out)


def _product(labels: Labels, node: fx.Node) -> Spans:
    """Contractions: axes are followed by their letters; the positions that are summed over must be complete."""
    found = product(node)
    if found is None:
        if labels.only(node) is None:
            return labels.spread(node, None)
        raise refusal(node, "a product whose axes cannot be named")
    spans: dict[str, Span] = {}
    sides = ((found.left, found.left_axes), (found.right, found.right_axes))
    for operand, letters in sides:
        for letter, span in zip(letters, labels.of.get(operand, ()), strict=False):
            if span is None:
                continue
            if spans.setdefault(letter, span) != span:
                raise refusal(node, f"positions {span} meet positions {spans[letter]}")
    for operand, letters in sides:
        if labels.depends_on(operand) in CUT and labels.lengths.axes(operand):
            shape = node_shape(operand) or ()
            held = [
                spans.setdefault(a, ALL) if labels.lengths.has(s) else None for a, s in zip(letters, shape, strict=True)
            ]
            labels.cut(node, operand, tuple(held))
    if any(spans.get(letter) == NOW for letter in found.contracted):
        raise refusal(node, "it sums over positions, and has no step rule")
    shape = node_shape(node) or ()
    out = [spans.get(letter) if labels.lengths.has(s) else None for letter, s in zip(found.axes, shape, strict=True)]
    if found.addend is not None and labels.depends_on(found.addend) in CUT and labels.lengths.axes(found.addend):
        labels.cut(node, found.addend, labels.along(node, found.addend, out))
    return tuple(out)


def _linear(labels: Labels, node: fx.Node) -> Spans:
    source = named(node, "input")
    if labels.depends_on(source) != "data" or labels.depends_on(named(node, "weight")) == "data":
        return labels.one(node)
    labels.forbid(node, source, -1)
    return (*labels.of[source][:-1], None)


def _fused(labels: Labels, node: fx.Node) -> Spans:
    """scaled_dot_product_attention: keys come from a slot, or do not depend on the length at all."""
    q, k, v = (named(node, name) for name in ("query", "key", "value"))
    spans = labels.of.get(q)
    if not isinstance(spans, tuple):
        raise refusal(node, "queries that do not depend on the tokens")
    for operand in (k, v):
        seen = labels.of.get(operand, ())
        if len(seen) > 1 and seen[-2] == NOW:
            raise refusal(node, "its keys grow with the tokens, and no step rule was found for it")
        if labels.depends_on(operand) in CUT and labels.lengths.axes(operand):
            raise refusal(node, "keys or values that do not depend on the tokens")
    mask = named(node, "attn_mask")
    if isinstance(mask, fx.Node) and labels.depends_on(mask) in CUT and labels.lengths.axes(mask):
        keys = labels.of.get(k, (None, None))[-2]
        labels.cut(node, mask, labels.along(node, mask, (*spans[:-1], keys)))
    return (*spans[:-1], None)


def _conv(labels: Labels, node: fx.Node) -> Spans:
    source = named(node, "input")
    spans = labels.of.get(source)
    if not isinstance(spans, tuple):
        return labels.one(node)
    if source.target is not marks.extended:
        for axis in range(1, len(spans)):
            labels.forbid(node, source, axis)
    return tuple(span if labels.lengths.has(s) else None for span, s in zip(spans, node_shape(node) or (), strict=True))


def _dispatch(labels: Labels, node: fx.Node) -> Any:
    """Gathering and scattering: rows of flattened tokens may be moved, positions of one text may not."""
    source = node.all_input_nodes[0]
    dim = named(node, "dim")
    indices = named(node, "indices")
    axes = [int(dim)] if isinstance(dim, int) else []
    axes += [i for i, x in enumerate(indices) if x is not None] if isinstance(indices, list | tuple) else []
    if opname(node) in ("histc", "bincount", "masked_select", "nonzero"):
        axes = list(range(len(node_shape(source) or ())))
    for axis in axes:
        labels.forbid(node, source, axis, flat=True)
    return labels.one(node)


def _create(labels: Labels, node: fx.Node) -> Any:
    return labels.one(node)


def _registered(step: StepRule) -> Rule:
    """An operator with its state in a slot: everything else is at the new positions, along which it may combine values.

    Without one it may combine them along other axes alone.
    """

    def rule(labels: Labels, node: fx.Node) -> Any:
        axis = step.axis_of(node)
        if axis is not None and not any(n.target in marks.STATES for n in node.all_input_nodes):
            labels.forbid(node, named(node, step.operand), axis)
        return labels.one(node)

    return rule


def _table() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for names, rule in (
        (_POINTWISE, _pointwise),
        (TRANSPOSES | frozenset(("unsqueeze", "squeeze")), _moved),
        (RESHAPES, _moved),
        (_REDUCTIONS, _reduction),
        (_DISPATCH, _dispatch),
        (_NORMS, _norm),
        (_CHANNELWISE, _channelwise),
        (_CONVS, _conv),
        (_CREATE, _create),
        (_SPLITS, _split),
        (_SAME_PLACE, _same_place),
    ):
        rules |= dict.fromkeys(names, rule)
    return rules | {
        "getitem": _moved,
        "expand": _expand,
        "expand_as": _pointwise,
        "broadcast_to": _expand,
        "slice": _slice,
        "select": _select,
        "embedding": _embedding,
        **dict.fromkeys("cat concat concatenate stack".split(), _joined),
        "linear": _linear,
        **dict.fromkeys("matmul bmm mm baddbmm addmm einsum".split(), _product),
        "scaled_dot_product_attention": _fused,
        **dict.fromkeys("prelu view_as_complex view_as_real".split(), Labels.one),
    }


_RULES = _table()
