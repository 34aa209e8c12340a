"""steps: decode.onnx against one full forward of torch, after prefills and steps of several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from gatecc.capture import signature
from gatecc.codegen.onnx.packages import RUNTIME, has
from gatecc.codegen.onnx.runtime import Session
from gatecc.decoder import Decoder
from gatecc.decoder.emit.closed import Closed
from gatecc.decoder.emit.names import input_names
from gatecc.errors import ExportError
from gatecc.export.carried import Carried
from gatecc.export.compare import TOLERANCE, Compared
from gatecc.ir.sizes import expression
from gatecc.scope.family import difference

_PIECES = ((64, 1, 1, 4), (7, 1, 5, 1), (1, 1, 1, 1, 3))  # tokens of a prefill, and of the steps behind it
_BATCHES = (3, 1)
_TIMES = 10  # as far from the full forward as the derived decoder in torch, in so many of its own distances ...
_MOST = {torch.float32: 1e-2, torch.float16: 1e-1}  # ... up to this one


@dataclass(frozen=True, eq=False)
class Text:
    """Example tokens with what the model computes for all of them at once. ``values`` are those of the other inputs,
    by the captured nodes that they are."""

    ids: Tensor
    values: dict[fx.Node, Tensor]
    logits: Tensor

    def sample(self, batch: int) -> Text:
        """The first samples alone."""
        values = {node: x[:batch] for node, x in self.values.items()}
        return Text(self.ids[:batch], values, self.logits[:batch])


class Filled:
    """A session that is given zeros for states that nothing needs, and keeps them to itself."""

    def __init__(self, session: Session, unread: Sequence[Carried]) -> None:
        self._session, self._unread = session, unread

    def run(self, names: Sequence[str], leaves: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, of which the first are the tokens."""
        batch = leaves[0].shape[0]
        shapes = [[batch, *map(int, state.shape[1:])] for state in self._unread]
        zeros = [
            torch.zeros(shape, dtype=getattr(torch, state.dtype))
            for shape, state in zip(shapes, self._unread, strict=True)
        ]
        found = self._session.run([*names, *(state.input for state in self._unread)], [*leaves, *zeros])
        return found[: len(found) - len(zeros)]


def text(made: Decoder, step: Closed, model: nn.Module, inputs: tuple[Any, Any]) -> Text:
    """A text of the longest length that is compared, padded on the left where the model takes a mask."""
    plan = made.plan
    length = made.reach(max(map(sum, _PIECES)))
    length = length if step.capacity is None else min(length, step.capacity)
    example = dict(zip(plan.program.placeholders, plan.program.example, strict=True))
    values = {node: _resized(x, plan.inputs, node, length) for node, x in example.items()}
    ids = values[plan.inputs.tokens]
    with torch.no_grad():
        args, kwargs = signature.rebuild(inputs, iter(values.values()))
        logits = tree_leaves(model(*args, **kwargs))[plan.output]
    return Text(ids, {n: x for n, x in values.items() if n is not plan.inputs.tokens}, logits)


