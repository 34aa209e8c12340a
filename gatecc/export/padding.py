"""padding: prompts of several lengths in one batch, which decode.onnx takes padded on the right.

Its attention counts the tokens of each row. That is what a model says if padding changes nothing of what its tokens
give: then a prompt that is padded on the left may be moved to the right as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from gatecc.decoder.emit.closed import Closed
from gatecc.decoder.emit.names import input_names
from gatecc.decoder.plan import Plan
from gatecc.export.compare import TOLERANCE
from gatecc.export.steps import Text, before_first, contexts, forward
from gatecc.scope.family import difference

_PROMPT, _BEHIND = 20, 3  # the longest prompt, and the tokens that follow it


class Runs(Protocol):
    """What runs a step: a file, or torch."""

    def run(self, names: Sequence[str], leaves: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs."""
        ...


def tokens_first(mask: Tensor) -> Tensor:
    """Where each place of a row is taken from, so that its tokens come first. (B, N) -> (B, N)

    Rows whose tokens are beside one another are turned, so that the way back is a turn as well.
    """
    return (torch.arange(mask.shape[1]) + mask.argmax(1)[:, None]) % mask.shape[1]


def differs(step: Closed, plan: Plan, model: nn.Module, inputs: tuple[Any, Any], of: Text) -> str:
    """Why attention may not count the tokens of each row in the place of the model's mask; "" if it may.

    ``of`` is a text without padding. In torch, padded on the left and on the right, each row must give what it gives
    without.
    """
    for side in ("left", "right"):
        if not _is_passed_over(step, plan, model, inputs, of, side):
            return f"padding on the {side} changes what the model computes at the tokens"
    return ""


def _is_passed_over(step: Closed, plan: Plan, model: nn.Module, inputs: tuple[Any, Any], of: Text, side: str) -> bool:
    """Whether the model gives for padded rows what it gives for their tokens alone."""
    assert step.mask is not None
    rows, length = of.ids.shape[:2]
    hidden = torch.tensor([row * length // (2 * rows) for row in range(rows)])
    offset, at = hidden if side == "left" else torch.zeros_like(hidden), torch.arange(length)
    mask = (at >= offset[:, None]) & (at < (length - hidden + offset)[:, None])
    source = (at - offset[:, None]) % length
    values = {node: _along(x, source) if node in step.given.values() else x for node, x in of.values.items()}
    captured = step.given[step.mask]
    values[captured] = mask.to(of.values[captured].dtype)
    found = forward(plan, model, inputs, _along(of.ids, source), values)
    expected, mask = _along(of.logits, source), mask & _along(of.told, source)
    return difference(expected[mask], found[mask]) <= TOLERANCE.get(expected.dtype, 0.0)


def _along(x: Tensor, source: Tensor) -> Tensor:
    """The entries of each row from these places."""
    return x[torch.arange(len(x))[:, None], source]


def takes_padding(step: Closed, of: Text, session: Runs) -> bool:
    """Whether prompts of several lengths, padded on the right, give what each gives by itself, and so do the tokens
    that follow them."""
    rows, length = of.ids.shape[0], min(_PROMPT, of.ids.shape[1] - _BEHIND)
    fixed = any(held.grows is None for held in step.held)
    if length < rows or not step.ragged or step.mask is None or (step.counted and (step.given or fixed)):
        return False
    lengths = torch.tensor([length // (row + 1) for row in range(rows)])
    at = torch.arange(length).expand(rows, -1)
    seen, mask = at < lengths[:, None], (at < lengths[:, None]).long()
    states = before_first(step, rows)
    for number in range(_BEHIND):
        feeds = {step.tokens: _along(of.ids, at), **contexts(step, of), **_given(step, of, at)}
        feeds[step.mask] = mask.to(step.mask.meta["val"].dtype)
        feeds.update({held.source: x for held, x in zip(step.held, states, strict=True)})
        logits, *states = session.run(input_names(step), [feeds[node] for node in step.program.placeholders])
        told = seen & _along(of.told, at)
        error = difference(_along(of.logits, at)[told], logits[told])
        if not error <= TOLERANCE.get(of.logits.dtype, 0.0):
            return False
        at = (lengths + number)[:, None]
        seen, mask = torch.ones_like(at, dtype=torch.bool), torch.cat([mask, torch.ones_like(at)], 1)
    return True


def _given(step: Closed, of: Text, at: Tensor) -> Mapping[fx.Node, Tensor]:
    """The values per token at these places."""
    return {made: _along(of.values[captured], at) for made, captured in step.given.items()}


__all__ = ["differs", "takes_padding", "tokens_first"]
