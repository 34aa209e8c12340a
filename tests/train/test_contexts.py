"""MixER's router: clusters of contexts, experts by loss, a least-squares fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError
from gatecc.recipes import samples
from gatecc.train.contexts import clusters, experts_of, fit_contexts, fitted_routers


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    model, inputs = samples.sequences()
    return gatecc.transform(model, gatecc.recipe("mixer", experts=3), inputs, verify=False)


def families() -> tuple[Tensor, Tensor]:
    """Sequences (30, 6, 16) of three family, and their family."""
    generator = torch.Generator().manual_seed(0)
    family = torch.arange(30) % 3
    centres = 2 * torch.randn(3, 1, 16, generator=generator)
    return centres[family] + 0.1 * torch.randn(30, 6, 16, generator=generator), family


def test_separable_clusters_are_recovered_and_each_takes_the_expert_that_is_best(mixed: nn.Module) -> None:
    x, family = families()
    found = clusters(x.mean(1), 3)
    assert [len(set(found[family == one].tolist())) for one in range(3)] == [1, 1, 1]
    assert len(found.unique()) == 3
    best = torch.tensor([2, 0, 1])
    losses = 1 - torch.nn.functional.one_hot(best[family], 3).float()
    assert torch.equal(experts_of(found, losses), best[family])
    same = torch.zeros(30, 3)  # no expert twice
    assert len(experts_of(found, same).unique()) == 3

    taken = fit_contexts(mixed, x.mean(1), losses)
    assert taken is not None
    assert torch.equal(taken, best[family])
    for router in fitted_routers(mixed).values():
        assert torch.equal(router(x, x)[1].view(30, 6)[:, 0], best[family])
        assert not any(p.requires_grad for p in router.parameters())


def test_an_empty_cluster_changes_nothing(mixed: nn.Module) -> None:
    before = {name: p.clone() for name, p in mixed.named_parameters()}
    assert fit_contexts(mixed, torch.ones(8, 16)) is None
    assert all(torch.equal(p, before[name]) for name, p in mixed.named_parameters())


def test_the_loss_of_each_expert_alone(mixed: nn.Module) -> None:
    x, _ = families()
    before = {name: p.clone() for name, p in mixed.named_parameters()}
    with torch.no_grad():
        down = mixed.get_parameter("blocks.1.mlp.experts.down_proj")
        down[1].mul_(3)
        losses = gatecc.train.expert_losses(mixed, lambda model: model(x).square().mean((1, 2)))
        down[1].copy_(down[0])
    assert losses.shape == (30, 3)
    assert torch.allclose(losses[:, 0], losses[:, 2])
    assert not torch.allclose(losses[:, 0], losses[:, 1])
    assert all(torch.equal(p, before[name]) for name, p in mixed.named_parameters())


def test_what_cannot_be_fitted_is_refused(mixed: nn.Module) -> None:
    with pytest.raises(ArgumentError, match="no router that is fitted"):
        fit_contexts(nn.Linear(2, 2), torch.randn(9, 2))
    with pytest.raises(ArgumentError, match=r"router: the contexts are not what the router reads"):
        fit_contexts(mixed, torch.eye(3).repeat(3, 1))
