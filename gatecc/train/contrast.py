"""TaskContrast: sequences of one task should be routed alike, and other tasks otherwise (T2MIR, 2025)."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ir.router import Router


def info_nce(queries: Tensor, keys: Tensor, tasks: Tensor, temperature: float = 0.05) -> Tensor:
    """-log of the share of keys of a query's own task, by cosine. queries, keys: (B, E), tasks: (B,) -> ()

    A sequence is no key of itself. Sequences without another of their task are left out; 0 if all are.
    """
    scores = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / temperature
    scores = scores.masked_fill(torch.eye(len(tasks), dtype=torch.bool, device=scores.device), -torch.inf)
    same = tasks[:, None] == tasks[None, :]
    own = scores.masked_fill(~same, -torch.inf).logsumexp(-1)
    known = own.isfinite()
    return (scores.logsumexp(-1) - own)[known].mean() if bool(known.any()) else queries.sum() * 0


class TaskContrast:
    """The loss of routers that read the mean over a sequence, against copies of them that follow slowly.

    In the training loop: ``loss = task_loss + 0.01 * contrast(tasks)`` after the forward pass, ``contrast.update()``
    after the step of the optimizer. What the routers read is recorded by a hook on the module of each layer; ``remove``
    takes the hooks off. Raises ArgumentError for a model without such a router.
    """

    def __init__(self, model: nn.Module, *, momentum: float = 0.99, temperature: float = 0.05) -> None:
        self.momentum, self.temperature = momentum, temperature
        self.routers: dict[str, Router] = {}
        self._read: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        for name, module in model.named_modules():
            if (
                isinstance(module, Router)
                and module.spec.source.refs
                and "n" not in module.spec.source.positions(module.shape, module.shape.sources)
            ):
                self.routers[name] = module
                layer = model.get_submodule(name.rpartition(".")[0])
                self._hooks.append(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        if not self.routers:
            raise ArgumentError(
                "the model has no router for sequences", expected="one that reads pool(in): recipe t2mir"
            )
        self.slow = {name: copy.deepcopy(router).requires_grad_(False) for name, router in self.routers.items()}

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._read[name] = args[0] if args else next(iter(kwargs.values()))

        return keep

    def __call__(self, tasks: Tensor) -> Tensor:
        """The mean over routers, for the last forward pass. tasks: (B,), a number per sequence."""
        losses: list[Tensor] = []
        for name, router in self.routers.items():
            if name not in self._read:
                raise ArgumentError("the layer of this router did not run", where=name, do="call the model first")
            x = self._read[name]
            queries, keys = (self._logits(r, x) for r in (router, self.slow[name]))
            losses.append(info_nce(queries, keys.detach(), tasks, self.temperature))
        return torch.stack(losses).mean()

    def _logits(self, router: Router, x: Tensor) -> Tensor:
        """(B, E), the scores of each sequence's first token: those of all its tokens."""
        logits = router.logits(x, x).unflatten(0, (x.size(0), -1))[:, 0]
        return logits[:, : router.experts]

    @torch.no_grad()
    def update(self) -> None:
        """Let the copies follow."""
        for name, router in self.routers.items():
            for slow, live in zip(self.slow[name].parameters(), router.parameters(), strict=True):
                slow.lerp_(live, 1 - self.momentum)

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
