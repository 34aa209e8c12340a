"""Labels: over which positions every axis of every data node runs in a step. Here a mixing of positions is found out.

A forward sweep. Data starts at the tokens with NOW; a mark turns its axis into ALL or a window; every operator has a
rule that says how axes go through it. Operators that would combine values along NOW are refused: they see less in a
step than in the full sequence. Position and live operands get the rows that they are cut to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from gatecc.decoder import slots as marks
from gatecc.decoder.axes import ALL, NOW, Lengths, Span, Spans
from gatecc.decoder.kinds import Kinds
from gatecc.decoder.refuse import refusal
from gatecc.decoder.slots import Slot
from gatecc.ir.match.axes import axis_map
from gatecc.ir.match.product import product
from gatecc.ir.ops import CASTS, DROPOUTS, RESHAPES, SAME_SHAPE, SHAPE_ONLY, SOFTMAXES, TRANSPOSES, opname
from gatecc.ir.sizes import node_shape, same

_CUT = ("position", "live")
_POINTWISE = (
    CASTS
    | DROPOUTS
    | SAME_SHAPE
    | frozenset(
        "masked_fill where type_as copy fill zero floor_divide true_divide divide subtract multiply negative absolute rsub "
        "__and__ __or__ __xor__ isclose isnan isfinite isinf greater less not_equal hardswish log_sigmoid bucketize ldexp "
        "special_expit complex polar real imag conj resolve_conj".split()
    )
)
_REDUCTIONS = (
    frozenset(
        "sum mean amax amin max min prod any all var std var_mean std_mean norm linalg_vector_norm logsumexp argmax argmin "
        "median count_nonzero topk sort argsort kthvalue cumsum cumprod logcumsumexp cummax cummin log_softmax glu".split()
    )
    | SOFTMAXES
)
_DISPATCH = frozenset(
    "index index_select gather scatter scatter_add scatter_reduce index_add index_put index_copy one_hot bincount histc "
    "_grouped_mm grouped_mm_fallback masked_select masked_scatter nonzero".split()
)
_NORMS = frozenset("layer_norm rms_norm native_layer_norm _fused_rms_norm".split())
_CHANNELWISE = frozenset("batch_norm _native_batch_norm_legit_no_training".split())
_CONVS = frozenset("conv1d conv2d convolution".split())
_CREATE = frozenset("zeros ones full empty arange scalar_tensor".split()) | SHAPE_ONLY
_SPLITS = frozenset("split split_with_sizes chunk unbind tensor_split".split())
_SAME_PLACE = frozenset("pad constant_pad_nd repeat repeat_interleave tile roll flip narrow".split())

Rule = Callable[["Labels", fx.Node], Any]


class Labels:
    """``of[node]``: the spans of a data node's axes (a list of them for a node with several outputs).

    ``cuts[node][operand]``: the spans that a position or live operand of a data node is read at.
    """

    def __init__(self, kinds: Kinds, slots: Sequence[Slot], nodes: Iterable[fx.Node]) -> None:
        self.kinds, self.slots, self.lengths = kinds, slots, kinds.lengths
        self.of: dict[fx.Node, Any] = {}
        self.cuts: dict[fx.Node, dict[fx.Node, Spans]] = {}
        for node in nodes:
            if self.kind(node) != "data" or opname(node).startswith("_assert"):
                continue
            self.of[node] = self._label(node)
            for spans in self._outputs(node):
                if sum(span is NOW or span == NOW for span in spans) > 1:
                    raise refusal(node, "it compares positions with positions, and is no attention that is known")

    def kind(self, node: fx.Node) -> str:
        """The kind of a node; marks are data."""
        return "data" if node.target in marks.MARKS else self.kinds.of.get(node, "position")

    def _outputs(self, node: fx.Node) -> list[Spans]:
        found = self.of[node]
        return found if isinstance(found, list) else [found]

    def _label(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.spread(node, NOW)
        if node.target in marks.MARKS:
            return self._mark(node)
        rule = self._rule(node)
        if rule is None:
            return self._unknown(node)
        return rule(self, node)

    def _rule(self, node: fx.Node) -> Rule | None:
        name = opname(node)
        if name in _RULES and not (name in ("max", "min") and _has_argument(node, "other")):
            return _RULES[name]
        pointwise = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
        return _pointwise if pointwise or name in ("max", "min") else None

    def _unknown(self, node: fx.Node) -> Any:
        if any(span is not None for source in self.data(node) for out in self._outputs(source) for span in out):
            raise refusal(node, "it may mix positions, and has no step rule")
        return self.spread(node, None)

    def _mark(self, node: fx.Node) -> Any:
        if node.target is marks.recalled:
            return self.spread(node, None)
        source, slot = node.args[0], self.slots[int(str(node.args[1]))]
        assert isinstance(source, fx.Node)
        if self.kind(source) != "data":
            raise refusal(source, "keys or values that do not depend on the tokens")
        if node.target is marks.kept:
            return tuple(slot.span if i == slot.axis else span for i, span in enumerate(self.of[source]))
        return self.of[source]

    # --- helpers of the rules ---

    def data(self, node: fx.Node) -> list[fx.Node]:
        """The data operands."""
        return [n for n in node.all_input_nodes if n in self.of]

    def spread(self, node: fx.Node, span: Span | None) -> Any:
        """Every axis of the output that depends on the length gets ``span``."""
        held = node.meta.get("val")
        if isinstance(held, list | tuple):
            return [self._of_shape(x.shape, span) if isinstance(x, torch.Tensor) else () for x in held]
        return self._of_shape(held.shape, span) if isinstance(held, torch.Tensor) else ()

    def _of_shape(self, shape: Sequence[Any], span: Span | None) -> Spans:
        return tuple(span if self.lengths.has(size) else None for size in shape)

    def only(self, node: fx.Node) -> Span | None:
        """The one span of all data operands. Raises DecoderError if there are several."""
        found = {s for source in self.data(node) for out in self._outputs(source) for s in out if s is not None}
        if len(found) > 1:
            raise refusal(node, f"the positions of its operands differ ({', '.join(sorted(map(str, found)))})")
        return found.pop() if found else None

    def one(self, node: fx.Node) -> Any:
        """Labels of a node all of whose operands run over the same positions."""
        for source in node.all_input_nodes:
            self._cut_alike(node, source)
        return self.spread(node, self.only(node) or NOW)

    def _cut_alike(self, node: fx.Node, source: fx.Node) -> None:
        if self.kind(source) in _CUT and self.lengths.axes(source):
            span = self.only(node) or NOW
            self.cut(node, source, self.spread(source, span))

    def cut(self, node: fx.Node, source: fx.Node, spans: Spans) -> None:
        """Note the rows at which a position operand is read."""
        before = self.cuts.setdefault(node, {}).setdefault(source, spans)
        if before != spans:
            raise refusal(node, f"it reads {source.name} at different positions")

    def along(self, node: fx.Node, source: fx.Node, out: Sequence[Span | None]) -> Spans:
        """The spans of an operand that is broadcast against ``out``."""
        shape = node_shape(source) or ()
        shift = len(out) - len(shape)
        return tuple(out[i + shift] if self.lengths.has(size) else None for i, size in enumerate(shape))

    def forbid(self, node: fx.Node, source: fx.Node, axis: int, flat: bool = False) -> None:
        """Refuse to combine values along NOW. With ``flat``, tokens that lie in a row may be sorted and counted."""
        spans = self.of.get(source)
        if not isinstance(spans, tuple) or spans[axis] != NOW:
            return
        if flat and not self.lengths.pure((node_shape(source) or ())[axis]):
            return
        raise refusal(node, "it mixes positions, and has no step rule")


def _has_argument(node: fx.Node, name: str) -> bool:
    return isinstance(node.target, OpOverload) and any(a.name == name for a in node.target._schema.arguments)


def named(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an operator by the name in its schema."""
    assert isinstance(node.target, OpOverload)
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, argument.default_value)
    return default


