"""What a mask is, proved by evaluating it: every kind, in every spelling, and no guess where it cannot be known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.capture import capture
from gatecc.ir.mask import Mask
from gatecc.ir.match.attention.walk import match_attention
from gatecc.pipeline import canonical_form

B, H, N, E = 2, 2, 7, 4

Build = Callable[..., Tensor]


class Masked(nn.Module):
    """SDPA under a mask that ``build`` makes of the queries and of further inputs."""

    def __init__(self, build: Build, table: Tensor | None = None) -> None:
        super().__init__()
        self.build = build
        if table is not None:
            self.register_buffer("table", table)

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        table = (self.table,) if hasattr(self, "table") else ()
        return F.scaled_dot_product_attention(x, x, x, attn_mask=self.build(x, *table, *inputs))


def proved(module: nn.Module, *inputs: Tensor, dynamic: bool = True) -> Mask:
    program = capture(module, (torch.randn(B, H, N, E), *inputs), dynamic="auto" if dynamic else "none")
    canonical_form(program)
    (site,), refusals = match_attention(program)
    assert not refusals
    return site.mask


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(x.shape[2])
    return place[:, None], place[None]


# --- without inputs ---------------------------------------------------------------------------------------------------


def causal(x: Tensor) -> Tensor:
    query, key = positions(x)
    return key <= query


def window(width: int) -> Build:
    return lambda x: causal(x) & (positions(x)[0] - positions(x)[1] < width)


def alibi(x: Tensor) -> Tensor:
    query, key = positions(x)
    slopes = torch.tensor([0.5, 1.0])[:, None, None]
    return (slopes * (key - query)).masked_fill(~causal(x), torch.finfo(x.dtype).min)


def written(x: Tensor) -> Tensor:
    """A mask that is filled in place, part by part."""
    mask = torch.zeros(x.shape[2], x.shape[2])
    mask[:, 1:] = -torch.inf
    return torch.triu(mask, 1) + causal(x).logical_not() * -1e9


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda x: torch.zeros(x.shape[2], x.shape[2]), "bidirectional"),
        (lambda x: torch.ones(x.shape[2], x.shape[2], dtype=torch.bool), "bidirectional"),
        (causal, "causal"),
        (lambda x: torch.ones(x.shape[2], x.shape[2]).tril().bool(), "causal"),
        (lambda x: torch.full((x.shape[2], x.shape[2]), -torch.inf).triu(1), "causal"),
        (lambda x: (1 - causal(x).float()) * -1e4, "causal"),
        (lambda x: torch.zeros(1, 1, 1, 1).where(causal(x), torch.finfo(x.dtype).min), "causal"),
        (written, "causal"),
        (window(1), "sliding_window(1)"),
        (window(3), "sliding_window(3)"),
        (window(9), "sliding_window(9)"),
        (window(300), "sliding_window(300)"),
        (window(1 << 17), "sliding_window(131072)"),
        (alibi, "causal+bias"),
        # A random bias proves nothing; what an `or` covers is not looked at.
        (lambda x: torch.randn(3, 3)[:1, :1] * 0 - (positions(x)[0] - positions(x)[1]).abs(), "unknown"),
        (lambda x: (causal(x) & torch.tensor([True, False])[:, None, None]) | causal(x), "causal"),
    ],
)
def test_kinds(build: Build, kind: str) -> None:
    assert str(proved(Masked(build))) == kind


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda x: (positions(x)[0] - positions(x)[1]).abs() < 3, "to either side"),
        (lambda x: causal(x) & (positions(x)[0] // 3 == positions(x)[1] // 3), "without a name"),
        (lambda x: causal(x).mT, "without a name"),
    ],
)
def test_patterns_that_have_no_name(build: Build, reason: str) -> None:
    mask = proved(Masked(build))
    assert mask.kind == "unknown"
    assert reason in mask.reason


def test_heads_that_differ() -> None:
    mask = proved(Masked(lambda x: causal(x) | torch.tensor([True, False])[:, None, None]))
    assert mask.kind == "unknown"
    assert "differs" in mask.reason


def test_a_kind_that_changes_with_the_length() -> None:
    mask = proved(Masked(lambda x: causal(x) | (positions(x)[1] < 9)))
    assert mask.kind == "unknown"


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_is_read_to_its_end() -> None:
    """GPT-2's buffer, and one that hides a window beyond the lengths that are tried first."""
    distance = torch.arange(64)[:, None] - torch.arange(64)
    cut: Build = lambda x, table: table[: x.shape[2], : x.shape[2]]  # noqa: E731
    assert str(proved(Masked(cut, distance >= 0))) == "causal"
    assert str(proved(Masked(cut, (distance >= 0) & (distance < 40)))) == "sliding_window(40)"


def test_a_fixed_length_is_said() -> None:
    mask = proved(Masked(causal), dynamic=False)
    assert mask.kind == "causal"
    assert "fixed at 7" in mask.reason


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_padding() -> None:
    tokens = torch.ones(B, N, dtype=torch.bool)
    assert str(proved(Masked(lambda x, keep: keep[:, None, None]), tokens)) == "bidirectional+padding"
    assert str(proved(Masked(lambda x, keep: keep[:, None, None] & causal(x)), tokens)) == "causal+padding"
    assert str(proved(Masked(lambda x, drop: ~drop[:, None, None]), ~tokens)) == "bidirectional+padding"
    numbers: Build = lambda x, keep: (1.0 - keep[:, None, None].to(x.dtype)) * -10000.0  # noqa: E731
    assert str(proved(Masked(numbers), tokens.long())) == "bidirectional+padding"
    assert str(proved(Masked(numbers), tokens.float())) == "bidirectional+padding"


