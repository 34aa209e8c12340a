"""Edges: a learned graph of tokens, in which each sees its best neighbours alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import attribute
from gatecc.ir.site import Attention
from gatecc.passes.attention_edit.change import Change
from gatecc.passes.attention_edit.operator_call import laid_back, operands
from gatecc.passes.attention_edit.scores import add_to_scores
from gatecc.passes.operands import beside, stage


@dataclass(frozen=True)
class Edges(Change, tag="edges"):
    """A table of n x n learned edges, of which each row keeps the k largest: token i sees token j where it kept e_ij.

    k is the whole part of ``share`` n, at least 1. In training the table has Gumbel noise, and the choice has the
    gradient of softmax((e + noise) / T), straight through: an edge learns what the output would change by if it came or
    went, also one that is not kept. In eval the k largest are kept, of equal ones the first.
    The buffer ``noise`` scales the noise: set to 0 late in a training, the choice is exact there too (CommFormer,
    2024). The table is for one number of tokens (agents), which see each other without a mask of their own.
    """

    share: float = 0.4
    T: float = 1.0

    def check(self) -> None:
        self.require(0 < self.share <= 1, "share", "0 < share <= 1")
        self.require(self.T > 0, "T", "a positive number")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("q",)

    @property
    def effects(self) -> Effects:
        return Effects(same_for_layers=True, reads_mask=True)

    @property
    def contract(self) -> Contract:
        return identity_at_init() if self.share == 1 else changes_function()

    def apply(self, site: Attention, label: str, edit: Editor) -> None:
        mask = site.mask
        if site.cross or mask.kind != "bidirectional" or mask.padding or mask.asserted:
            found = "queries and keys of different sequences" if site.cross else f"the mask is {mask}"
            raise self.refused(site, found, "tokens of one sequence, each of which sees all")
        q = stage(site, "q")
        tokens = edit.pin(q.node, q.axes.index("n"))
        path = edit.module(label, lambda: beside(Adjacency(tokens, self.share, self.T), edit))
        made = attribute(edit.program.module, path).edges.size(0)
        if made != tokens:
            raise self.refused(
                site, f"{tokens} tokens", f"{made}, for which the edges are", "call the model with as many tokens"
            )
        if not attribute(edit.program.module, path).training:
            add_to_scores(site, edit.call(path, q.node, name=label), self, edit)
            return
        given = operands(site, self, edit)
        seen, chosen = edit.call(path, q.node, name=label)
        heads = add_to_scores(site, seen, self, edit)
        learns = edit.call(straight_through, *given[:3], seen, chosen, site.scale, name=label)
        learns = laid_back(learns, site, edit)
        edit.replace(heads, edit.call(torch.ops.aten.add.Tensor, heads, learns, name="heads"))


def straight_through(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Zero, (B, H, N, E), with the gradient of the choice. q, k, v: (B, H, N, D), (B, G, N, D), (B, G, N, E).

    The weight w of an edge that is kept moves the output by w (v - o), and one that is not by the weight that it would
    have, w / (1 + w).
    """
    with torch.no_grad():
        groups = q.size(1) // k.size(1)
        k, v = (x.repeat_interleave(groups, 1).float() for x in (k, v))
        scores = (q.float() * scale) @ k.mT
        hidden = scores + mask
        weights = hidden.softmax(-1)
        out = weights @ v
        would = torch.where(mask == 0, weights, torch.sigmoid(scores - hidden.logsumexp(-1, keepdim=True)))
    flagged = would * chosen
    change = flagged @ v - flagged.sum(-1, keepdim=True) * out
    return (change - change.detach()).to(q.dtype)


class Adjacency(nn.Module):
    """The table ``edges`` (n, n) of `Edges`, 1 at first. -> what is added to scores, (1, 1, n, n): 0 or -inf;
    in training also the choice, 1 or 0, which learns."""

    noise: Tensor

    def __init__(self, tokens: int, share: float, temperature: float) -> None:
        super().__init__()
        self.kept, self.temperature = max(1, math.floor(share * tokens + 1e-9)), temperature
        self.edges = nn.Parameter(torch.ones(tokens, tokens))
        self.register_buffer("noise", torch.ones(()))

    def forward(self, q: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """q: the queries, for their device alone."""
        logits = self.edges.float()
        if self.training:
            gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-20, 1 - 1e-7)))
            logits = logits + self.noise * gumbel
        best = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[:, : self.kept]
        kept = torch.zeros_like(logits).scatter(-1, best, 1.0) > 0
        soft = torch.softmax(logits / self.temperature, -1)
        if not self.training:
            return torch.where(kept, soft - soft.detach(), -math.inf)[None, None]
        mask = torch.zeros_like(soft).masked_fill(~kept, -math.inf)
        return mask.detach()[None, None], (kept.to(soft.dtype) + (soft - soft.detach()))[None, None]