# --- rules --------------------------------------------------------------------------------------------------------


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
        if labels.kind(source) in _CUT and labels.lengths.axes(source):
            labels.cut(node, source, labels.along(node, source, out))
    return tuple(out)


def _moved(labels: Labels, node: fx.Node) -> Spans:
    """Views that keep whole axes: each output axis runs along one of the input's."""
    source = node.all_input_nodes[0]
    if labels.kind(source) in _CUT:
        return labels.one(node)
    spans = labels.of[source]
    if isinstance(spans, list):
        return _piece(labels, node)
    ways = axis_map(node, source)
    kinds = {span for span in spans if span is not None}
    out: list[Span | None] = []
    for i, size in enumerate(node_shape(node) or ()):
        if not labels.lengths.has(size):
            out.append(None)
            continue
        at = ways[i] if ways is not None else None
        span = spans[at] if at is not None else None
        if span is None and len(kinds) > 1:
            raise refusal(node, "it joins the axes of queries and keys")
        out.append(span or (next(iter(kinds)) if kinds else NOW))
    return tuple(out)


def _piece(labels: Labels, node: fx.Node) -> Spans:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return labels.of[source][int(str(node.args[1]))]


def _reshape(labels: Labels, node: fx.Node) -> Spans:
    source = node.all_input_nodes[0]
    if labels.kind(source) == "data":
        _check_features(labels, node, source)
    return _moved(labels, node)


