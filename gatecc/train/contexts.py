"""Contexts: a router that is not trained by gradients, but fitted to clusters of what it reads (MixER, 2025)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ir.gates.scorer import LeastSquares
from gatecc.ir.router import Router


def fitted_routers(model: nn.Module) -> dict[str, Router]:
    """The routers of a model whose scorer is fitted in closed form, by name. Raises ArgumentError if there are none."""
    routers = {n: m for n, m in model.named_modules() if isinstance(m, Router)}
    found = {n: m for n, m in routers.items() if isinstance(m.spec.scorer, LeastSquares)}
    if not found:
        raise ArgumentError(
            "the model has no router that is fitted", found=", ".join(routers) or "no routers", expected="scorer lstsq"
        )
    return found


def clusters(contexts: Tensor, groups: int, *, iterations: int = 20) -> Tensor:
    """K-means with absolute distances: contexts (N, C) -> the cluster of each, (N,). A cluster may come out empty."""
    points = contexts.detach().float()
    centres = points[:1]
    while len(centres) < groups:  # the point that is farthest from those there are
        centres = torch.cat([centres, points[torch.cdist(points, centres, p=1).amin(1).argmax()][None]])
    chosen = torch.cdist(points, centres, p=1).argmin(1)
    for _ in range(iterations):
        masks = [chosen == group for group in range(groups)]
        centres = torch.stack([points[m].mean(0) if m.any() else c for m, c in zip(masks, centres, strict=True)])
        now = torch.cdist(points, centres, p=1).argmin(1)
        if torch.equal(now, chosen):
            break
        chosen = now
    return chosen


def experts_of(chosen: Tensor, losses: Tensor) -> Tensor:
    """An expert for each sample: a cluster takes, in turn, the unused expert of the lowest loss. losses: (N, E)."""
    free = list(range(losses.size(1)))
    taken = torch.empty_like(chosen)
    for group in range(losses.size(1)):
        inside = chosen == group
        best = min(free, key=lambda e: float(losses[inside, e].mean()))
        free.remove(best)
        taken[inside] = best
    return taken


@torch.no_grad()
def fit_contexts(
    model: nn.Module, contexts: Tensor, losses: Tensor | None = None, *, noise: float = 1e-4, seed: int = 0
) -> Tensor | None:
    """Fit every router of the model to clusters of contexts (N, C); which expert each sample goes to, (N,).

    ``losses`` (N, E): of each expert on each sample, see `expert_losses`; without, the k-th cluster takes the k-th
    expert. The routers become the least-squares fit of the experts' numbers to the contexts with a little noise. If a
    cluster is empty nothing is changed, and the result is None. Raises ArgumentError for other numbers of features.
    """
    routers = fitted_routers(model)
    count = next(iter(routers.values())).experts
    chosen = clusters(contexts, count)
    if len(chosen.unique()) < count:
        return None
    taken = chosen if losses is None else experts_of(chosen, losses)
    generator = torch.Generator().manual_seed(seed)
    noisy = contexts.float() + noise * torch.randn(contexts.shape, generator=generator).to(contexts.device)
    for name, router in routers.items():
        weight, bias = router.get_parameter("weight"), router.get_parameter("bias")
        if router.experts != count or weight.size(1) != contexts.size(1):
            raise ArgumentError(
                "the contexts are not what the router reads",
                where=name,
                found=f"{contexts.size(1)} features, {count} experts",
                expected=f"{weight.size(1)} features, {router.experts} experts",
            )
        assert isinstance(router.spec.scorer, LeastSquares)
        w, b = router.spec.scorer.solve(noisy, F.one_hot(taken, count).float())
        weight.copy_(w)
        bias.copy_(b)
    return taken


@torch.no_grad()
def expert_losses(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """The loss of each sample with each expert alone: ``loss(model)`` (N,) -> (N, E)."""
    count = next(iter(fitted_routers(model).values())).experts
    found: list[Tensor] = []
    for expert in range(count):
        with _alone(model, expert):
            found.append(loss(model))
    return torch.stack(found, 1)


@contextmanager
def _alone(model: nn.Module, expert: int) -> Generator[None]:
    """Every router chooses one expert, whatever it reads."""
    held = [(p, p.detach().clone()) for r in fitted_routers(model).values() for p in r.parameters()]
    try:
        for router in fitted_routers(model).values():
            router.get_parameter("weight").zero_()
            router.get_parameter("bias").copy_(F.one_hot(torch.tensor(expert), router.experts))
        yield
    finally:
        for parameter, before in held:
            parameter.copy_(before)