class Cross(nn.Module):
    """Queries of one sequence, keys of another, some of which are padding."""

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, memory, memory, attn_mask=mask.bool()[:, None, None])


def test_padding_of_another_sequence() -> None:
    """Integers might be numbers of packed texts too: that is tried, though queries here have no such number."""
    mask = proved(Cross(), torch.randn(B, H, N + 2, E), torch.ones(B, N + 2, dtype=torch.int64))
    assert (mask.kind, mask.padding) == ("bidirectional", True)


def test_padding_that_spares_empty_rows() -> None:
    """transformers makes rows visible that would see nothing."""

    def build(x: Tensor, keep: Tensor) -> Tensor:
        mask = keep[:, None, None] & causal(x)
        return mask | ~mask.any(-1, keepdim=True)

    assert str(proved(Masked(build), torch.ones(B, N, dtype=torch.bool))) == "causal+padding"


def test_padding_that_sees_itself() -> None:
    """gatecc's own windows leave each row a key."""

    def build(x: Tensor, keep: Tensor) -> Tensor:
        own = torch.eye(x.shape[-2], dtype=torch.bool)
        return keep[:, None, None] & window(3)(x) | own

    assert str(proved(Masked(build), torch.ones(B, N, dtype=torch.bool))) == "sliding_window(3)+padding"


def test_packed_by_positions() -> None:
    def build(x: Tensor, ids: Tensor) -> Tensor:
        text = (ids.diff(dim=-1, prepend=ids[:, :1] - 1) != 1).cumsum(-1)
        return causal(x) & (text[:, None, :, None] == text[:, None, None])

    assert str(proved(Masked(build), torch.arange(N).expand(B, N).clone())) == "packed"


def test_packed_by_numbers() -> None:
    same: Build = lambda x, text: causal(x) & (text[:, None, :, None] == text[:, None, None])  # noqa: E731
    assert str(proved(Masked(same), torch.zeros(B, N, dtype=torch.int64))) == "packed"


@pytest.mark.parametrize(
    ("build", "inputs", "reason"),
    [
        (
            lambda x, mask: mask,
            (torch.ones(N, N, dtype=torch.bool),),
            "values of the input inputs|it is the input inputs",
        ),
        (
            lambda x, mask: causal(x) & mask,
            (torch.ones(B, H, N, N, dtype=torch.bool),),
            "values of the input inputs|it is the input inputs",
        ),
        (lambda x: x.sum(-1)[:, :, None] > 0, (), "activations|input x"),
        (lambda x: (x @ x.mT) > 0, (), "activations"),
        (lambda x: torch.rand(N, N) > 0.5, (), "rand"),
        (
            lambda x, kind: causal(x) | (kind[:, None, None] == kind[:, None, :, None]),
            (torch.zeros(B, N).long(),),
            "values",
        ),
    ],
)
def test_what_depends_on_data_is_unknown(build: Build, inputs: tuple[Tensor, ...], reason: str) -> None:
    mask = proved(Masked(build), *inputs)
    assert mask.kind == "unknown"
    assert any(part in mask.reason for part in reason.split("|")), mask.reason


# --- spelled out ------------------------------------------------------------------------------------------------------


class Written(nn.Module):
    """softmax(edit(q k^T)) v, weights zeroed after the softmax."""

    def __init__(self, edit: Build, after: Build | None = None) -> None:
        super().__init__()
        self.edit, self.after = edit, after

    def forward(self, x: Tensor) -> Tensor:
        weights = self.edit(x @ x.mT, x).softmax(-1)
        return (weights if self.after is None else self.after(weights, x)) @ x


def test_content_does_not_matter_and_decisions_on_it_are_refused() -> None:
    assert str(proved(Written(lambda s, x: s.masked_fill(~causal(x), -torch.inf)))) == "causal"
    assert str(proved(Written(lambda s, x: s + (x @ x.mT).flip(-1)))) == "bidirectional+bias"
    mask = proved(Written(lambda s, x: s.masked_fill(s < 0, -torch.inf)))
    assert mask.kind == "unknown"
    assert "activations" in mask.reason


def test_masks_after_the_softmax() -> None:
    assert str(proved(Written(lambda s, x: s, lambda w, x: w.masked_fill(~causal(x), 0.0)))) == "causal"
    assert str(proved(Written(lambda s, x: s, lambda w, x: w * causal(x)))) == "causal"


def test_a_view_that_is_written_to() -> None:
    def edit(s: Tensor, x: Tensor) -> Tensor:
        s[..., 1:].masked_fill_(~causal(x)[:, 1:], -torch.inf)
        return s

    assert str(proved(Written(edit))) == "causal"


def test_nothing_random_happens_and_the_generator_stays() -> None:
    program = capture(Masked(alibi), (torch.randn(B, H, N, E),))
    canonical_form(program)
    before = torch.get_rng_state()
    match_attention(program)
    assert torch.equal(torch.get_rng_state(), before)
