"""MLP sites: up, activation, down on one stream. The owner is the smallest module that holds the projections.

The structure is found by asking, for every projection, which projections feed it through an activation: one (plain, or
gate and up in one matrix) or two that read the same value (gated). Norms, dropout, reshapes and depthwise convolutions
may lie between, convolutions of one pixel are projections. Experts with stacked weights are in gatecc.ir.match.experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from torch import fx, nn

from gatecc.ir.match.facts import Facts
from gatecc.ir.match.maps import module_apart
from gatecc.ir.match.projection import Projection
from gatecc.ir.match.registry import matcher
from gatecc.ir.match.shapes import same_shape
from gatecc.ir.ops import CASTS, CONTRACTIONS, DROPOUTS, SOFTMAXES, VIEWS, opname
from gatecc.ir.program import fake
from gatecc.ir.refusals import refuse
from gatecc.ir.site import MLP, Refusal, Weight
from gatecc.ir.sizes import described_shape

Feed = frozenset[tuple[Projection, str]]  # the projections that a value comes from, each with the activation on the way

_OPAQUE: Feed = frozenset()  # comes from projections in a way that no MLP does
_POOLS = frozenset(
    "mean sum amax amin max min var var_mean std norm linalg_vector_norm adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d cumsum".split()
)
_MIXERS = CONTRACTIONS | SOFTMAXES | _POOLS | frozenset(["embedding"])
_LIGHT = VIEWS | CASTS | DROPOUTS | frozenset("layer_norm batch_norm group_norm rms_norm".split())


@matcher
def match_mlp(facts: Facts) -> Iterator[MLP | Refusal]:
    """One site an MLP, in execution order; refused: deep chains, widths, pooled inputs, constants (GCC140-143)."""
    feeds = _Feeds(facts)
    fed = {node: feed for node, feed in feeds.into.items() if _activated(feed)}
    feeders = {projection.node for feed in fed.values() for projection, _ in feed}
    said: set[tuple[str, str]] = set()
    for node, feed in fed.items():
        found = _mlp(facts, facts.whole[node], feed, deep=node in feeders or any(p.node in fed for p, _ in feed))
        if isinstance(found, Refusal) and (found.code, found.owner) in said:
            continue  # a chain of five layers is one refusal, not four
        if isinstance(found, Refusal):
            said.add((found.code, found.owner))
        if found is not None:
            yield found


class _Feeds:
    """``into``: for every pointwise projection, the pointwise projections that it reads and the activations between."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._feed: dict[fx.Node, Feed] = {}
        self.into: dict[fx.Node, Feed] = {}
        for node in facts.program.calls():
            projection = facts.whole.get(node)
            if projection is not None and not projection.depthwise:
                self._project(node, projection)
                continue
            feed = self._through(node)
            if feed is not None:
                self._feed[node] = feed

    def _project(self, node: fx.Node, projection: Projection) -> None:
        before = self._feed.get(projection.x, _OPAQUE)
        if projection.pointwise and before:
            self.into[node] = before
        self._feed[node] = frozenset([(projection, "")]) if projection.pointwise else _OPAQUE

    def _through(self, node: fx.Node) -> Feed | None:
        """What feeds a node that is no projection; None if no projection lies behind it."""
        bent = self._facts.nonlinearities.get(node)
        if bent is not None:
            feed = self._feed.get(bent.inp)
            return None if feed is None else frozenset((p, act or bent.function) for p, act in feed)
        inputs = self._facts.inputs[node]
        if not any(n in self._feed for n in inputs):
            return None
        sources = [n for n in inputs if n in self._feed or self._is_stream(n)]
        if opname(node) in _MIXERS and node not in self._facts.whole:
            return _OPAQUE
        feeds = {self._feed.get(n, _OPAQUE) for n in _widest(sources)}
        if len(feeds) == 1:
            return next(iter(feeds))
        same_projections = len({frozenset(p for p, _ in feed) for feed in feeds}) == 1
        if (opname(node) != "mul" and not same_projections) or _OPAQUE in feeds:
            return _OPAQUE
        return frozenset().union(*feeds)

    def _is_stream(self, node: fx.Node) -> bool:
        held = fake(node)
        return node in self._facts.data and held is not None and held.dtype.is_floating_point


