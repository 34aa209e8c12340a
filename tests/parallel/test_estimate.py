"""estimate: bytes of exchanges as two processes were seen to send them; the rest by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gatecc.errors import ArgumentError
from gatecc.parallel.estimate import Layers, Machine, Sizes, compare, estimate, others
from tests.parallel.worker import DISPATCHERS, EXPERTS, SLOTS, WIDTH, upcycled

MIXTRAL = Sizes((Layers(32, 8, 2, 4096, 4096, 8 * 3 * 4096 * 14336),), 1_600_000_000)


@pytest.mark.broad(3)
@pytest.mark.parametrize("name", DISPATCHERS)
def test_bytes_are_those_that_two_processes_sent(name: str, ranks: list[dict[str, Any]]) -> None:
    """Every pair of experts was asked for once, so that the mean over all is that of these tokens."""
    sizes = Sizes((Layers(1, EXPERTS, SLOTS, WIDTH, WIDTH, 1),), 0, element=2)
    expected = estimate(sizes, len(ranks), "ep", dispatcher=name)
    for found in ranks:
        assert found[f"{name} bytes"] == pytest.approx([expected.forward, expected.backward])


def test_ranks_that_a_token_goes_to() -> None:
    """By drawing sets of experts; k = 1 and one expert a rank are plain."""
    layer = Layers(1, 8, 3, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(20000, 8, generator=generator).argsort(1)[:, :3] // 2
    seen = torch.stack([(chosen == rank).any(1) for rank in range(1, 4)]).float().sum(0).mean()
    assert others(layer, 4) == pytest.approx(float(seen), rel=0.01)
    assert others(Layers(1, 8, 1, 1, 1, 1), 8) == pytest.approx(7 / 8)
    assert others(layer, 1) == 0


def test_a_model_is_read() -> None:
    model = upcycled()
    sizes = Sizes.of(model, SLOTS)
    bank = EXPERTS * (32 * 16 + 32 + 16 * 32 + 16)
    assert [(n.experts, n.slots, n.width, n.out, n.parameters) for n in sizes.layers] == [(4, 2, 16, 16, bank)] * 2
    assert sizes.experts + sizes.others == sum(p.numel() for p in model.parameters())
    assert sizes.active == sizes.others + sizes.experts / 2
    assert sizes.element == 4


def test_memory() -> None:
    """Weights, gradients and 12 bytes of optimizer for each element that a rank holds."""
    total = MIXTRAL.others + MIXTRAL.experts
    assert estimate(MIXTRAL, 8, "replicate").held == total * 16
    assert estimate(MIXTRAL, 8, "ep").held == (MIXTRAL.others + MIXTRAL.experts / 8) * 16
    layer = MIXTRAL.layers[0].parameters
    assert estimate(MIXTRAL, 8, "fsdp").held == total / 8 * 16 + layer * 2
    assert estimate(MIXTRAL, 64, "ep+fsdp").held == total / 64 * 16 + layer / 8 * 2
    assert estimate(MIXTRAL, 64, "ep+fsdp").expert_ranks == 8
    assert estimate(MIXTRAL, 8, "replicate").kept == 0


def test_bytes_of_a_step() -> None:
    total = MIXTRAL.others + MIXTRAL.experts
    assert estimate(MIXTRAL, 8, "replicate").step == 2 * 2 * total * 7 / 8
    assert estimate(MIXTRAL, 8, "fsdp").step == 3 * 2 * total * 7 / 8
    assert estimate(MIXTRAL, 8, "ep").step == 2 * 2 * MIXTRAL.others * 7 / 8
    both = estimate(MIXTRAL, 16, "ep+fsdp")
    assert both.step == 3 * 2 * (MIXTRAL.others * 15 / 16 + MIXTRAL.experts / 8 * 1 / 2)
    assert both.sent == both.tokens * (both.forward + both.backward) + both.step
    assert estimate(MIXTRAL, 1, "ep").sent == 0


def test_what_can_be_compared() -> None:
    """On one rank all are the same; 1,000 ranks share a divisor of 8 with 8 experts."""
    assert [found.strategy for found, *_ in compare(MIXTRAL, 1)] == ["replicate"]
    rows = {found.strategy: (found, compute, send, fits) for found, compute, send, fits in compare(MIXTRAL, 1000)}
    assert rows["ep+fsdp"][0].expert_ranks == 8
    assert rows["ep+fsdp"][3]
    assert not rows["replicate"][3]
    assert not estimate(MIXTRAL, 8, "ep").fits(Machine(memory=1e9))


def test_what_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"(?s)do not divide.*3 of 8 ranks.*divisor of 8"):
        estimate(MIXTRAL, 8, "ep", expert_ranks=3)
    with pytest.raises(ArgumentError, match="strategy"):
        estimate(MIXTRAL, 8, "tp")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError, match="dispatcher"):
        estimate(MIXTRAL, 8, "ep", dispatcher="deepep")