def _resized(x: Tensor, inputs: Any, node: fx.Node, length: int) -> Tensor:
    """An input for the largest batch and this length: tokens are drawn, of the mask the second row is padded."""
    rows = max(_BATCHES)
    if node is inputs.tokens:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(int(x.max()) + 1, (rows, length, *x.shape[2:]), generator=generator)
        return drawn.to(x.device, x.dtype)
    x = x.index_select(0, torch.arange(rows, device=x.device) % len(x))
    if node not in inputs.history:
        return x
    if node.name.endswith("attention_mask"):
        x = x.new_ones(rows, length)
        x[1, : length // 3] = 0
        return x
    if node.name == "position_ids":
        return torch.arange(length, device=x.device, dtype=x.dtype).expand(rows, -1)
    return x.index_select(1, torch.arange(length, device=x.device) % x.shape[1])


def compare_steps(made: Decoder, step: Closed, of: Text, session: Filled, *, singly: bool) -> list[Compared]:
    """Run the file in pieces. Raises ExportError if its logits are not those of the full forward.

    ``singly``: behind a prefill it takes several samples or several tokens, not both.
    """
    found: list[Compared] = []
    first = None if has(*RUNTIME) else 1  # ONNX's reference evaluator is slow
    for batch in _BATCHES[:first]:
        for each in _pieces(of.ids.shape[1])[::-1][:first]:
            pieces = (each[0], *[1] * sum(each[1:])) if singly and batch > 1 else each
            found.append(_compared(made, step, session, of.sample(batch), pieces))
    return found


def takes_padding(step: Closed, of: Text, session: Filled) -> bool:
    """Whether prompts of several lengths, padded on the right, give what each gives by itself, and so do the tokens
    that follow them."""
    rows, length = of.ids.shape[0], min(20, of.ids.shape[1] - 3)
    if length < rows or not step.counted or step.given or any(held.grows is None for held in step.held):
        return False
    lengths = torch.tensor([length // (row + 1) for row in range(rows)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids, states = of.ids[:, :length], before_first(step, rows)
    tolerance = TOLERANCE.get(of.logits.dtype, 0.0)
    for number in range(3):
        feeds = {step.tokens: ids, **({} if step.mask is None else {step.mask: mask})}
        feeds.update({held.source: x for held, x in zip(step.held, states, strict=True)})
        logits, *states = session.run(input_names(step), [feeds[node] for node in step.program.placeholders])
        last = lengths - 1 if number == 0 else torch.zeros_like(lengths)
        each = torch.arange(rows)
        if not difference(of.logits[each, lengths + number - 1], logits[each, last]) <= tolerance:
            return False
        ids, mask = of.ids[each, lengths + number].unsqueeze(1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return True


def _pieces(length: int) -> list[Sequence[int]]:
    """What a text of this length is cut into: as ``_PIECES`` as far as it reaches, or a prefill that leaves a few."""
    fitting: list[Sequence[int]] = [pieces for pieces in _PIECES if sum(pieces) <= length]
    return fitting if len(fitting) == len(_PIECES) or length < 4 else [(length - 3, 1, 2), *fitting]


def _compared(made: Decoder, step: Closed, session: Filled, of: Text, pieces: Sequence[int]) -> Compared:
    got = _logits(step, session, of, pieces)
    expected = of.logits[:, : sum(pieces)]
    error = _difference(step, of, expected, got)
    tolerance = TOLERANCE.get(expected.dtype, 0.0)
    sizes = {"batch": len(of.ids), "prefill": pieces[0], "steps": sum(pieces[1:])}
    if not error <= tolerance:
        own = _difference(step, of, expected, _in_torch(made, of, pieces))
        allowed = max(tolerance, _TIMES * own) if own <= _MOST.get(expected.dtype, 0.0) else tolerance
        if not error <= allowed:
            raise ExportError(
                "decode.onnx does not compute what the model does",
                where=", ".join(f"{name} {size}" for name, size in sizes.items()),
                found=f"logits that differ by {error:.3g} of the largest; those of the decoder in torch by {own:.3g}",
                expected=f"at most {allowed:.3g}",
                do="please report it with the model's code",
            )
    return Compared(sizes, error)


def _difference(step: Closed, of: Text, expected: Tensor, got: Tensor) -> float:
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return float("inf")
    mask = next((x for n, x in of.values.items() if step.mask is not None and step.given.get(step.mask) is n), None)
    if mask is not None:  # what a model computes at padding is of no use, and differs
        seen = mask[:, : expected.shape[1]].bool()
        expected, got = expected[seen], got[seen]
    return difference(expected, got)


def _logits(step: Closed, session: Filled, of: Text, pieces: Sequence[int]) -> Tensor:
    """The logits of the file, piece by piece."""
    names, placeholders = input_names(step), step.program.placeholders
    states = before_first(step, len(of.ids))
    parts: list[Tensor] = []
    for start, end in pairwise(accumulate((0, *pieces))):
        feeds = {step.tokens: of.ids[:, start:end]}
        for node, captured in step.given.items():
            feeds[node] = of.values[captured][:, (0 if node is step.mask else start) : end]
        if step.mask is not None and step.counted:
            feeds[step.mask] = torch.ones(len(of.ids), end, dtype=torch.int64)
        feeds.update({held.source: x for held, x in zip(step.held, states, strict=True)})
        logits, *states = session.run(names, [feeds[node] for node in placeholders])
        parts.append(logits)
    return torch.cat(parts, 1)


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
    state = made.init_state(len(of.ids), capacity=sum(pieces))
    parts: list[Tensor] = []
    for start, end in pairwise(accumulate((0, *pieces))):
        values = {n.name: of.values[n][:, start:end] for n in made.plan.inputs.history}
        logits, state = made.prefill(of.ids[:, start:end], state, **values)
        parts.append(logits)
    return torch.cat(parts, 1)
