"""Generation: from a prompt to new tokens, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch

from gatecc.decoder.runtime.state import State
from gatecc.errors import ArgumentError

Stream = Callable[[torch.Tensor], object]


class _Steps(Protocol):
    def prefill(
        self, ids: torch.Tensor, state: State | None = None, **values: torch.Tensor
    ) -> tuple[torch.Tensor, State]: ...

    def step(self, ids: torch.Tensor, state: State, **values: torch.Tensor) -> tuple[torch.Tensor, State]: ...


class Generation:
    """Generation by prefill and step, which the class that inherits it defines."""

    def generate(
        self: _Steps,
        ids: torch.Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | Collection[int] = (),
        stream: Stream | None = None,
        generator: torch.Generator | None = None,
        state: State | None = None,
        **values: torch.Tensor,
    ) -> torch.Tensor:
        """Continue prompts. ids: (B, N) -> (B, N + new), at most ``max_new_tokens`` new ones.

        Temperature 0 takes the best token; above, tokens are drawn from the ``top_k`` best, and of these from the
        smallest set that holds the probability ``top_p``. A sample that has yielded a token of ``stop`` is done: that
        token is repeated until all are. ``stream`` is called with the new tokens (B,) of each step. Prompts of several
        lengths are padded on either side and take an ``attention_mask``. ``state`` continues a text whose last tokens
        are ``ids``. Raises ArgumentError for options out of range.
        """
        _check(max_new_tokens, temperature, top_k, top_p)
        stops = torch.tensor(sorted({stop} if isinstance(stop, int) else set(stop)), device=ids.device)
        new: list[torch.Tensor] = []
        done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        if not max_new_tokens:
            return ids
        prompts, values = _ending_together(ids, values)
        logits, state = self.prefill(prompts, state, **values)
        last = logits[:, -1]
        while True:
            token = choose(last, temperature, top_k, top_p, generator)
            if new and len(stops):
                token = torch.where(done, new[-1], token)
            new.append(token)
            if stream is not None:
                stream(token)
            if len(stops):
                done |= torch.isin(token, stops)
            if len(new) == max_new_tokens or (len(stops) and bool(done.all())):
                return torch.cat([ids, torch.stack(new, 1)], 1)
            last, state = self.step(token, state)


def _ending_together(
    ids: torch.Tensor, values: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prompts with the padding behind their tokens moved before them, and so what belongs to each token."""
    mask = values.get("attention_mask")
    if mask is None or mask.shape != ids.shape or bool(mask[:, -1].bool().all()):
        return ids, values
    behind = mask.bool().flip(1).long().argmax(1)
    places = (torch.arange(ids.shape[1], device=ids.device) - behind[:, None]) % ids.shape[1]
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return ids[rows, places], {k: x[rows, places] if x.shape[:2] == ids.shape else x for k, x in values.items()}


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    checks: tuple[tuple[str, Any, bool, str], ...] = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
        ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, up to 1"),
    )
    for name, found, held, expected in checks:
        if not held:
            raise ArgumentError(f"{name} is out of range", found=str(found), expected=expected)
    if temperature == 0 and (top_k or top_p):
        raise ArgumentError(
            "top_k and top_p choose among tokens that are drawn",
            found="temperature=0, which takes the best one",
            do="pass temperature=1.0",
        )


def choose(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """The next token of every sample. logits: (B, V) -> (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Nucleus sampling (Holtzman et al., 2020): nothing but the most likely tokens that together reach ``top_p``."""
    ordered, places = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, places, kept)
