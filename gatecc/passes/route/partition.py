"""Partitions: the hidden neurons of a feed-forward network in groups of one size, for experts that are parts of it.

A feed-forward network is a sum over its hidden neurons, so that any partition is exact as long as all groups run. Which
neurons share a group decides how much is lost when some groups do not. Pure functions; neurons: (m, F/m) int64, each of
0..F-1 once, ascending within a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from gatecc.errors import ArgumentError


def group_size(features: int, groups: int) -> int:
    """F/m. Raises ArgumentError if the groups would not be of one size."""
    if groups < 1 or features % groups:
        near = [m for m in range(1, features + 1) if features % m == 0]
        fit = sorted(sorted(near, key=lambda m: abs(m - groups))[:4])
        raise ArgumentError(
            "the hidden neurons do not split into groups of one size",
            found=f"{features} hidden neurons, {groups} groups",
            expected=f"a number that divides {features}, such as {', '.join(map(str, fit))}",
        )
    return features // groups


def contiguous(features: int, groups: int) -> Tensor:
    """Neighbours share a group: 0..F/m-1, and so on."""
    return torch.arange(features).view(groups, group_size(features, groups))


def random(features: int, groups: int, seed: int = 0) -> Tensor:
    """A random partition, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(features, generator=generator).view(groups, group_size(features, groups)).sort(-1).values


def kmeans(rows: Sequence[Tensor], groups: int, seed: int = 0, iterations: int = 20) -> Tensor:
    """Balanced k-means of the weight rows of the neurons: those that look for similar inputs share a group.

    ``rows``: (F, d) each, up, and gate where there is one. A neuron is the concatenation of its rows, each of length 1.
    In each iteration the neurons choose in the order of what they lose by their second choice, and a group that has
    F/m of them is closed (MoEfication, 2021, balances likewise).
    """
    size = group_size(rows[0].size(0), groups)
    points = torch.cat([torch.nn.functional.normalize(r.detach().float().cpu(), dim=-1) for r in rows], 1)
    centres = points[_spread(points, groups, seed)]
    chosen = torch.empty(0)
    for _ in range(iterations):
        now = _balanced(torch.cdist(points, centres), size)
        if torch.equal(now, chosen):
            break
        chosen = now
        centres = torch.stack([points[chosen == group].mean(0) for group in range(groups)])
    return grouped(chosen, groups)


def coactivation(active: Tensor, groups: int, neighbours: int = 16, seed: int = 0) -> Tensor:
    """Neurons that fire for the same tokens share a group: a balanced cut of the graph of co-activations.

    ``active``: (T, F) bool, which neurons fire for which tokens. Edges weigh how often both fire, against how often
    each does (cosine); every neuron keeps those to its ``neighbours`` strongest. The graph is cut in two again and
    again by the method of Kernighan and Lin (networkx), which swaps neurons until no swap helps.
    """
    group_size(active.size(1), groups)
    together = active.detach().float().cpu()
    together = torch.nn.functional.normalize(together, dim=0)
    affinity = (together.T @ together).fill_diagonal_(0)
    graph: Any = nx.Graph()
    graph.add_nodes_from(range(active.size(1)))
    strongest = affinity.topk(min(neighbours, active.size(1) - 1), -1)
    for neuron, (weights, others) in enumerate(zip(strongest.values.tolist(), strongest.indices.tolist(), strict=True)):
        graph.add_weighted_edges_from((neuron, o, w) for o, w in zip(others, weights, strict=True) if w > 0)
    order = torch.randperm(active.size(1), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = _cut(graph, order, groups)
    return torch.tensor([sorted(part) for part in parts])


def grouped(chosen: Tensor, groups: int) -> Tensor:
    """(m, F/m) from the group of each neuron, (F,). Raises ArgumentError for groups of different sizes."""
    counts = torch.bincount(chosen, minlength=groups)
    if counts.numel() != groups or len(set(counts.tolist())) != 1:
        raise ArgumentError(
            "the groups of a partition are not of one size",
            found=f"groups of {counts.tolist()} neurons",
            expected=f"{groups} groups of {chosen.numel() / groups:g}",
        )
    return torch.argsort(chosen, stable=True).view(groups, -1)


def _spread(points: Tensor, groups: int, seed: int) -> Tensor:
    """Neurons that are far from one another, to start from (k-means++)."""
    generator = torch.Generator().manual_seed(seed)
    found = [int(torch.randint(points.size(0), (1,), generator=generator))]
    nearest = torch.full((points.size(0),), torch.inf)
    while len(found) < groups:
        nearest = torch.minimum(nearest, (points - points[found[-1]]).square().sum(-1))
        weights = nearest + 1e-12  # equal rows are chosen too, where there is nothing else
        weights[found] = 0
        found.append(int(torch.multinomial(weights, 1, generator=generator)))
    return torch.tensor(found)


def _balanced(distance: Tensor, size: int) -> Tensor:
    """The group of each neuron: distance (F, m) -> (F,), ``size`` neurons a group."""
    ranked = distance.sort(stable=True, dim=-1)
    regret = ranked.values[:, min(1, distance.size(1) - 1)] - ranked.values[:, 0]
    order, wishes = regret.argsort(descending=True, stable=True).tolist(), ranked.indices.tolist()
    room = [size] * distance.size(1)
    chosen = [0] * distance.size(0)
    for neuron in order:
        group = next(g for g in wishes[neuron] if room[g])
        room[group] -= 1
        chosen[neuron] = group
    return torch.tensor(chosen)


def _cut(graph: Any, nodes: list[int], groups: int) -> list[list[int]]:
    """Nodes in groups of one size, few edges between them; ``nodes`` in the order that the first cut starts from."""
    if groups == 1:
        return [nodes]
    left = groups // 2
    at = len(nodes) // groups * left
    start = (set(nodes[:at]), set(nodes[at:]))
    halves: Any = nx.community.kernighan_lin_bisection(graph.subgraph(nodes), start)
    one, other = ([n for n in nodes if n in half] for half in halves)
    if len(one) != at:
        one, other = other, one
    return [*_cut(graph, one, left), *_cut(graph, other, groups - left)]
