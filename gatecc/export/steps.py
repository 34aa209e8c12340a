"""steps: decode.onnx against one full forward of torch, after prefills and steps of several lengths.

Rounding is no error: what differs by more than the tolerance may be about as far from the model in float64 as the full
forward is. The derived decoder in torch proves nothing here, for the file is made of it: it tells where an error is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from gatecc.capture import signature
from gatecc.capture.export import capture
from gatecc.capture.exported import exported_program
from gatecc.codegen.onnx.place import reason
from gatecc.codegen.onnx.reference import drawn, reference
from gatecc.codegen.onnx.runtime import Session
from gatecc.decoder import Decoder
from gatecc.decoder.analysis.axes import Lengths
from gatecc.decoder.analysis.inputs import continued
from gatecc.decoder.emit.closed import Closed
from gatecc.decoder.emit.names import input_names
from gatecc.decoder.plan import Plan
from gatecc.errors import ArgumentError, ExportError, GateccError
from gatecc.export.carried import Carried
from gatecc.export.compare import TOLERANCE, Compared, allowed_off
from gatecc.export.encoder import Encode
from gatecc.export.locate import with_place
from gatecc.export.lower import context_of
from gatecc.export.ragged import MASK, groups, hide
from gatecc.ir.sizes import expression, node_shape
from gatecc.scope.family import difference

_PIECES = ((64, 1, 1, 4), (7, 1, 5, 1), (1, 1, 1, 1, 3))  # tokens of a prefill, and of the steps behind it
_BATCHES = (3, 1)
_CONTEXTS = (3, -(1 << 30))  # lengths of what an encoder reads: a few more than the example's, and one


@dataclass(frozen=True, eq=False)
class Text:
    """Example tokens with what the model computes for all of them at once. ``values`` are those of the other inputs,
    by the captured nodes that they are; ``encode`` says what the steps read of those that are no tokens. ``sizes``:
    those by which it differs from others. ``wide``: all logits in float64, and behind these the same with rounding
    drawn; nothing if they cannot be had. ``told``: where the logits say something (B, N): not at padding."""

    ids: Tensor
    values: dict[fx.Node, Tensor]
    logits: Tensor
    told: Tensor
    encode: Encode
    wide: Callable[[], list[Tensor]]
    sizes: dict[str, int] = field(default_factory=dict[str, int])

    def sample(self, batch: int) -> Text:
        """The first samples alone."""
        values = {node: x[:batch] for node, x in self.values.items()}
        parts = {name: getattr(self, name)[:batch] for name in ("ids", "logits", "told")}
        return replace(self, values=values, **parts)


class Filled:
    """A session that is given zeros for states that nothing needs, and keeps them to itself."""

    def __init__(self, session: Session, unread: Sequence[Carried]) -> None:
        self._session, self._unread = session, unread
        self.reference = bool(session.lacking)
        """Whether ONNX's reference evaluator runs it."""

    def fed(self, names: Sequence[str], leaves: Sequence[Tensor]) -> tuple[list[str], list[Tensor]]:
        """The inputs of the file: these, and the zeros."""
        batch = leaves[0].shape[0]
        shapes = [[batch, *map(int, state.shape[1:])] for state in self._unread]
        zeros = [
            torch.zeros(shape, dtype=getattr(torch, state.dtype))
            for shape, state in zip(shapes, self._unread, strict=True)
        ]
        return [*names, *(state.input for state in self._unread)], [*leaves, *zeros]

    def run(self, names: Sequence[str], leaves: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, of which the first are the tokens."""
        found = self._session.run(*self.fed(names, leaves))
        return found[: len(found) - len(self._unread)]


Locate = Callable[[Callable[[Filled], object], float], str]
"""Runs a text once more in a session that is watched, and says which node of the file differs first by so much."""


def text(made: Decoder, step: Closed, model: nn.Module, inputs: tuple[Any, Any], encode: Encode) -> Text:
    """A text of the longest length that is compared, padded on the left where the step takes that."""
    try:
        return _text(made, step, model, inputs, encode, {})
    except (RuntimeError, IndexError, ValueError, TypeError) as e:
        if isinstance(e, GateccError):
            raise
        raise ExportError(
            "the model does not run on a text as long as decode.onnx is compared at",
            where=type(model).__name__,
            found=f"{_length(made, step, model)} tokens: {reason(e)}",
            expected="a model that says how many tokens it is for",
            do="set max_position_embeddings in model.config to the number of positions that it has",
        ) from e


def other_contexts(
    made: Decoder, step: Closed, model: nn.Module, inputs: tuple[Any, Any], like: Text
) -> Iterator[Text]:
    """Texts for contexts of other lengths, as far as the model runs there: the lengths of what an encoder reads."""
    plan = made.plan
    known = {
        expression(n): int(m)
        for node, x in _example(plan)
        for n, m in zip(node.meta["val"].shape, x.shape, strict=True)
    }
    for change in _CONTEXTS if plan.lengths.other else ():
        sizes = {s: max(known[s] + change, 1) for s in plan.lengths.other if s in known}
        try:
            yield _text(made, step, model, inputs, like.encode, sizes)
        except (RuntimeError, IndexError, ValueError, TypeError, ArgumentError):  # the model does not run there
            continue


def _text(
    made: Decoder, step: Closed, model: nn.Module, inputs: tuple[Any, Any], encode: Encode, sizes: Mapping[Any, int]
) -> Text:
    plan = made.plan
    length = _length(made, step, model)
    values = {node: _resized(x, plan.inputs, node, length, sizes) for node, x in _example(plan)}
    ids = values.pop(plan.inputs.tokens)
    counted = step.given.get(step.mask) if step.mask is not None and step.ragged else None
    told = _hide(plan, model, inputs, ids, values, counted)
    if sizes:
        made.context(len(ids), {n.name: values[n] for n in plan.inputs.context})
    logits = forward(plan, model, inputs, ids, values)
    wide = cache(partial(_in_float64, plan, model, inputs, ids, values))
    return Text(ids, values, logits, told, encode, wide, {"context": max(sizes.values())} if sizes else {})


def _length(made: Decoder, step: Closed, model: nn.Module) -> int:
    """The longest that is compared."""
    length = made.reach(max(map(sum, _PIECES)))
    length = min(length, context_of(model) or length)  # tables that are read at places of tokens end there
    return length if step.capacity is None else min(length, step.capacity)


def forward(plan: Plan, model: nn.Module, inputs: Any, ids: Tensor, values: Mapping[fx.Node, Tensor]) -> Tensor:
    """The logits of the model itself, of all tokens at once, for inputs like the example's."""
    args, kwargs = signature.rebuild(inputs, iter(_leaves(plan, ids, values)))
    with torch.no_grad():
        return tree_leaves(model(*args, **kwargs))[plan.output]


def _in_float64(
    plan: Plan, model: nn.Module, inputs: Any, ids: Tensor, values: Mapping[fx.Node, Tensor]
) -> list[Tensor]:
    """The same in float64 and with rounding drawn, captured at these very sizes: the plan's own graph has marks in it,
    which do not run."""

    def logits(*args: Any, **kwargs: Any) -> Tensor:
        return tree_leaves(model(*args, **kwargs))[plan.output]

    leaves = _leaves(plan, ids, values)
    args, kwargs = signature.rebuild(inputs, iter(leaves))
    try:
        with torch.no_grad():
            program = exported_program(capture(model, args, kwargs, forward=logits, dynamic="none"))
            return [x[0] for x in (reference(program, leaves), *drawn(program, leaves))]
    except Exception:  # a graph that does not run in float64 leaves the plain tolerance
        return []


def _leaves(plan: Plan, ids: Tensor, values: Mapping[fx.Node, Tensor]) -> list[Tensor]:
    return [ids if node is plan.inputs.tokens else values[node] for node in plan.program.placeholders]


def _example(plan: Plan) -> list[tuple[fx.Node, Tensor]]:
    return list(zip(plan.program.placeholders, plan.program.example, strict=True))


def _resized(x: Tensor, inputs: Any, node: fx.Node, length: int, sizes: Mapping[Any, int]) -> Tensor:
    """An input for the largest batch and this length, of which tokens are drawn. ``sizes``: the lengths of contexts."""
    rows = max(_BATCHES)
    if node is inputs.tokens:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(int(x.max()) + 1, (rows, length, *x.shape[2:]), generator=generator)
        return drawn.to(x.device, x.dtype)
    x = x.index_select(0, torch.arange(rows, device=x.device) % len(x))
    if node in inputs.context:
        return _context(x, node, inputs.lengths, sizes)
    return continued(node, x, length)


def _context(x: Tensor, node: fx.Node, lengths: Lengths, sizes: Mapping[Any, int]) -> Tensor:
    shape = [expression(size) for size in node_shape(node) or ()]
    for axis, size in enumerate(shape):
        if lengths.foreign(size):
            wanted = int(size.xreplace(dict(sizes))) if size.free_symbols <= set(sizes) else x.shape[axis]
            x = x.index_select(axis, torch.arange(wanted, device=x.device) % x.shape[axis])
    return x


def _hide(
    plan: Plan, model: nn.Module, inputs: Any, ids: Tensor, values: dict[fx.Node, Tensor], counted: fx.Node | None
) -> Tensor:
    """Put padding in all ``values`` that are masks of it, by what the model does, and return where its logits say
    something. (B, N)

    The second row is padded on the left, of a context the third one on the right. ``counted``: the mask that stays
    without padding, for attention counts by it.
    """

    def run(leaves: Sequence[Tensor]) -> list[Tensor] | None:
        given = dict(zip(plan.program.placeholders, leaves, strict=True))
        try:
            return [forward(plan, model, inputs, given.pop(plan.inputs.tokens), given)]
        except (RuntimeError, IndexError, ValueError, TypeError):  # a value that this input never has
            return None

    nodes, told = plan.program.placeholders, torch.ones(ids.shape[:2], dtype=torch.bool)
    if counted is not None:
        values[counted].fill_(1)
    for group in groups([node.name for node in nodes], _leaves(plan, ids, values)):
        masks = [at for at in group if nodes[at] is not counted and _masks(nodes[at], plan)]
        if not masks:
            continue
        seen = [_seen(values[nodes[at]], context=nodes[at] in plan.inputs.context) for at in masks]
        named = nodes[masks[0]].name.endswith(MASK)
        found = hide(_leaves(plan, ids, values), masks, seen, run, named=named)
        if found is None:
            continue
        values.update({nodes[at]: found.inputs[at] for at in masks})
        if not found.passed:
            told &= torch.isfinite(found.outputs[0]).flatten(2).all(-1).cpu()
            continue
        for at, mask in zip(masks, seen, strict=True):
            told &= mask.cpu() if nodes[at] in plan.inputs.history else True
    return told


def _masks(node: fx.Node, plan: Plan) -> bool:
    """Whether an input has a value per token, or per place of a context."""
    if node in plan.inputs.history:
        return True
    sizes = [expression(size) for size in node_shape(node) or ()]
    return node in plan.inputs.context and len(sizes) > 1 and plan.lengths.foreign(sizes[1])


def _seen(mask: Tensor, *, context: bool) -> Tensor:
    seen, hidden = torch.ones_like(mask, dtype=torch.bool), mask.shape[1] // 3
    seen[1, :hidden] = False
    if context:
        seen[2, mask.shape[1] - hidden :] = False
    return seen


def compare_steps(
    made: Decoder, step: Closed, of: Text, session: Filled, locate: Locate, *, singly: bool, briefly: bool = False
) -> list[Compared]:
    """Run the file in pieces. Raises ExportError if its logits are not those of the full forward.

    ``singly``: behind a prefill it takes several samples or several tokens, not both. ``briefly``: one batch and one
    way to cut the text.
    """
    found: list[Compared] = []
    first = 1 if briefly or session.reference else None  # ONNX's reference evaluator is slow
    for batch in _BATCHES[:first]:
        for each in _pieces(of.ids.shape[1])[::-1][:first]:
            pieces = (each[0], *[1] * sum(each[1:])) if singly and batch > 1 else each
            found.append(_compared(made, step, session, of.sample(batch), pieces, locate))
    return found


def _pieces(length: int) -> list[Sequence[int]]:
    """What a text of this length is cut into: as ``_PIECES`` as far as it reaches, or a prefill that leaves a few."""
    fitting: list[Sequence[int]] = [pieces for pieces in _PIECES if sum(pieces) <= length]
    return fitting if len(fitting) == len(_PIECES) or length < 4 else [(length - 3, 1, 2), *fitting]


def _compared(
    made: Decoder, step: Closed, session: Filled, of: Text, pieces: Sequence[int], locate: Locate
) -> Compared:
    got = _logits(step, session, of, pieces)
    expected = of.logits[:, : sum(pieces)]
    error = _difference(of, expected, got)
    tolerance = TOLERANCE.get(expected.dtype, 0.0)
    sizes = {"batch": len(of.ids), "prefill": pieces[0], "steps": sum(pieces[1:]), **of.sizes}
    if not error <= tolerance:
        off, distance, *lucky = _from_float64(of, expected, got)
        allowed = allowed_off(off, expected.dtype, lucky)
        if not distance <= allowed:
            own = _difference(of, expected, _in_torch(made, of, pieces))
            told = _misfit(sizes, (error, own, allowed), (off, distance))
            raise with_place(told, lambda: locate(lambda watched: _logits(step, watched, of, pieces), allowed))
        error = distance
    return Compared(sizes, error, session.reference, "" if of.told.all() else "left")


def _from_float64(of: Text, expected: Tensor, got: Tensor) -> tuple[float, ...]:
    """How far the full forward, the file and draws of rounding are from the model in float64; NaN where that cannot be
    had."""
    known = [x[: len(of.ids), : expected.shape[1]] for x in of.wide()]
    if not known or got.dtype != expected.dtype:
        return float("nan"), float("nan")
    return tuple(_difference(of, known[0], x.double()) for x in (expected, got, *known[1:]))


def _misfit(sizes: Mapping[str, int], errors: tuple[float, float, float], wide: tuple[float, float]) -> ExportError:
    (error, own, allowed), (off, distance) = errors, wide
    known = "" if off != off else f"; from float64 torch is {off:.3g} off, ONNX Runtime {distance:.3g}"
    return ExportError(
        "decode.onnx does not compute what the model does",
        where=", ".join(f"{name} {size}" for name, size in sizes.items()),
        found=f"logits that differ by {error:.3g} of the largest; those of the decoder in torch by {own:.3g}{known}",
        expected=f"at most {allowed:.3g}",
        do="please report it with the model's code",
    )


def _difference(of: Text, expected: Tensor, got: Tensor) -> float:
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return float("inf")
    seen = of.told[:, : expected.shape[1]]  # what a model computes at padding is of no use, and differs
    return difference(expected[seen], got[seen])


def _logits(step: Closed, session: Filled, of: Text, pieces: Sequence[int]) -> Tensor:
    """The logits of the file, piece by piece."""
    names, placeholders = input_names(step), step.program.placeholders
    states, context = before_first(step, len(of.ids)), contexts(step, of)
    parts: list[Tensor] = []
    for start, end in pairwise(accumulate((0, *pieces))):
        feeds = {step.tokens: of.ids[:, start:end], **context}
        for node, captured in step.given.items():
            feeds[node] = of.values[captured][:, (0 if node is step.mask else start) : end]
        if step.mask is not None and step.counted:
            feeds[step.mask] = torch.ones(len(of.ids), end, dtype=torch.int64)
        feeds.update({held.source: x for held, x in zip(step.held, states, strict=True)})
        logits, *states = session.run(names, [feeds[node] for node in placeholders])
        parts.append(logits)
    return torch.cat(parts, 1)


def contexts(step: Closed, of: Text) -> dict[fx.Node, Tensor]:
    """What the steps read of the inputs that are no tokens, by the inputs of the file."""
    found = of.encode(of.values) if step.context else {}
    return {made: found[captured] for captured, made in step.context.items()}


def before_first(step: Closed, batch: int) -> list[Tensor]:
    """The states before the first token."""
    found: list[Tensor] = []
    for held in step.held:
        value: Tensor = held.source.meta["val"]
        shape = [0 if axis == held.grows else _number(size, batch) for axis, size in enumerate(value.shape)]
        fill = 0.0 if held.slot is None else held.slot.fill
        found.append(torch.full(shape, fill, dtype=value.dtype))
    return found


def _number(size: Any, batch: int) -> int:
    """A size of a state, in which nothing but the batch is free."""
    found = expression(size)
    return int(found.xreplace(dict.fromkeys(found.free_symbols, batch)))


def _in_torch(made: Decoder, of: Text, pieces: Sequence[int]) -> Tensor:
    """The logits of the derived decoder itself."""
    context = {node.name: of.values[node] for node in made.plan.inputs.context}
    state = made.init_state(len(of.ids), capacity=sum(pieces), context=context)
    parts: list[Tensor] = []
    for start, end in pairwise(accumulate((0, *pieces))):
        values = {n.name: of.values[n][:, start:end] for n in made.plan.inputs.history}
        logits, state = made.prefill(of.ids[:, start:end], state, **values)
        parts.append(logits)
    return torch.cat(parts, 1)
