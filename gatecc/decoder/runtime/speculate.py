"""Speculate: a small decoder drafts tokens, a large one reads them all at once and keeps those that it would say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gatecc.decoder.plan import Plan
from gatecc.decoder.runtime.state import State
from gatecc.errors import ArgumentError
from gatecc.passes.exit.rule import AcceptanceRule


class _Reads(Protocol):
    plan: Plan

    def init_state(self, batch: int) -> State: ...

    def prefill(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]: ...


@dataclass(eq=False)
class Speculated:
    """``ids`` (1, N + new): the greedy text of the large model. ``drafted`` and ``kept`` tokens in all, in ``rounds``
    calls of the large model."""

    ids: Tensor
    rounds: int = 0
    drafted: int = 0
    kept: int = 0


def speculate(
    target: _Reads, draft: _Reads, ids: Tensor, new: int, rule: AcceptanceRule | None, bound: int
) -> Speculated:
    """See `Decoder.speculate`."""
    if ids.shape[0] != 1 or ids.dim() != 2 or not ids.shape[1]:
        raise ArgumentError(
            "samples of a batch would keep different numbers of tokens, and a state is of one length",
            found=f"shape {tuple(ids.shape)}",
            expected="one prompt, (1, length)",
        )
    if new < 1 or bound < 1:
        raise ArgumentError(
            "nothing is drafted", found=f"max_new_tokens={new}, bound={bound}", expected="1 or more of each"
        )
    for made in (target, draft):
        if made.plan.inputs.context or made.plan.inputs.carried:
            raise ArgumentError(
                "a draft is of tokens alone",
                found=", ".join(n.name for n in (*made.plan.inputs.context, *made.plan.inputs.carried)),
                expected="decoders without an encoder and without thoughts",
            )
    text, found = ids, Speculated(ids)
    large, small = _Reader(target), _Reader(draft)
    with torch.no_grad():
        while text.shape[1] < ids.shape[1] + new:
            room = min(bound, ids.shape[1] + new - text.shape[1])
            tokens = _drafted(small, text, rule, room)
            said = large.read(text[:, large.length :], tokens).argmax(-1)[:, -1 - tokens.shape[1] :]
            agreed = int((said[:, :-1] == tokens).long().cumprod(1).sum())
            found.rounds, found.drafted, found.kept = (
                found.rounds + 1,
                found.drafted + tokens.shape[1],
                found.kept + agreed,
            )
            text = torch.cat([text, tokens[:, :agreed], said[:, agreed : agreed + 1]], 1)
            large.keep(text, text.shape[1] - 1)
            small.keep(text, text.shape[1] - 1)
    found.ids = text[:, : ids.shape[1] + new]
    return found


def _drafted(small: _Reader, text: Tensor, rule: AcceptanceRule | None, room: int) -> Tensor:
    """The tokens (1, T) that the small model goes on with, T <= room."""
    tokens, scores, unread = list[Tensor](), list[Tensor](), text[:, small.length :]
    while True:
        logits = small.read(unread)[:, -1]
        unread = logits.argmax(-1, keepdim=True)
        if rule is not None:
            scores.append(rule.score(logits.float()))
        tokens.append(unread)
        if len(tokens) == room or (rule is not None and bool(rule.stops(torch.stack(scores, 1)))):
            return torch.cat(tokens, 1)


class _Reader:
    """A decoder and how far it has read. What it read in vain is taken back: by the length of its state where that
    holds keys of all tokens, else by reading again from the last state that was right."""

    def __init__(self, made: _Reads) -> None:
        self.made, self.state = made, made.init_state(1)
        self.exact = all(slot.kind == "keys" and slot.span.window is None for slot in made.plan.slots)
        self.sure: State = self.state

    @property
    def length(self) -> int:
        return int(self.state["length"])

    def read(self, *ids: Tensor) -> Tensor:
        """Read tokens, one or more; their logits (1, T, V)."""
        given = torch.cat(ids, 1)
        logits, self.state = self.made.prefill(given, self.state)
        return logits

    def keep(self, text: Tensor, length: int) -> None:
        """Take back what is behind the first ``length`` tokens of the text."""
        if self.length > length:
            if self.exact:
                self.state["written"].fill_(length)
                self.state = {**self.state, "length": torch.tensor(length)}
            else:
                self.state = self.sure
                self.read(text[:, self.length : length])
        self.sure = self.state
