"""Prompts: learned tokens in the places of others; groups of them, of which a router chooses for each sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, changes_function
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import attribute
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector, select
from gatecc.ir.site import Site, Value
from gatecc.passes.again import again
from gatecc.passes.operands import beside, place, stage, static_sizes
from gatecc.passes.route.router_nodes import router_nodes


@dataclass(frozen=True)
class Prompts(Rewrite):
    """Put ``tokens`` learned embeddings in the places of as many tokens of each sample, from number ``start`` on.

    ``site`` is the embedding; the caller leaves room for them in its input (CoOp's "X X X X a photo of"), so that masks
    and positions count them. ``ids`` are the tokens whose embeddings they start from, one for each; without them they
    are drawn at random.

    With ``groups`` there are several such prompts, and ``router`` chooses k of them for each sample: what lies between
    the embedding and the value ``to`` runs once for each of the k, and no group that is not chosen runs. ``to`` is the
    weighted sum of what these runs give there.
    """

    name = "prompts"

    tokens: int
    start: int = 0
    ids: tuple[int, ...] = ()
    groups: int = 1
    router: RouterSpec | None = None
    to: Selector | None = None
    label: str = "prompts"

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.start < 0 or (self.ids and len(self.ids) != self.tokens):
            raise ArgumentError(
                "no such prompt", found=f"{self}", expected="tokens >= 1, start >= 0, no ids or one for each token"
            )
        if self.groups < 1 or (self.groups > 1) != (self.router is not None) or (self.groups > 1) != bool(self.to):
            raise ArgumentError(
                "groups of prompts are chosen by a router, and summed at a value",
                found=f"groups={self.groups}, router={self.router}, to={self.to}",
                expected="all three, or one group without a router",
            )

    def contract(self) -> Contract:
        return changes_function()

    def effects(self) -> Effects:
        return Effects(whole_model=self.groups > 1, same_for_layers=True, loses_cache=True)

    def rewrite(self, site: Site, edit: Editor) -> None:
        value = stage(site, self.site.stage)
        channels = static_sizes(value).get("c")
        if value.axes != "bnc" or channels is None:
            raise SiteRefusedError(
                "prompts are put among the tokens of a sequence",
                where=place(site),
                found=f"axes {value.axes}",
                expected="bnc: samples, tokens, channels",
                do="select the embedding of the tokens: embedding[...]",
            )
        table = edit.program.relative_name(site.weights["weight"].fqn) if self.ids else ""

        def fill(new: Any, layer: nn.Module) -> None:
            if self.ids:
                rows = cast("Tensor", attribute(layer, table)).detach()
                cast("PromptBank", new).prompts.copy_(rows[list(self.ids)])

        path = edit.module(
            self.label, lambda: beside(PromptBank(self.groups, self.tokens, channels, self.start), edit), fill
        )
        if self.router is None or self.to is None:
            edit.replace(value.node, edit.call(path, value.node, name=self.label))
            return
        first = edit.call(first_token, value.node, name="first_token")
        weights, indices = router_nodes(self.router, self.groups, self.site, Value(first, "bc"), edit)
        slots = int(indices.meta["val"].size(-1))
        put = [edit.call(path, value.node, indices, slot, name=self.label) for slot in range(slots)]
        self._joined(value.node, put, weights, edit)

    def _joined(self, old: fx.Node, put: list[fx.Node], weights: fx.Node, edit: Editor) -> None:
        """Run what follows once for each slot, and sum the results."""
        assert self.to is not None
        found = select(self.to, edit.sites)
        if len(found) != 1:
            raise SiteRefusedError(
                "the runs of several prompts are summed at one value",
                where=place(edit.site),
                found=f"{self.to} selects {len(found)}",
                expected="one site",
            )
        end = stage(found[0], self.to.stage)
        if end.axes[0] != "b":
            raise SiteRefusedError(
                "the runs of several prompts are weighed by sample",
                where=place(found[0]),
                found=f"axes {end.axes}",
                expected="samples as the first axis",
            )
        runs = [again(edit, {old: node}, end.node) for node in put[1:]]
        edit.replace(old, put[0])
        edit.replace(end.node, edit.call(summed, weights, end.node, *runs, name="of_prompts"))


class PromptBank(nn.Module):
    """``prompts`` (G, P, C). x: (B, N, C), with indices (B, k) and a slot the prompt of each sample's slot."""

    def __init__(self, groups: int, tokens: int, channels: int, start: int) -> None:
        super().__init__()
        self.start = start
        self.prompts = nn.Parameter(torch.empty(groups, tokens, channels).normal_(0.0, 0.02))

    def forward(self, x: Tensor, indices: Tensor | None = None, slot: int = 0) -> Tensor:
        tokens = self.prompts.size(1)
        torch._check(x.size(1) >= self.start + tokens, lambda: "the input has no room for the prompt")
        put = self.prompts[:1].expand(x.size(0), -1, -1) if indices is None else self.prompts[indices[:, slot]]
        return torch.cat([x[:, : self.start], put.to(x.dtype), x[:, self.start + tokens :]], 1)


def first_token(x: Tensor) -> Tensor:
    """x: (B, N, C) -> (B, C): something with one row for each sample."""
    return x.select(1, 0)


def summed(weights: Tensor, *runs: Tensor) -> Tensor:
    """weights: (B, k), each of k runs (B, ...) -> their weighted sum."""
    total = torch.zeros_like(runs[0])
    for slot, run in enumerate(runs):
        total = total + weights[:, slot].to(run.dtype).view(-1, *[1] * (run.dim() - 1)) * run
    return total
