"""Classifying a mask: evaluate it at several sizes, with the inputs that it reads set to telling values, and compare.

Nothing is concluded from names. What the evaluations do not determine is ``unknown``, with the reason.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product as combinations
from math import ceil

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from gatecc.ir.dataflow import Flow
from gatecc.ir.evaluate import Evaluator, Slice, UnprovableError, addends, place
from gatecc.ir.mask import Mask
from gatecc.ir.match.mask.pattern import View, agree, pattern, read
from gatecc.ir.match.mask.probe import PROBED, effect, fills, judge, probes
from gatecc.ir.sizes import Size, example_sizes, expression, symbols, upper_bound, value

AT_EXAMPLE_ONLY = "proved at the example's length only"  # a reason, of a mask whose lengths nobody can choose
_SMALL = (6, 11)  # lengths at which every mask is evaluated
_LARGE = 2048  # up to this length a constant of the mask graph (a window, a table) is exceeded by really evaluating
_USUAL = 125  # tokens that every mask is evaluated beyond: numbers may be made of several in the graph
_FEW = 16  # numbers of a tensor that are looked at one by one
_STAND_INS = (4, 5)  # larger constants are replaced by these


@dataclass(frozen=True, eq=False)
class MaskGraph:
    """What masks one attention. ``target`` holds additive scores (or booleans, True = visible) whose axes
    ``query_axis`` and ``key_axis`` (from the right, negative) are queries and keys; None if there is no mask. ``post``
    are weights that are zeroed after the softmax, given that ``post_given`` holds ones.
    """

    queries: Size
    keys: Size
    target: fx.Node | None = None
    until: fx.Node | None = None  # what reads the target
    content: fx.Node | None = None  # the product of queries and keys, taken as zero
    query_axis: int = -2
    key_axis: int = -1
    is_causal: bool = False
    post: fx.Node | None = None
    post_given: tuple[fx.Node, ...] = ()


Inputs = Mapping[fx.Node, torch.Tensor]


@dataclass(eq=False)
class MaskClassifier:
    """Classifies the masks of one program; masks that several layers share are evaluated once."""

    flow: Flow
    known: dict[Hashable, Mask] = field(default_factory=dict[Hashable, Mask])

    def __post_init__(self) -> None:
        self.evaluator = Evaluator(self.flow)
        self.example = example_sizes(self.flow.program)

    def classify(self, graph: MaskGraph) -> Mask:
        """The kind of one mask."""
        if graph.target is None:
            return Mask("causal" if graph.is_causal else "bidirectional")
        try:
            proof = _Proof(self, graph)
            key = proof.key()
            if key not in self.known:
                self.known[key] = proof.mask()
            return self.known[key]
        except UnprovableError as e:
            return Mask("unknown", reason=str(e))


class _Proof:
    """The evaluations that prove one mask."""

    def __init__(self, owner: MaskClassifier, graph: MaskGraph) -> None:
        self.graph, self.evaluator, self.flow, self.example = graph, owner.evaluator, owner.flow, owner.example
        zero = frozenset({graph.content} if graph.content is not None else ())
        self.part = self.evaluator.slice(graph.target, zero, until=graph.until) if graph.target is not None else None
        given = frozenset(graph.post_given)
        self.post = self.evaluator.slice(graph.post, given=given) if graph.post is not None else None
        parts = [p for p in (self.part, self.post) if p is not None]
        self.inputs = sorted({n for p in parts for n in p.inputs}, key=self.flow.order.__getitem__)
        self.neutral: dict[fx.Node, int] = dict.fromkeys(
            self.inputs, 0
        )  # the fill that a small size showed to be neutral
        self.content_bias = self.part is not None and len(self.part.content - zero) > 0

    def key(self) -> Hashable:
        """Equal for masks that need one proof."""
        graph = self.graph
        parts = tuple(self.evaluator.signature(p) for p in (self.part, self.post) if p is not None)
        sizes = str(graph.queries), str(graph.keys), graph.query_axis, graph.key_axis
        return parts, sizes, graph.is_causal, graph.post is None

    # --- the verdict ---

    def mask(self) -> Mask:
        result = agree([self._at(sizes, {}) for sizes in self._sizes(_SMALL)])
        note = self._note()
        constants = self._constants()
        largest = max((c for c in constants if c <= _LARGE), default=0)
        if largest:
            result = agree([result, *(self._seen(mask, result) for mask in self._beyond(largest))])
        if largest < _USUAL:
            with suppress(UnprovableError):  # a table ends before
                result = agree([result, *(self._seen(mask, result) for mask in self._beyond(_USUAL))])
        large = [c for c in constants if c > _LARGE]
        if large and result.kind != "unknown" and self._lengths():
            result = self._with_stand_ins(result, large)
        return replace(result, reason=result.reason or note, bias=result.bias or self.content_bias)

    def _seen(self, large: Mask, small: Mask) -> Mask:
        """The pattern at a large size with what was seen of the inputs at a small one."""
        packed = large.kind == "causal" and small.kind == "packed"
        return replace(large, kind="packed" if packed else large.kind, padding=small.padding, both=small.both)

    def _beyond(self, constant: int) -> list[Mask]:
        """The mask at a length that exceeds a constant; at the constant itself if a table ends there."""
        bound = self._bound()
        try:
            return [self._unprobed(sizes) for sizes in self._sizes((min(constant + 3, bound),))]
        except UnprovableError:
            return [self._unprobed(sizes) for sizes in self._sizes((min(constant, bound),))]

    def _unprobed(self, sizes: dict[sympy.Symbol, int]) -> Mask:
        """The pattern under the neutral values; what other values do was seen at a small size."""
        chosen = {node: list(fills(node, sizes))[i] for node, i in self.neutral.items()}
        return pattern(self._view(sizes, chosen, {}))

    def _with_stand_ins(self, result: Mask, large: list[int]) -> Mask:
        """Put a small constant in the place of one too large to be exceeded: if it is a window, the mask follows it."""
        for constant in large:
            shifts: set[int | None] = set()
            for stand_in in _STAND_INS:
                try:
                    masks = [self._at(sizes, {constant: stand_in}) for sizes in self._sizes((11,))]
                except UnprovableError:
                    masks = []
                seen = agree(masks) if masks else replace(result, kind="unknown")
                if replace(seen, reason="") == replace(result, reason=""):
                    shifts.add(None)
                elif seen.kind == "sliding_window" and result.kind == "causal" and seen.window is not None:
                    shifts.add(seen.window - stand_in)
                else:
                    return Mask("unknown", reason=f"the role of the constant {constant} could not be proved")
            if len(shifts) != 1:
                return Mask("unknown", reason=f"the role of the constant {constant} could not be proved")
            shift = shifts.pop()
            if shift is not None:
                result = replace(result, kind="sliding_window", window=constant + shift)
        return result

    # --- sizes ---

    def _note(self) -> str:
        """What limits the proof: a length that cannot be varied hides a window that is wider."""
        if not any(self._is_source(node, p) for p in (self.part, self.post) if p is not None for node in p.nodes):
            return ""
        if not self._lengths():
            return f"the length is fixed at {self.graph.keys} in this capture"
        proved_at_example = next(iter(self._sizes(_SMALL))) == self.example
        return AT_EXAMPLE_ONLY if proved_at_example else ""

    def _is_source(self, node: fx.Node, part: Slice) -> bool:
        """Whether a node brings in something of its own, such as a table or a range of positions."""
        tensors = [
            n for n in node.all_input_nodes if n in part.nodes and not isinstance(n.meta.get("val"), torch.SymInt)
        ]
        holds = isinstance(node.meta.get("val"), torch.Tensor)
        return holds and not tensors and node not in part.content and node not in self.graph.post_given

    def _lengths(self) -> set[sympy.Symbol]:
        return symbols(self.graph.queries) | symbols(self.graph.keys)

    def _sizes(self, lengths: tuple[int, ...]) -> Iterator[dict[sympy.Symbol, int]]:
        """Values for all symbols, with the symbols of the query and key lengths set to each of ``lengths``.

        If a length is no size of an input (the number of patches of an image, say), the example's sizes.
        """
        own = sorted(self._lengths(), key=str)
        ends = [size for size in (self.graph.queries, self.graph.keys) if symbols(size)]
        if not all((expression(size) - s).is_Integer for size in ends for s in symbols(size)):
            own = []
        bound = self._bound()
        fitting = [length for length in lengths if own and length <= bound]
        if not fitting and lengths is _SMALL:
            yield self.example
        for length in fitting:
            yield {**self.example, **{s: length + 2 * i for i, s in enumerate(own)}}

    def _bound(self) -> int:
        """The largest length that the capture allows."""
        return min((upper_bound(s) for s in (self.graph.queries, self.graph.keys) if symbols(s)), default=0)

    def _constants(self) -> list[int]:
        """The numbers in the mask graph, and the lengths of the tables that it reads, which might be a window. A
        number below 1 may be one over it."""
        found: set[float] = set()
        for part in (self.part, self.post):
            for node in part.nodes if part is not None else ():
                held = node.meta.get("val")
                if self.flow.program.path(node) is None:
                    found |= {abs(x) for x in tree_leaves((node.args, node.kwargs)) if type(x) in (int, float)}
                elif isinstance(held, torch.Tensor):
                    found |= {float(size) for size in held.shape} | self._held(node)
        found |= {1 / x for x in found if 0 < x < 1}
        return sorted({ceil(c) for c in found if max(_SMALL) < c <= _LARGE or (type(c) is int and c < 1 << 40)})

    def _held(self, node: fx.Node) -> set[float]:
        """The numbers of a small tensor that belongs to the graph."""
        held = self.flow.program.constant(node)
        if held is None or isinstance(held, FakeTensor) or held.numel() > _FEW or held.is_complex():
            return set()
        return {abs(float(x)) for x in held.flatten().tolist() if abs(x) < torch.inf}

    # --- one size ---

    def _at(self, sizes: dict[sympy.Symbol, int], constants: Mapping[int, int]) -> Mask:
        """The mask at one size: what inputs that hide least show, if the effect of other values can be explained."""
        if len(self.inputs) > 3:
            raise UnprovableError(f"it depends on {len(self.inputs)} inputs: {', '.join(n.name for n in self.inputs)}")
        filled = {node: list(fills(node, sizes)) for node in self.inputs}
        starts: list[tuple[dict[fx.Node, int], Inputs, View]] = []
        for chosen in combinations(*(range(len(filled[node])) for node in self.inputs)):
            at = dict(zip(self.inputs, chosen, strict=True))
            inputs = {node: filled[node][i] for node, i in at.items()}
            starts.append((at, inputs, self._view(sizes, inputs, constants)))
        starts.sort(key=lambda start: -int(start[2].visible.sum()))
        first: Mask | None = None
        for at, inputs, base in starts:
            mask = self._explained(inputs, base, sizes, constants)
            if mask.kind != "unknown":
                self.neutral = at
                return mask
            first = first or mask
        assert first is not None
        return first

    def _explained(
        self, neutral: Inputs, base: View, sizes: dict[sympy.Symbol, int], constants: Mapping[int, int]
    ) -> Mask:
        """The pattern under the neutral values, and what other values of the inputs do to it."""
        mask = pattern(base)
        for node in self.inputs:
            if mask.kind == "unknown":
                return mask
            for values in PROBED[neutral[node].dtype.is_floating_point]:
                tried = list(probes(node, neutral[node], values, base.visible))
                shown = [self._view(sizes, {**neutral, node: p.tensor}, constants).visible for p in tried]
                effects = {
                    (p.segments is not None, effect(base.visible, p, s)) for p, s in zip(tried, shown, strict=True)
                }
                if {seen for _, seen in effects} != {"none"}:
                    mask = judge(mask, effects, node)
                    break
        return mask

    def _view(self, sizes: dict[sympy.Symbol, int], inputs: Inputs, constants: Mapping[int, int]) -> View:
        queries, keys = value(self.graph.queries, sizes), value(self.graph.keys, sizes)
        visible, bias = torch.ones(queries, keys, dtype=torch.bool), False
        if self.part is not None:
            visible, bias = read(self._square(self._scores(self.part, sizes, inputs, constants)))
        if self.graph.is_causal:
            visible = visible & torch.ones(queries, keys, dtype=torch.bool).tril()
        if self.post is not None:
            visible = _both(visible, self._post(self.post, sizes, inputs, constants))
        if visible.shape[-2] not in (1, queries) or visible.shape[-1] not in (1, keys):
            raise UnprovableError(f"it has the shape {tuple(visible.shape)} for {queries} queries and {keys} keys")
        return View(visible.expand(*visible.shape[:-2], queries, keys), bias)

    def _scores(
        self, part: Slice, sizes: dict[sympy.Symbol, int], inputs: Inputs, constants: Mapping[int, int]
    ) -> torch.Tensor:
        """The additive scores; the zeros that stand for queries times keys get no batch and head axes if that works."""
        content = self.graph.content
        if content is None or addends(content):
            return self.evaluator.run(part, sizes, inputs, constants)
        held = content.meta["val"]
        kept = {held.ndim + self.graph.query_axis, held.ndim + self.graph.key_axis}
        shape = [value(s, sizes) if i in kept else 1 for i, s in enumerate(held.shape)]
        try:
            thin = torch.zeros(shape, dtype=held.dtype, device=place(held.device))
            return self.evaluator.run(part, sizes, {**inputs, content: thin}, constants)
        except UnprovableError:
            return self.evaluator.run(part, sizes, inputs, constants)

    def _post(
        self, post: Slice, sizes: dict[sympy.Symbol, int], inputs: Inputs, constants: Mapping[int, int]
    ) -> torch.Tensor:
        given = dict(inputs)
        for node in self.graph.post_given:
            held = node.meta["val"]
            given[node] = torch.ones([value(s, sizes) for s in held.shape], dtype=held.dtype, device=place(held.device))
        return self._square(self.evaluator.run(post, sizes, given, constants)) != 0

    def _square(self, tensor: torch.Tensor) -> torch.Tensor:
        """Queries second to last, keys last. -> (..., n, m) on the CPU; missing axes are broadcast."""
        rank = max(-self.graph.query_axis, -self.graph.key_axis)
        tensor = tensor.detach().cpu()
        tensor = tensor.reshape((1,) * (rank - tensor.ndim) + tuple(tensor.shape)) if tensor.ndim < rank else tensor
        return tensor.movedim((self.graph.query_axis, self.graph.key_axis), (-2, -1))


def _both(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """What both leave visible; ``other`` may have batch and heads in one axis, if it is the same for all of them."""
    if one.ndim == other.ndim or other.ndim == 2:
        return one & other
    rows = other.reshape(-1, *other.shape[-2:])
    if not bool((rows == rows[:1]).all()):
        raise UnprovableError("weights are zeroed after heads were merged, not the same for all of them")
    return one & rows[0]
