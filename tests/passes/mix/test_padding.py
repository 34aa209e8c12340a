"""Padding read from a mask however a model spells it: filled, added, subtracted, chosen; before or after causality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import SiteRefusedError
from gatecc.passes.mix.padding import asserted, diagonal, last_row, numbered

KEEP = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
LOW = -1e9


class Spelled(nn.Module):
    """Attention whose mask is spelled by ``steps``: c is causality, the others are padding."""

    def __init__(self, steps: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.steps = steps

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores, hide = q @ k.mT * 0.5, (keep == 0)[:, None, None, :]
        later = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
        for step in self.steps:
            scores = {
                "c": lambda s: s.masked_fill(later, LOW),
                "f": lambda s: s.masked_fill(hide, LOW),
                "w": lambda s: torch.where(hide, torch.full_like(s, LOW), s),
                "W": lambda s: torch.where(~hide, s, LOW),
                "a": lambda s: s + hide.float() * LOW,
                "s": lambda s: s - hide.float() * -LOW,
                "m": lambda s: torch.minimum(s, hide.float() * 2 * LOW - LOW),
                "p": lambda s: s + torch.einsum("q,bhik->bhqk", torch.ones(x.size(1)), hide.float()) * LOW,
                "e": lambda s: s - torch.einsum("kbhq->bhqk", hide.permute(3, 0, 1, 2).float()) * -LOW,
                "x": lambda s: torch.max(s + hide.float() * LOW, torch.tensor(LOW)),
            }[step](scores)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.broad(2)
@pytest.mark.parametrize("steps", ["f", "w", "W", "s", "fc", "cf", "ca", "cw", "cx", "p", "e"])
def test_padding_is_left_out_however_it_is_spelled(steps: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    model: Any = gatecc.transform(Spelled(steps), gatecc.recipe("gla", gate=False, norm=False), (x, KEEP), verify=False)
    with torch.no_grad():
        got, full = model(x, KEEP), torch.ones(1, 3, dtype=torch.long)
        assert torch.allclose(got[0, 2:], model(x[:1, 2:], full)[0], atol=1e-6)
        assert torch.allclose(got[1, :3], model(x[1:, :3], full)[0], atol=1e-6)


def test_a_mask_by_other_operators_is_refused() -> None:
    with pytest.raises(SiteRefusedError, match="padding cannot be told from the mask"):
        gatecc.transform(Spelled("m"), "gla", (torch.randn(2, 5, 8), KEEP))


class Heads(Spelled):
    """Another bias for each head, without an axis for samples, and padding that hides queries as well as keys."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        n = x.size(1)
        scores = q @ k.mT * 0.5 + torch.tensor([0.1, 0.2])[:, None, None] * torch.arange(n).expand(1, 1, n)
        if "c" in self.steps:
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), LOW)
        scores = scores.masked_fill(((keep == 0)[:, None, None] | (keep == 0)[:, None, :, None]), LOW)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("steps", ["", "c"])
def test_a_bias_of_each_head_and_padding_of_both_sides(steps: str) -> None:
    torch.manual_seed(0)
    x, keep = torch.randn(3, 5, 8), torch.cat([KEEP, KEEP[:1]])
    model: Any = gatecc.transform(Heads(steps), gatecc.recipe("gla", gate=False, norm=False), (x, keep), verify=False)
    with torch.no_grad():
        got, full = model(x, keep), torch.ones(1, 3, dtype=torch.long)
        for b, kept in enumerate(keep.bool()):
            assert torch.allclose(got[b, kept], model(x[b : b + 1, kept], full)[0], atol=1e-6)


# --- what stands in the graph -----------------------------------------------------------------------------------------

Q = torch.zeros(2, 2, 5, 4)
TRIANGLE = torch.ones(5, 5, dtype=torch.bool).tril()
SEEN = (KEEP[:, None, None] > 0) & TRIANGLE


@pytest.mark.parametrize(
    ("hows", "masks"),
    [
        (("added",), [SEEN]),
        (("hidden",), [~SEEN]),
        (("subtracted",), [torch.zeros(SEEN.shape).masked_fill(~SEEN, 1e5)]),
        (("added", "seen"), [torch.zeros(2, 1, 1, 5).masked_fill(KEEP[:, None, None] == 0, -1e5), TRIANGLE]),
        (("added",), [SEEN.expand(2, 2, 5, 5).flatten(0, 1)]),
        (("added",), [SEEN[:, 0]]),
    ],
    ids=["boolean", "hidden", "subtracted", "two", "merged", "without heads"],
)
def test_every_form_says_the_same(hows: tuple[str, ...], masks: list[Tensor]) -> None:
    assert torch.equal(last_row(Q, hows, False, *masks), KEEP > 0)
    assert torch.equal(diagonal(Q, hows, False, *masks), KEEP > 0)
    assert torch.equal(numbered(Q, hows, True, 0, False, *masks), KEEP)
    assert torch.equal(asserted(Q, hows, True, True, 0, False, *masks), KEEP)
    assert torch.equal(asserted(Q, hows, False, True, 0, False, *masks), KEEP > 0)


def test_one_mask_for_all_samples_serves_each() -> None:
    assert torch.equal(asserted(Q, ("added",), True, True, 0, False, TRIANGLE), torch.ones(2, 5).long())
