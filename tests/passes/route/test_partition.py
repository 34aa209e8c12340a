"""Partitions of hidden neurons: each neuron once, groups of one size, and groups that mean what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatecc.errors import ArgumentError
from gatecc.passes.route import partition


@given(groups=st.integers(1, 6), size=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_every_neuron_is_in_one_group_and_groups_are_of_one_size(groups: int, size: int, seed: int) -> None:
    features = groups * size
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(features, 4, generator=generator)
    active = torch.rand(12, features, generator=generator) > 0.5
    for made in (
        partition.contiguous(features, groups),
        partition.random(features, groups, seed),
        partition.kmeans([rows, rows.flip(1)], groups, seed),
        partition.coactivation(active, groups, seed=seed),
    ):
        assert made.shape == (groups, size)
        assert sorted(made.flatten().tolist()) == list(range(features))


def test_kmeans_finds_neurons_with_like_rows_though_their_lengths_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=generator)
    truth = torch.randperm(24, generator=generator) % 3
    rows = (centres[truth] + 0.05 * torch.randn(24, 16, generator=generator)) * torch.rand(24, 1, generator=generator)
    found = partition.kmeans([rows, 7 * rows], 3)
    assert sorted(sorted(truth[group].tolist()) for group in found) == [[0] * 8, [1] * 8, [2] * 8]


def test_balanced_kmeans_closes_a_full_group_and_keeps_those_who_lose_most() -> None:
    distance = torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.0, 8.0], [0.0, 2.0]])
    assert partition._balanced(distance, 2).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("groups", [3, 4])
def test_neurons_that_fire_together_share_a_group(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    truth = torch.randperm(8 * groups, generator=generator) % groups
    fires = torch.nn.functional.one_hot(torch.randint(groups, (200,), generator=generator), groups).bool()
    noise = torch.rand(200, 8 * groups, generator=generator) < 0.05
    found = partition.coactivation(fires[:, truth] ^ noise, groups, neighbours=6)
    assert sorted(sorted(truth[group].tolist()) for group in found) == [[g] * 8 for g in range(groups)]


def test_groups_that_do_not_divide_the_neurons_are_refused_with_numbers_that_do() -> None:
    with pytest.raises(ArgumentError, match=r"12 hidden neurons, 5 groups(.|\n)*3, 4, 6"):
        partition.contiguous(12, 5)
    with pytest.raises(ArgumentError, match=r"groups of \[3, 1\] neurons"):
        partition.grouped(torch.tensor([0, 0, 1, 0]), 2)