def _widest(sources: list[fx.Node]) -> list[fx.Node]:
    """The sources without those that are broadcast: one number per channel or token scales a stream, it is not one."""
    if len(sources) < 2:
        return sources
    ones = [
        tuple(i for i, size in enumerate(n.meta["val"].shape) if isinstance(size, int) and size == 1)
        if hasattr(n.meta.get("val"), "shape")
        else ()
        for n in sources
    ]
    fewest = min(map(len, ones))
    return [n for n, count in zip(sources, ones, strict=True) if len(count) == fewest]


def _activated(feed: Feed) -> bool:
    """Whether an activation or a product of two projections lies on the way."""
    return any(act for _, act in feed) or len(feed) > 1


def _mlp(facts: Facts, down: Projection, feed: Feed, *, deep: bool) -> MLP | Refusal | None:
    projections = sorted({p for p, _ in feed}, key=lambda p: facts.order[p.node])
    owner = _owner(facts, [*projections, down])
    up = _read(facts, projections, owner)
    if len(projections) > 2 or up is None:
        return None  # a join of streams
    reason = _refused(facts, up, down, deep=deep)
    if reason is not None:
        return refuse(reason[0], "mlp", down.node, reason[1], owner=owner)
    form, weights = _roles(projections, down, feed)
    if form is None:
        return refuse("GCC141", "mlp", down.node, f"{up.out_width} features become {down.in_width}", owner=owner)
    out = facts.maps.left(down.out, module_apart(down.owner, owner))
    values = {"in": facts.value(up.inp), "hidden": facts.value(down.inp), "out": facts.value(out)}
    activation = next((act for _, act in sorted(feed, key=lambda f: f[1], reverse=True)), "")
    place = facts.place("mlp", down.node, owner)
    return MLP(**place, values=values, weights=weights, form=form, activation=activation)


def _roles(
    projections: list[Projection], down: Projection, feed: Feed
) -> tuple[Literal["plain", "gated"] | None, dict[str, Weight]]:
    """The form of an MLP and its weights by role; the form is None if the widths do not fit."""
    if len(projections) == 2:
        bent = {p for p, act in feed if act}
        gate, up = sorted(projections, key=lambda p: p not in bent)
        return "gated", _known(gate=gate, up=up, down=down)
    up = projections[0]
    if up.out_width == 2 * down.in_width:
        return "gated", _known(gate_up=up, down=down)
    return ("plain" if up.out_width == down.in_width else None), _known(up=up, down=down)


def _read(facts: Facts, projections: list[Projection], owner: str) -> Projection | None:
    """The last of some projections, with the input that all of them read; None if they read different values."""
    up = projections[-1]
    if all(p.x is up.x or p.inp is up.inp for p in projections):
        return up
    given = {facts.maps.uncast(facts.maps.kept(p.inp, owner)) for p in projections}
    return replace(up, x=(inp := given.pop()), inp=inp) if len(given) == 1 else None


def _known(**roles: Projection) -> dict[str, Weight]:
    """The weights that are one parameter."""
    return {role: made.weight for role, made in roles.items() if made.weight is not None}


def _refused(facts: Facts, up: Projection, down: Projection, *, deep: bool) -> tuple[str, str] | None:
    """The code and the finding if this is no MLP on a stream."""
    if down.node not in facts.data:
        return "GCC143", ""
    if deep:
        return "GCC140", ""
    if up.in_width != down.out_width:
        return "GCC141", f"{up.in_width} features become {down.out_width}"
    if not same_shape(up.inp, down.out):
        return "GCC141", f"({described_shape(up.inp)}) becomes ({described_shape(down.out)})"
    pool = _pooled(up)
    return ("GCC142", f"it reads {pool}") if pool else None


def _pooled(up: Projection) -> str:
    """The pooling operator that made the input; the empty string if it is a stream."""
    node = up.x
    while opname(node) in _LIGHT and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return opname(node) if opname(node) in _POOLS else ""


def _owner(facts: Facts, projections: list[Projection]) -> str:
    """The smallest module that holds the projections and that runs (a ModuleList has no forward)."""
    paths = [p.owner.split(".") for p in projections]
    shared = 0
    while all(len(path) > shared for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    owner = paths[0][:shared]
    while owner and _is_list(facts, ".".join(owner)):
        owner = owner[:-1]
    return ".".join(owner)


def _is_list(facts: Facts, fqn: str) -> bool:
    if not facts.program.inside(fqn):
        return False
    try:
        module = facts.program.module.get_submodule(facts.program.relative_name(fqn))
    except AttributeError:
        return False
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))
