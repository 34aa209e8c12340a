"""Classifying a mask: evaluate it at several sizes, with the inputs that it reads set to telling values, and compare.

Nothing is concluded from names. What the evaluations do not determine is ``unknown``, with the reason.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product as combinations

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from gatecc.ir.dataflow import Flow
from gatecc.ir.evaluate import Evaluator, Slice, UnprovableError, addends
from gatecc.ir.mask import Mask
from gatecc.ir.sizes import Size, example_sizes, expression, symbols, upper_bound, value

_SMALL = (6, 11)  # lengths at which every mask is evaluated
_LARGE = 2048  # up to this length a constant of the mask graph (a window, a table) is exceeded by really evaluating
_STAND_INS = (4, 5)  # larger constants are replaced by these
_STEP, _GAP, _LEVELS = 25.0, 3, 1 << 16  # scores more than 50 below all others are masked: exp(-50) is 2e-22
_NOTHING = -1000.0  # no best score is this low unless all are masked


@dataclass(frozen=True, eq=False)
class MaskGraph:
    """What masks one attention. ``target`` holds additive scores (or booleans, True = visible) whose axes
    ``query_axis``
    and ``key_axis`` (from the right, negative) are queries and keys; None if there is no mask. ``post`` are weights
    that
    are zeroed after the softmax, given that ``post_given`` holds ones.
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


@dataclass(frozen=True)
class _View:
    """What one evaluation shows. visible: (..., n, m) bool; bias: whether visible scores differ from zero."""

    visible: torch.Tensor
    bias: bool


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
        self.content_bias = self.part is not None and len(self.part.content - zero) > 0

    def key(self) -> Hashable:
        """Equal for masks that need one proof."""
        graph = self.graph
        parts = tuple(self.evaluator.signature(p) for p in (self.part, self.post) if p is not None)
        sizes = str(graph.queries), str(graph.keys), graph.query_axis, graph.key_axis
        return parts, sizes, graph.is_causal, graph.post is None

    # --- the verdict ---

    def mask(self) -> Mask:
        masks = [self._at(sizes, {}) for sizes in self._sizes(_SMALL)]
        note = self._note()
        constants = self._constants()
        for constant in [c for c in constants if c <= _LARGE][-2:]:
            masks += self._beyond(constant)
        result = _agree(masks)
        large = [c for c in constants if c > _LARGE]
        if large and result.kind != "unknown" and self._lengths():
            result = self._with_stand_ins(result, large)
        return replace(result, reason=result.reason or note, bias=result.bias or self.content_bias)

    def _beyond(self, constant: int) -> list[Mask]:
        """The mask at a length that exceeds a constant; at the constant itself if the graph allows no more (a
        table)."""
        bound = self._bound()
        try:
            return [self._at(sizes, {}) for sizes in self._sizes((min(constant + 3, bound),))]
        except UnprovableError:
            return [self._at(sizes, {}) for sizes in self._sizes((min(constant, bound),))]

    def _with_stand_ins(self, result: Mask, large: list[int]) -> Mask:
        """Replace a constant that is too large to be exceeded by a small one: if it is a window, the mask follows
        it."""
        for constant in large:
            shifts: set[int | None] = set()
            for stand_in in _STAND_INS:
                try:
                    masks = [self._at(sizes, {constant: stand_in}) for sizes in self._sizes((11,))]
                except UnprovableError:
                    masks = []
                seen = _agree(masks) if masks else replace(result, kind="unknown")
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
        if not self._lengths():
            return f"the length is fixed at {self.graph.keys} in this capture"
        proved_at_example = next(iter(self._sizes(_SMALL))) == self.example
        return "proved at the example's length only" if proved_at_example else ""

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
        """The integers in the mask graph, and the lengths of the tables that it reads, which might be a window."""
        found: set[int] = set()
        for part in (self.part, self.post):
            for node in part.nodes if part is not None else ():
                if node.op == "get_attr":
                    held = node.meta.get("val")
                    found |= set(map(int, held.shape)) if isinstance(held, torch.Tensor) else set()
                else:
                    found |= {abs(x) for x in tree_leaves((node.args, node.kwargs)) if type(x) is int}
        return sorted(c for c in found if max(_SMALL) < c < 1 << 40)

    # --- one size ---

    def _at(self, sizes: dict[sympy.Symbol, int], constants: Mapping[int, int]) -> Mask:
        """The mask at one size: what the inputs' values that hide least show, if other values can be explained by it."""
        if len(self.inputs) > 3:
            raise UnprovableError(f"it depends on {len(self.inputs)} inputs: {', '.join(n.name for n in self.inputs)}")
        choices = combinations(*(list(_fills(node, sizes)) for node in self.inputs))
        starts = [dict(zip(self.inputs, chosen, strict=True)) for chosen in choices]
        views = [(inputs, self._view(sizes, inputs, constants)) for inputs in starts]
        views.sort(key=lambda pair: -int(pair[1].visible.sum()))
        verdicts = (self._explained(inputs, base, sizes, constants) for inputs, base in views)
        first = next(verdicts)
        return first if first.kind != "unknown" else next((m for m in verdicts if m.kind != "unknown"), first)

    def _explained(
        self, neutral: Inputs, base: _View, sizes: dict[sympy.Symbol, int], constants: Mapping[int, int]
    ) -> Mask:
        """The pattern under the neutral values, and what other values of the inputs do to it."""
        mask = _pattern(base)
        for node in self.inputs:
            if mask.kind == "unknown":
                return mask
            for values in _PROBED[neutral[node].dtype.is_floating_point]:
                probes = list(_probes(node, neutral[node], values, base.visible))
                shown = [self._view(sizes, {**neutral, node: p.tensor}, constants).visible for p in probes]
                effects = {(p.segments is not None, _effect(base.visible, p, s)) for p, s in zip(probes, shown, strict=True)}
                if {effect for _, effect in effects} != {"none"}:
                    mask = _judge(mask, effects, node)
                    break
        return mask

    def _view(self, sizes: dict[sympy.Symbol, int], inputs: Inputs, constants: Mapping[int, int]) -> _View:
        queries, keys = value(self.graph.queries, sizes), value(self.graph.keys, sizes)
        visible, bias = torch.ones(queries, keys, dtype=torch.bool), False
        if self.part is not None:
            visible, bias = _read(self._square(self._scores(self.part, sizes, inputs, constants)))
        if self.graph.is_causal:
            visible = visible & torch.ones(queries, keys, dtype=torch.bool).tril()
        if self.post is not None:
            visible = visible & self._post(self.post, sizes, inputs, constants)
        if visible.shape[-2] not in (1, queries) or visible.shape[-1] not in (1, keys):
            raise UnprovableError(f"it has the shape {tuple(visible.shape)} for {queries} queries and {keys} keys")
        return _View(visible.expand(*visible.shape[:-2], queries, keys), bias)

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
            thin = torch.zeros(shape, dtype=held.dtype, device=held.device)
            return self.evaluator.run(part, sizes, {**inputs, content: thin}, constants)
        except UnprovableError:
            return self.evaluator.run(part, sizes, inputs, constants)

    def _post(
        self, post: Slice, sizes: dict[sympy.Symbol, int], inputs: Inputs, constants: Mapping[int, int]
    ) -> torch.Tensor:
        given = dict(inputs)
        for node in self.graph.post_given:
            held = node.meta["val"]
            given[node] = torch.ones([value(s, sizes) for s in held.shape], dtype=held.dtype, device=held.device)
        return self._square(self.evaluator.run(post, sizes, given, constants)) != 0

    def _square(self, tensor: torch.Tensor) -> torch.Tensor:
        """Queries second to last, keys last. -> (..., n, m) on the CPU; missing axes are broadcast."""
        rank = max(-self.graph.query_axis, -self.graph.key_axis)
        tensor = tensor.detach().cpu()
        tensor = tensor.reshape((1,) * (rank - tensor.ndim) + tuple(tensor.shape)) if tensor.ndim < rank else tensor
        return tensor.movedim((self.graph.query_axis, self.graph.key_axis), (-2, -1))