def _check_features(labels: Labels, node: fx.Node, source: fx.Node) -> None:
    """Positions that a reshape puts into one axis with features (patches of tokens, say) would be cut apart by a step."""
    before, after = node_shape(source) or (), node_shape(node) or ()
    pure = [i for i, size in enumerate(before) if labels.lengths.pure(size)]
    flat = [i for i, size in enumerate(after) if labels.lengths.has(size) and not labels.lengths.pure(size)]
    if len(pure) == 1 and len(flat) == 1 and labels.of[source][pure[0]] == NOW and flat[0] == len(after) - 1:
        if pure[0] != len(before) - 1 and len(after) > 1:
            raise refusal(node, "it joins positions and features in one axis")


def _expand(labels: Labels, node: fx.Node) -> Spans:
    source = node.all_input_nodes[0]
    if labels.kind(source) in _CUT:
        return labels.one(node)
    spans = labels.of[source]
    shape = node_shape(node) or ()
    out: list[Span | None] = [None] * (len(shape) - len(spans)) + list(spans)
    return tuple(span or NOW if labels.lengths.has(size) else None for span, size in zip(out, shape, strict=True))


def _slice(labels: Labels, node: fx.Node) -> Spans:
    source = node.all_input_nodes[0]
    if labels.kind(source) in _CUT:
        return labels.one(node)
    axis = int(named(node, "dim", 0)) % len(node_shape(source) or ())
    if not same((node_shape(source) or ())[axis], (node_shape(node) or ())[axis]):
        labels.forbid(node, source, axis)
    return labels.of[source]


def _select(labels: Labels, node: fx.Node) -> Spans:
    source = node.all_input_nodes[0]
    if labels.kind(source) in _CUT:
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
    if labels.kind(source) in _CUT:
        raise refusal(node, "it has no step rule for an operand that does not depend on the tokens")
    before, after = node_shape(source) or (), node_shape(node) or ()
    shift = len(after) - len(before)
    if opname(node) in ("roll", "flip"):
        for dim in named(node, "dims", ()) or range(len(before)):
            labels.forbid(node, source, int(dim) % len(before))
    for i, size in enumerate(before):
        if not same(size, after[i + shift]):
            labels.forbid(node, source, i)
    return (None,) * shift + labels.of[source]


