"""Thinking: answers of a model that thinks in mixtures of tokens, and what reads them again (HRPO)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.passes.loop.think import Thinking as Thinking


class _Thinks(Protocol):
    def prefill(self, ids: Tensor) -> tuple[Tensor, dict[str, Any]]: ...

    def step(self, ids: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]: ...

    def thoughts(self, ids: Tensor, state: dict[str, Any]) -> list[Tensor]: ...


class Rollout(NamedTuple):
    """``ids`` (B, N): prompts and what followed; ``soft`` (B, N, C): what each token was mixed with, 0 in prompts;
    ``log_probs`` (B, new): of the tokens drawn, 0 behind a token that stops."""

    ids: Tensor
    soft: Tensor
    log_probs: Tensor


def rollout(
    decoder: _Thinks,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Rollout:
    """Continue prompts ids (B, N) by drawn tokens (``temperature`` 0: the best), and keep what each was mixed with.

    ``decoder`` is that of a model with `hrpo`. ``model(rollout.ids, soft=rollout.soft)`` yields the same logits in one
    forward, for a loss on them. Behind a token of ``stop`` a sample repeats it. Raises ArgumentError for a decoder that
    carries no thoughts.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ArgumentError(
            "a rollout draws tokens",
            found=f"max_new_tokens={max_new_tokens}, temperature={temperature}",
            expected="max_new_tokens >= 1, temperature >= 0",
        )
    with torch.no_grad():
        logits, state = decoder.prefill(ids)
        last, done = logits[:, -1], torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        tokens, rows, found = list[Tensor](), list[Tensor](), list[Tensor]()
        stops = torch.tensor(sorted(stop), dtype=ids.dtype, device=ids.device)
        for number in range(max_new_tokens):
            scores = torch.log_softmax(last.float() / (temperature or 1.0), -1)
            drawn = torch.multinomial(scores.exp(), 1, generator=generator)[:, 0] if temperature else last.argmax(-1)
            drawn = torch.where(done, tokens[-1], drawn) if tokens else drawn
            found.append(torch.where(done, 0.0, scores.gather(1, drawn[:, None])[:, 0]))
            tokens.append(drawn)
            rows += [_one(decoder.thoughts(drawn[:, None], state))[:, 0]]
            done = done | torch.isin(drawn, stops)
            if number + 1 < max_new_tokens:
                last, state = decoder.step(drawn, state)
        thought = torch.stack(rows, 1)
        before = thought.new_zeros(*ids.shape, thought.size(-1))
    return Rollout(torch.cat([ids, torch.stack(tokens, 1)], 1), torch.cat([before, thought], 1), torch.stack(found, 1))


def _one(thoughts: list[Tensor]) -> Tensor:
    if len(thoughts) != 1:
        raise ArgumentError(
            "the decoder carries no thoughts",
            found=f"{len(thoughts)} carried inputs",
            expected='the decoder of a model with the recipe "hrpo"',
        )
    return thoughts[0]
