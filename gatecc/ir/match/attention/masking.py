"""What hides keys from queries or biases their scores: the tensors that meet scores before the softmax, by name."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal, cast

from torch import Tensor, fx

from gatecc.ir.axes import Axes
from gatecc.ir.dataflow import Flow
from gatecc.ir.evaluate import Evaluator, UnprovableError
from gatecc.ir.match.attention.scores import Scores
from gatecc.ir.match.mask.pattern import read
from gatecc.ir.match.mask.probe import fills
from gatecc.ir.ops import argument, opname
from gatecc.ir.program import fake
from gatecc.ir.scalars import scalar
from gatecc.ir.site import Masking
from gatecc.ir.sizes import Sizes, example_sizes, node_shape

How = Literal["seen", "hidden", "added", "subtracted"]
_FLOOR = -1e4
_HIDING = frozenset("rsub maximum minimum max cat pad constant_pad_nd copy slice_scatter tril triu index_put".split())


@dataclass(frozen=True, eq=False)
class Met:
    """A tensor that meets the scores; ``rank``: how many axes these have there."""

    node: fx.Node
    how: How
    rank: int


def met(scores: Scores, flow: Flow) -> tuple[list[Met], bool]:
    """The tensors that mask or are added to the scores, in order, and whether these are all that may hide keys."""
    inside = {scores.source.node, *scores.path}
    addend = scores.source.addend if scores.source.node.kwargs.get("beta", 1) else None
    found = [] if addend is None else [Met(addend, "added", _rank(scores.source.node))]
    whole = True
    for node in scores.path:
        name = opname(node)
        others = [n for n in node.all_input_nodes if n not in inside and node_shape(n)]
        if name in ("add", "sub", "where", "masked_fill"):
            one = _met_at(node, others, inside)
            found += [one] if one is not None else []
            whole = whole and (one is not None or not others or _is_shift(others[0]))
        elif name in _HIDING and not _is_floored(node, inside, flow):
            whole = False
    return found, whole


def _met_at(node: fx.Node, others: list[fx.Node], inside: set[fx.Node]) -> Met | None:
    name = opname(node)
    if name in ("where", "masked_fill"):
        condition = argument(node, 0 if name == "where" else 1, "mask")
        keeps = name == "where" and argument(node, 1, "self") in inside
        how = "seen" if keeps else "hidden"
        return Met(condition, how, _rank(node)) if isinstance(condition, fx.Node) else None
    if len(others) != 1 or _is_shift(others[0]) or node.kwargs or (name == "sub" and node.args[0] is others[0]):
        return None
    return Met(others[0], "added" if name == "add" else "subtracted", _rank(node))


def _is_floored(node: fx.Node, inside: set[fx.Node], flow: Flow) -> bool:
    """Whether scores are raised to a number that no key which is seen lies below: models do so with masked scores."""
    floors = [scalar(n, flow) for n in node.all_input_nodes if n not in inside]
    raised = opname(node) in ("maximum", "max") and bool(floors)
    return raised and all(floor is not None and floor <= _FLOOR for floor in floors)


def _is_shift(node: fx.Node) -> bool:
    """The maximum of a row, which a softmax that is written out takes off."""
    return opname(node) in ("amax", "max", "getitem")


def _rank(node: fx.Node) -> int:
    return len(node_shape(node) or ())


# --- their names ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class MaskNames:
    """Tells masks from biases, for the sites of one program.

    A bias is learned, or is a table of finite numbers that hides nothing (ALiBi). What the model hands in beside is a
    mask, also where a bias was added to it before: then the bias is a value of its own as well.
    """

    evaluator: Evaluator
    _known: dict[Hashable, bool] = field(default_factory=dict[Hashable, bool])

    def __post_init__(self) -> None:
        self._flow: Flow = self.evaluator.flow
        self._sizes: Sizes = example_sizes(self._flow.program)

    def values(self, found: list[Met], axes: Axes) -> dict[str, Masking]:
        """``mask`` and ``bias`` in the order in which they meet scores of the axes ``axes``. Of several masks the last
        is ``mask``, those before are ``mask0``, ``mask1``, ...; likewise biases."""
        rows: list[tuple[str, Masking]] = []
        for each in found:
            whole = Masking(each.node, _right_aligned(axes, each.rank, _rank(each.node)), each.how, each.rank)
            parts = summands(each.node) if each.how in ("added", "subtracted") else [each.node]
            biases = [part for part in parts if self._is_bias(part)] if each.how in ("added", "subtracted") else []
            rows.append(("bias" if len(biases) == len(parts) else "mask", whole))
            if 0 < len(biases) < len(parts):
                for part in biases:
                    own = _right_aligned(axes, each.rank, _rank(part))
                    rows.append(("bias", Masking(part, own, each.how, each.rank, inside=True)))
        return _numbered(rows)

    def _is_bias(self, node: fx.Node) -> bool:
        held = fake(node)
        if held is None or not held.is_floating_point():
            return False
        if node in self._flow.learned:
            return True
        if node not in self._known:
            self._known[node] = self._biases_alone(node)
        return self._known[node]

    def _biases_alone(self, node: fx.Node) -> bool:
        """Whether a table hides no key and is not zero, when the model's inputs are ones (floats also when zeros): what
        hides nothing is zero then, and what hides something hides it.
        """
        try:
            part = self.evaluator.slice(node)
            key = ("table", self.evaluator.signature(part))
            if key not in self._known:
                shown = [read(self.evaluator.run(part, self._sizes, given)) for given in self._inputs(part.inputs)]
                self._known[key] = all(bool(visible.all()) and biases for visible, biases in shown)
            return self._known[key]
        except UnprovableError:
            return False

    def _inputs(self, nodes: list[fx.Node]) -> list[dict[fx.Node, Tensor]]:
        filled = {node: list(fills(node, self._sizes))[:2] for node in nodes}
        ones = {node: values[0] for node, values in filled.items()}
        zeros = {node: values[int(values[0].is_floating_point())] for node, values in filled.items()}
        return [ones, zeros]


def summands(node: fx.Node) -> list[fx.Node]:
    """The summands of a tensor that is a plain sum."""
    if opname(node) == "add" and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args[:2]):
        return [part for a in node.args[:2] for part in summands(cast("fx.Node", a))]
    return [node]


def _numbered(rows: list[tuple[str, Masking]]) -> dict[str, Masking]:
    last = {name: at for at, (name, _) in enumerate(rows)}
    counts = {"mask": 0, "bias": 0}
    result: dict[str, Masking] = {}
    for at, (name, value) in enumerate(rows):
        result[name if last[name] == at else f"{name}{counts[name]}"] = value
        counts[name] += 1
    return result


def _right_aligned(axes: Axes, rank: int, own: int) -> Axes:
    """The axes of a tensor that is broadcast to scores: those of its last axes. Empty where that is unclear."""
    text = axes.text
    if rank == len(text) + 1:  # merged heads are taken apart there, or windows that are samples elsewhere
        text = axes.apart.text if text[:1] == "g" else f"bw{text[1:]}" if text[:1] == "b" else ""
    elif rank == len(text) - 1:
        text = f"g{text[2:]}" if text[:2] == "bh" else ""
    return Axes(text[len(text) - own :] if len(text) == rank and own <= rank else "")


__all__ = ["MaskNames", "Met", "met", "summands"]