def _reduction(labels: Labels, node: fx.Node) -> Any:
    """Operators along some axes: none of these may run over NOW."""
    source = node.all_input_nodes[0]
    shape = node_shape(source) or ()
    if labels.kind(source) != "data":
        return labels.one(node)
    dims = named(node, "dim", named(node, "dims"))
    dims = list(range(len(shape))) if dims is None or dims == [] else dims if isinstance(dims, list | tuple) else [dims]
    axes = {int(d) % len(shape) for d in dims} if shape else set()
    has_rule = any(user.target is marks.carried for user in node.users)
    for axis in axes if not has_rule else ():
        labels.forbid(node, source, axis, flat=opname(node) in ("sort", "argsort"))
    spans = labels.of[source]

    def of(x: Any) -> Spans:
        if not isinstance(x, torch.Tensor):
            return ()
        whole = len(x.shape) == len(shape)
        out = tuple(s for i, s in enumerate(spans) if whole or i not in axes)
        return tuple(s if labels.lengths.has(size) else None for s, size in zip(out, x.shape, strict=True))

    held = node.meta["val"]
    return [of(x) for x in held] if isinstance(held, list | tuple) else of(held)


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
    if labels.kind(indices) != "data":
        raise refusal(node, "a table that depends on the tokens")
    return (*labels.of[indices], None)


def _joined(labels: Labels, node: fx.Node) -> Spans:
    """cat and stack: along the keys (sinks) or features, not along NOW."""
    rank = len(node_shape(node) or ())
    axis = int(named(node, "dim", 0)) % rank
    stacked = opname(node) == "stack"
    out: list[Span | None] = [None] * (rank - stacked)
    for source in labels.data(node):
        if not stacked:
            labels.forbid(node, source, axis)
        out = [span or labels.of[source][i] for i, span in enumerate(out)]
    for source in node.all_input_nodes:
        if labels.kind(source) in _CUT and labels.lengths.axes(source):
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
        if labels.kind(operand) in _CUT and labels.lengths.axes(operand):
            shape = node_shape(operand) or ()
            held = [
                spans.setdefault(a, ALL) if labels.lengths.has(s) else None for a, s in zip(letters, shape, strict=True)
            ]
            labels.cut(node, operand, tuple(held))
    if any(spans.get(letter) == NOW for letter in found.contracted):
        raise refusal(node, "it sums over positions, and has no step rule")
    shape = node_shape(node) or ()
    out = [spans.get(letter) if labels.lengths.has(s) else None for letter, s in zip(found.axes, shape, strict=True)]
    if found.addend is not None and labels.kind(found.addend) in _CUT and labels.lengths.axes(found.addend):
        labels.cut(node, found.addend, labels.along(node, found.addend, out))
    return tuple(out)


def _linear(labels: Labels, node: fx.Node) -> Spans:
    source = named(node, "input")
    if labels.kind(source) != "data" or labels.kind(named(node, "weight")) == "data":
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
        if labels.kind(operand) in _CUT and labels.lengths.axes(operand):
            raise refusal(node, "keys or values that do not depend on the tokens")
    mask = named(node, "attn_mask")
    if isinstance(mask, fx.Node) and labels.kind(mask) in _CUT and labels.lengths.axes(mask):
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


def _recurrence(labels: Labels, node: fx.Node) -> Any:
    """gatecc::linear_attention with its state in a slot: everything else is at the new positions."""
    if not any(n.target is marks.recalled for n in node.all_input_nodes):
        raise refusal(node, "no step rule was found for it")
    return labels.one(node)


def _table() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for names, rule in (
        (_POINTWISE, _pointwise),
        (TRANSPOSES | frozenset(("unsqueeze", "squeeze")), _moved),
        (RESHAPES, _reshape),
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
        "cat": _joined,
        "stack": _joined,
        "linear": _linear,
        **dict.fromkeys("matmul bmm mm baddbmm addmm einsum".split(), _product),
        "scaled_dot_product_attention": _fused,
        "linear_attention": _recurrence,
        **dict.fromkeys("prelu view_as_complex view_as_real".split(), Labels.one),
    }


_RULES = _table()