def _read(scores: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Which keys additive scores (or a boolean mask) leave visible, and whether they bias these.

    Masked scores lie below a gap: a bias that grows with distance (ALiBi) fills the values between, a mask does not.
    """
    if scores.dtype == torch.bool:
        return scores, False
    scores = scores.double().nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    if float(scores.max()) < _NOTHING:
        return torch.zeros_like(scores, dtype=torch.bool), False
    level = ((scores.max() - scores) / _STEP).clamp(max=_LEVELS).long()
    used = torch.bincount(level.flatten(), minlength=_LEVELS + 1).nonzero().flatten()
    gap = (used.diff() >= _GAP).nonzero().flatten()
    visible = level <= used[gap[0]] if len(gap) else torch.ones_like(level, dtype=torch.bool)
    return visible, bool((scores[visible] != 0).any())


def _pattern(view: _View) -> Mask:
    """Name the pattern of one evaluation."""
    rows = view.visible.reshape(-1, *view.visible.shape[-2:])
    if not bool((rows == rows[:1]).all()):
        return Mask("unknown", bias=view.bias, reason="it differs between samples, heads or windows")
    one = rows[0]
    queries, keys = one.shape
    if not bool(one.any()):
        return Mask("unknown", reason="it hides everything")
    if bool(one.all()):
        return Mask("bidirectional", bias=view.bias)
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    if queries == keys and torch.equal(one, distance >= 0):
        return Mask("causal", bias=view.bias)
    width = int(one[-1].sum())
    if queries == keys and torch.equal(one, (distance >= 0) & (distance < width)):
        return Mask("sliding_window", window=width, bias=view.bias)
    if queries == keys and torch.equal(one, distance.abs() < width):
        return Mask("unknown", bias=view.bias, reason=f"a window of {width - 1} keys to either side")
    return Mask("unknown", bias=view.bias, reason="a pattern without a name")


def _agree(masks: list[Mask]) -> Mask:
    """The mask that all evaluations show. A window that is wider than a small size looks causal there."""
    unknown = next((m for m in masks if m.kind == "unknown"), None)
    if unknown is not None:
        return unknown
    kinds, windows = {m.kind for m in masks}, {m.window for m in masks} - {None}
    merged = replace(masks[-1], padding=any(m.padding for m in masks), bias=any(m.bias for m in masks))
    if len(windows) == 1 and kinds <= {"causal", "sliding_window"}:
        return replace(merged, kind="sliding_window", window=windows.pop())
    if len(kinds) == 1 and not windows:
        return merged
    return Mask("unknown", reason=f"it changes its kind with the length: {', '.join(map(str, masks))}")


# --- inputs -----------------------------------------------------------------------------------------------------------


# Values that hide a key, tried until one has an effect: those of a 0/1 mask, then others. False: integers; True: floats.
_PROBED: dict[bool, tuple[tuple[float, ...], ...]] = {
    False: ((0, 1), (2, -1)),
    True: ((0.0, 1.0), (-1e4, -torch.inf)),
}


@dataclass(frozen=True)
class _Probe:
    """``tensor`` differs from the neutral value where ``changed`` (B, m) is True, or restarts at ``segments`` (m,)."""

    tensor: torch.Tensor
    changed: torch.Tensor | None = None
    segments: torch.Tensor | None = None


def _fills(node: fx.Node, sizes: dict[sympy.Symbol, int]) -> Iterator[torch.Tensor]:
    """Values of an input that may hide nothing: ones, zeros, and positions."""
    held = node.meta["val"]
    shape = [value(s, sizes) for s in held.shape]
    yield torch.ones(shape, dtype=held.dtype)
    yield torch.zeros(shape, dtype=held.dtype)
    if shape and held.dtype in (torch.int64, torch.int32):
        yield torch.arange(shape[-1], dtype=held.dtype).expand(shape).contiguous()


def _probes(
    node: fx.Node, neutral: torch.Tensor, others: tuple[float, ...], visible: torch.Tensor
) -> Iterator[_Probe]:
    """Other values of an input: some keys hidden, and sequences packed into one."""
    keys = visible.shape[-1]
    if not neutral.ndim or neutral.shape[-1] != keys or neutral.numel() != neutral.shape[0] * keys:
        raise UnprovableError(f"it is the input {node.name}, or made of its values")
    batch = neutral.shape[0] if neutral.ndim > 1 else 1
    flat = neutral.reshape(batch, keys)
    for other in others:
        for start in (keys - 2, 1):  # the end of the sequence, or all but its start; rows differ
            changed = torch.arange(keys).expand(batch, keys) >= start + torch.arange(batch)[:, None] % 2
            changed = changed & (flat != other)
            yield _Probe(
                torch.where(changed, torch.tensor(other, dtype=neutral.dtype), flat).reshape(neutral.shape), changed
            )
    if neutral.dtype in (torch.int64, torch.int32):
        segments = (torch.arange(keys) >= keys // 2).to(neutral.dtype)
        restart = torch.cat([torch.arange(keys // 2), torch.arange(keys - keys // 2)]).to(neutral.dtype)
        yield _Probe(restart.expand(batch, keys).reshape(neutral.shape).clone(), segments=segments)
        yield _Probe((segments + 1).expand(batch, keys).reshape(neutral.shape).clone(), segments=segments)


def _judge(mask: Mask, effects: set[tuple[bool, str]], node: fx.Node) -> Mask:
    """What the probes of one input, (packed or not, effect), say about the mask that the neutral inputs show."""
    if (True, "packed") in effects and mask.causal:
        return replace(mask, kind="packed")
    if {effect for packed, effect in effects if not packed} <= {"none", "padding"} and (False, "padding") in effects:
        return replace(mask, padding=True)
    return Mask("unknown", bias=mask.bias, reason=f"it depends on the values of the input {node.name} in a way without a name")


def _effect(base: torch.Tensor, probe: _Probe, shown: torch.Tensor) -> str:
    """ "none", "padding" (the changed keys are hidden), "packed" (other segments are hidden) or "other"."""
    if _matches(shown, base):
        return "none"
    if probe.segments is not None:
        together = probe.segments[:, None] == probe.segments
        return "packed" if _matches(shown, base & together) else "other"
    assert probe.changed is not None
    keep = _per_key(~probe.changed, shown)
    return "padding" if keep is not None and _matches(shown, base & keep) else "other"


def _matches(shown: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, except in rows that are expected to see nothing: those may be anything."""
    shown, expected = torch.broadcast_tensors(shown, expected)
    live = expected.any(-1)
    return torch.equal(shown[live], expected[live])


def _per_key(keep: torch.Tensor, visible: torch.Tensor) -> torch.Tensor | None:
    """(B, m) -> broadcastable to visible (B, ..., m), or (B * heads, n, m); None if the batch axis is not to be
    seen."""
    batch, keys = keep.shape
    if visible.ndim == 2:
        return keep if batch == 1 else None
    first = visible.shape[0]
    if first % batch:
        return None
    keep = keep.repeat_interleave(first // batch, 0)
    return keep.reshape(first, *(1,) * (visible.ndim - 2), keys)
