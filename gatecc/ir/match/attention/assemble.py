"""Assembling an Attention site: the values with their axes, the weights around them, heads, scale and mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from gatecc.ir.axes import Axes
from gatecc.ir.dataflow import Flow
from gatecc.ir.match.attention.expand import is_identity, unexpanded
from gatecc.ir.match.attention.heads import batch_letters, feature_axes, heads_by_size
from gatecc.ir.match.attention.latent import from_one_stream
from gatecc.ir.match.attention.masking import MaskNames, Met, met
from gatecc.ir.match.attention.normalisation import Normalisation
from gatecc.ir.match.attention.origins import Tracer
from gatecc.ir.match.attention.output import find_output
from gatecc.ir.match.attention.rows import row_numbers, rows_of, weight_of
from gatecc.ir.match.attention.scores import Scores, scalar_factor, scale_of, soft_cap, unshifted
from gatecc.ir.match.attention.stream import same_stream
from gatecc.ir.match.attention.streams import Operand, before_rotary, made_alone, streams
from gatecc.ir.match.attention.values import WeightedSum, dropout_of
from gatecc.ir.match.axes import permutation
from gatecc.ir.match.maps import LinearMaps
from gatecc.ir.match.mask.evaluate import MaskClassifier, MaskGraph
from gatecc.ir.match.product import Product
from gatecc.ir.match.projection import Projection
from gatecc.ir.ops import CASTS, RESHAPES, TRANSPOSES, argument, opname
from gatecc.ir.program import origin
from gatecc.ir.scalars import scalar
from gatecc.ir.site import Attention, Value, Weight
from gatecc.ir.sizes import example_sizes, node_shape, numel, same

Roles = dict[str, str]  # from the letter of an axis in a product to its letter in a site
Over = Literal["tokens", "channels"]
_BETWEEN_CHANNELS = str.maketrans("nmd", "dcn")  # queries and keys are channels, and what is contracted are tokens


@dataclass(frozen=True, eq=False)
class Parts:
    """What a matcher found: ``product`` is queries times keys (for a fused node only its operands and axes count)."""

    spelling: Literal["sdpa", "softmax", "manual"]
    owner: str
    core: fx.Node
    product: Product
    keys: str  # the letter of the key axis in product.axes
    softmax: Normalisation | None = None
    scores: Scores | None = None
    weighted_sum: WeightedSum | None = None


class Assembler:
    """Makes the sites of one program; what several sites share is computed once."""

    def __init__(self, flow: Flow, maps: LinearMaps) -> None:
        self.flow = flow
        self.maps = maps
        self.trace = Tracer(flow, maps)
        self.masks = MaskClassifier(flow)
        self.names = MaskNames(self.masks.evaluator)
        self.sizes = example_sizes(flow.program)

    def site(self, parts: Parts, ordinal: int) -> Attention:
        """The site of one attention."""
        product, flow = parts.product, self.flow
        is_left = parts.keys in product.right_axes
        q_node, q_axes = (product.left, product.left_axes) if is_left else (product.right, product.right_axes)
        k_node, k_axes = (product.right, product.right_axes) if is_left else (product.left, product.left_axes)
        v_node, v_letters = self._values(parts)
        roles, over = self._roles(parts, (q_node, q_axes), (k_node, k_axes))
        q = self._operand(q_node, _named(q_axes, roles, over), parts.owner, expand=False)
        k = self._operand(k_node, _named(k_axes, roles, over), parts.owner, expand=True)
        v_roles = self._value_roles(parts, roles)
        v = self._operand(v_node, _named(v_letters, v_roles, over), parts.owner, expand=True, scale=False)
        q, k, v = from_one_stream((q, k, v), self.trace, parts.owner)
        heads = self._heads(parts, _named(self._core_letters(parts), v_roles, over))
        count, kv_count = self._count(q), self._count(k)
        output = find_output(parts.core, _width(heads, count), flow, self.maps, parts.owner)
        values = {"q": Value(q.node, q.axes), "k": Value(k.node, k.axes), "v": Value(v.node, v.axes), "heads": heads}
        found, whole = _met(parts, flow)
        values |= self.names.values(found, Axes(_named(product.axes, roles, over)))
        values |= self._raw(q, k) | self._linear(q, k, count, kv_count) | self._inner(parts, roles, over)
        values |= streams((q, k, v), output, heads, (count, kv_count), parts.core, flow)
        return Attention(
            owner=parts.owner,
            ordinal=ordinal,
            call=origin(parts.core).call,
            line=origin(parts.softmax.output if parts.softmax else parts.core).line,
            values=dict(sorted(values.items(), key=_stage)),
            weights=self._weights(q, k, v, output, count, kv_count),
            spelling=parts.spelling,
            core=parts.core,
            heads=count,
            kv_heads=kv_count,
            scale=self._scale(parts, q, k),
            soft_cap=soft_cap(parts.scores, flow) if parts.scores else None,
            sinks=bool(parts.scores and parts.scores.sinks),
            mask=self.masks.classify(self._mask_graph(parts, roles)),
            mask_whole=whole,
            dropout=self._dropout(parts),
            rotary=bool(q.origins and q.origins.rotary),
            cross=self._cross(q, k, v),
            over=over,
        )

    # --- axes ---

    def _roles(self, parts: Parts, queries: tuple[fx.Node, str], keys: tuple[fx.Node, str]) -> tuple[Roles, Over]:
        """The letters of queries and keys; batch axes are named by their sizes. And what the queries are."""
        product, (q_node, q_axes), (k_node, k_axes) = parts.product, queries, keys
        contracted = "d" if parts.spelling == "sdpa" else product.contracted
        own = [
            a
            for a in q_axes
            if a in product.axes and a not in (product.right_axes if q_node is product.left else product.left_axes)
        ]
        query = "n" if parts.spelling == "sdpa" else own[-1]
        roles = {parts.keys: "m", query: "n"} | dict.fromkeys(contracted, "d")
        batch = [a for a in product.axes if a not in roles]
        # queries and keys share these axes; queries may be pooled, so that no projection yields them
        origins, node, axes = self.trace.find(q_node, parts.owner, q_axes.index(query)), q_node, q_axes
        by_key = self.trace.find(k_node, parts.owner, k_axes.index(parts.keys)) if origins is None else None
        if len(batch) > 1 and (other := by_key) is not None:
            origins, node, axes = other, k_node, k_axes
        numbers = row_numbers(origins, self.masks.evaluator, self.sizes) if origins is not None else None
        places = [axes.index(a) if a in axes else len(axes) for a in batch]
        features = feature_axes(node, origins, numbers) if origins is not None and numbers is not None else set[int]()
        at = axes.index(query if axes is q_axes else parts.keys)
        over: Over = "channels" if at in features and features.isdisjoint(map(axes.index, contracted)) else "tokens"
        letters = batch_letters(places, node, origins, numbers, at if over == "channels" else -1)
        return roles | dict(zip(batch, letters, strict=True)), over

    def _value_roles(self, parts: Parts, roles: Roles) -> Roles:
        """The letters of weights times values: those of the scores, found again by position."""
        if parts.weighted_sum is None:
            return roles
        source, weights = parts.weighted_sum.source, parts.weighted_sum.weights_axes
        feature = [a for a in parts.weighted_sum.values_axes if a not in weights]
        own = [a for a in weights if a not in parts.weighted_sum.values_axes]
        query = own[-1] if own else next(a for a in reversed(weights) if a != parts.weighted_sum.keys)
        result = {parts.weighted_sum.keys: "m", query: "n"} | dict.fromkeys(feature, "d")
        batch = [a for a in source.axes if a not in result]
        inherited = [roles[a] for a in parts.product.axes if roles[a] not in "nm"]
        if len(inherited) != len(batch):
            inherited = list({1: "g", 2: "bh"}.get(len(batch), "bwhr"[: len(batch)]))
        return result | dict(zip(batch, inherited, strict=True))

    def _values(self, parts: Parts) -> tuple[fx.Node, str]:
        if parts.weighted_sum is not None:
            return parts.weighted_sum.values, parts.weighted_sum.values_axes
        node = parts.core.args[2]
        assert isinstance(node, fx.Node)
        return node, parts.product.right_axes

    def _core_letters(self, parts: Parts) -> str:
        return parts.weighted_sum.source.axes if parts.weighted_sum is not None else parts.product.left_axes

    def _operand(self, node: fx.Node, axes: str, owner: str, *, expand: bool, scale: bool = True) -> Operand:
        """Take off what a rewrite should not see: see Operand."""
        factor: float | None = 1.0
        while True:
            step = self._peel(node, axes, expand, scale)
            if step is None:
                tokens = next((at for at, letter in enumerate(axes) if letter in "nm"), None)
                return Operand(node, axes, factor, self.trace.find(node, owner, tokens))
            node, axes, more = step
            factor = factor * more

    def _peel(self, node: fx.Node, axes: str, expand: bool, scale: bool) -> tuple[fx.Node, str, float] | None:
        source = _node(node.args[0]) if node.args else None
        if source is None:
            return None
        name = opname(node)
        if is_identity(node):
            return source, axes, 1.0
        if scale and name in ("mul", "div") and scalar(node.args[1], self.flow) is not None:
            return source, axes, scalar_factor(node, source, self.flow) or 1.0
        order = permutation(node, len(axes)) if name in TRANSPOSES and axes[-1] != "d" else None
        if order is not None and _only_last_two(order):
            return source, "".join(axes[order.index(i)] for i in range(len(axes))), 1.0
        if name in RESHAPES and axes[0] == "g":
            return _unmerged(node, source, axes)
        below = unexpanded(node, axes) if expand else None
        return (below, axes, 1.0) if below is not None else None

    def _heads(self, parts: Parts, axes: str) -> Value:
        """The product of weights and values, after a reshape that only takes merged heads apart."""
        node = parts.core
        users = list(node.users)
        if axes[0] == "g" and len(users) == 1 and opname(users[0]) in RESHAPES:
            shape, before = node_shape(users[0]) or (), node_shape(node) or ()
            if len(shape) == len(before) + 1 and all(map(same, shape[2:], before[1:])):
                return Value(users[0], "bh" + axes[1:])
        return Value(node, axes)

    def _count(self, operand: Operand) -> int:
        """The number of heads of a value, 0 if a merged axis hides it."""
        sizes = dict(zip(operand.axes, node_shape(operand.node) or (), strict=False))
        if "h" in sizes:
            heads = numel([sizes["h"], sizes.get("r", 1)])
            return int(heads) if heads.is_Integer else 0
        if "g" not in sizes:
            return 1
        width = next((at for at, letter in enumerate(operand.axes) if letter in "dc"), -1)
        ratio = heads_by_size(operand.node, operand.origins, width)
        return ratio if ratio is not None else 0

    # --- parts of the site ---

    def _inner(self, parts: Parts, roles: Roles, over: Over) -> dict[str, Value]:
        if parts.softmax is None or parts.scores is None or parts.weighted_sum is None:
            return {}
        axes = _named(parts.product.axes, roles, over)
        nodes, weights = {"scores": parts.scores.final}, parts.softmax.output
        # After casts and after the sink column is cut off, before dropout and merging.
        for node in parts.weighted_sum.path:
            if opname(node) not in CASTS and not (parts.scores.sinks and opname(node) == "slice"):
                break
            weights = node
        nodes["weights"] = weights
        fitting = {name: (node, _fitted(axes, _rank(node))) for name, node in nodes.items()}
        return {name: Value(node, fit) for name, (node, fit) in fitting.items() if fit}

    def _raw(self, q: Operand, k: Operand) -> dict[str, Value]:
        """Queries and keys before the rotary embedding."""
        found = {"q_raw": before_rotary(q), "k_raw": before_rotary(k)}
        return {name: value for name, value in found.items() if value is not None}

    def _linear(self, q: Operand, k: Operand, count: int, kv_count: int) -> dict[str, Value]:
        """Queries and keys as their projections yield them, before any norm."""
        found = {"q_linear": (q, count), "k_linear": (k, kv_count)}
        return {
            name: Value(one.origins.projection.out, "bnc")
            for name, (one, heads) in found.items()
            if one.origins is not None and made_alone(one, heads, self.masks.evaluator, self.sizes)
        }

    def _weights(
        self, q: Operand, k: Operand, v: Operand, output: Projection | None, heads: int, kv_heads: int
    ) -> dict[str, Weight]:
        result: dict[str, Weight] = {}
        for name, operand, count in zip("qkv", (q, k, v), (heads, kv_heads, kv_heads), strict=True):
            self._add_weight(result, name, operand, count)
        if output is not None and output.weight:
            result["o"] = output.weight
        return result

    def _add_weight(self, result: dict[str, Weight], name: str, operand: Operand, count: int) -> None:
        if operand.origins is None or operand.origins.others or not operand.origins.projection.weight:
            return
        numbers = row_numbers(operand.origins, self.masks.evaluator, self.sizes)
        rows = rows_of(numbers[1] if numbers is not None else None)
        sizes = dict(zip(operand.axes, node_shape(operand.node) or (), strict=False))
        width = sizes.get("d", sizes.get("c"))
        if rows is not None and count and isinstance(width, int) and rows.count < count * width:
            return
        whole = rows is None or rows.range is None
        fused = whole and rows is not None and rows.count < operand.origins.projection.out_width
        role = "qkv" if fused else name  # interleaved rows: the roles cannot be told apart by a range
        result[role] = weight_of(operand.origins, rows)

    def _scale(self, parts: Parts, q: Operand, k: Operand) -> float | None:
        if q.factor is None or k.factor is None:
            return None
        outer = q.factor * k.factor
        if parts.scores is not None:
            inner = scale_of(parts.scores, self.flow)
            return None if inner is None else inner * outer
        given = parts.core.kwargs.get("scale")
        if given is None:
            width = (node_shape(q.node) or (1,))[-1]
            return float(width) ** -0.5 * outer if isinstance(width, int) else None
        number = scalar(given, self.flow)
        return None if number is None else number * outer

    def _mask_graph(self, parts: Parts, roles: Roles) -> MaskGraph:
        q, k = node_shape(parts.product.left) or (), node_shape(parts.product.right) or ()
        if parts.scores is None or parts.weighted_sum is None or parts.softmax is None:
            mask = _node(argument(parts.core, 3, "attn_mask"))
            queries, keys = q[len(q) - 2], k[len(k) - 2]
            return MaskGraph(queries, keys, mask, parts.core, is_causal=bool(argument(parts.core, 5, "is_causal")))
        product = parts.product
        sizes = dict(zip(product.left_axes, q, strict=True)) | dict(zip(product.right_axes, k, strict=True))
        query = next(a for a in product.axes if roles[a] == "n")
        post = parts.weighted_sum.operand if _is_edited(parts) else None
        given = tuple(n for n in (parts.softmax.exponential, parts.softmax.total) if n is not None)
        key_axis = product.axes.index(parts.keys) - len(product.axes)
        return MaskGraph(
            sizes[query],
            sizes[parts.keys],
            unshifted(parts.scores.final, self.flow),
            parts.softmax.output,
            product.node,
            product.axes.index(query) - len(product.axes),
            key_axis,
            post=post,
            post_given=given or (parts.softmax.output,),
        )

    def _dropout(self, parts: Parts) -> float:
        if parts.weighted_sum is not None:
            return dropout_of(parts.weighted_sum.path)
        p = argument(parts.core, 4, "dropout_p", 0.0)
        return float(p) if isinstance(p, int | float) else 0.0

    def _cross(self, q: Operand, k: Operand, v: Operand) -> bool:
        """Whether queries and keys come from different sequences.

        Where keys come from two projections (MLA joins a rotary part to them), values tell.
        """
        keys = k.origins or v.origins
        one = [p.x for p in q.origins.projections] if q.origins else [q.node]
        other = [p.x for p in keys.projections] if keys else [k.node]
        return len(one) != len(other) or not all(map(same_stream, one, other, [self.flow] * len(one)))


# --- helpers ----------------------------------------------------------------------------------------------------------


def _node(value: object) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _met(parts: Parts, flow: Flow) -> tuple[list[Met], bool]:
    """What masks the scores, and whether nothing else hides keys."""
    if parts.scores is not None:
        found, whole = met(parts.scores, flow)
        return found, whole and not _is_edited(parts)
    given = _node(argument(parts.core, 3, "attn_mask"))
    masks = [] if given is None else [Met(given, "added", len(node_shape(parts.core) or ()))]
    return masks, not argument(parts.core, 5, "is_causal")


def _stage(item: tuple[str, Value]) -> int:
    """Where a value stands among the stages; masks and biases stand together, in their order."""
    name = item[0].rstrip("0123456789")
    return Attention.stages.index("mask" if name == "bias" else name)


def _named(letters: str, roles: Roles, over: Over) -> str:
    names = "".join(roles.get(a, "d") for a in letters)
    return names.translate(_BETWEEN_CHANNELS) if over == "channels" else names


def _rank(node: fx.Node) -> int:
    return len(node_shape(node) or ())


def _fitted(axes: str, rank: int) -> str:
    """The axes of a tensor in which merged heads may have been taken apart, or put together; "" if that is unclear."""
    if rank == len(axes):
        return axes
    if rank == len(axes) + 1 and axes[0] == "g":
        return "bh" + axes[1:]
    return "g" + axes[2:] if rank == len(axes) - 1 and axes[:2] == "bh" else ""


def _only_last_two(order: list[int]) -> bool:
    return order[:-2] == list(range(len(order) - 2))


def _is_edited(parts: Parts) -> bool:
    """Whether weights are zeroed after the softmax (or after the exponential of a written-out one)."""
    if parts.weighted_sum is None or parts.softmax is None:
        return False
    return parts.softmax.exponential is not None or any(
        opname(n) in ("mul", "where", "masked_fill") for n in parts.weighted_sum.path
    )


def _unmerged(node: fx.Node, source: fx.Node, axes: str) -> tuple[fx.Node, str, float] | None:
    """(b, h, n, d) behind a reshape to (b * h, n, d)."""
    into, out = node_shape(source) or (), node_shape(node) or ()
    if len(into) != len(out) + 1 or not all(map(same, into[2:], out[1:])):
        return None
    return source, "bh" + axes[1:], 1.0


def _width(heads: Value, count: int) -> int:
    size = dict(zip(heads.axes, node_shape(heads.node) or (), strict=False)).get("d")
    return count * size if isinstance(size, int) else 0
