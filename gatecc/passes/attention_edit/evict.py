"""Evict: a gate that says of each token and key head whether later queries see it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import attribute
from gatecc.ir.site import Attention
from gatecc.passes.attention_edit.blocks import with_loss
from gatecc.passes.attention_edit.change import Change
from gatecc.passes.attention_edit.operator_call import keeps, laid_back, operands
from gatecc.passes.mix.attention_maps import forget
from gatecc.passes.mix.mix import laid
from gatecc.passes.operands import beside, stage, static_sizes


@dataclass(frozen=True)
class Evict(Change, tag="evict"):
    """Keys and values leave once their own query has passed, where a gate says so. See the recipe ``attention-gate``.

    ``target``: the share of tokens that a loss of this ``weight`` pulls towards, per layer. ``budget``: how many tokens
    a head holds at most, 0 for any number: flags then say which leave first. ``recent``: how many of the newest tokens
    are held whatever their flags say. ``hidden``: the width of a hidden layer of
    the gate, 0 for none. ``bias``: what its logits start at. The buffer ``cut`` of the gate is the probability above
    which a token is kept, a dial of the finished model.
    """

    target: float = 0.5
    weight: float = 1.0
    budget: int = 0
    recent: int = 0
    hidden: int = 0
    bias: float = 2.0

    def check(self) -> None:
        self.require(0 <= self.target <= 1, "target", "0 <= target <= 1")
        self.require(self.weight >= 0, "weight", "0 or more")
        self.require(self.budget >= 0, "budget", "a number of tokens, or 0 for any")
        self.require(self.recent >= 0, "recent", "a number of tokens, or 0 for none")
        self.require(
            not self.budget or self.recent <= self.budget, "recent", f"at most the budget of {self.budget} tokens"
        )
        self.require(self.hidden >= 0, "hidden", "a width, or 0 for none")
        self.require(self.bias > 0, "bias", "a positive number: everything is kept at first")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("q", "k", "v", "hidden")

    @property
    def effects(self) -> Effects:
        return Effects(reads_mask=True, loses_cache=True, loses_outputs=True, same_for_layers=True)

    @property
    def contract(self) -> Contract:
        return changes_function() if self.budget else identity_at_init()

    def notes(self, site: Attention) -> Iterable[str]:
        if not site.mask.causal:
            yield f"{site.key}: nothing is decoded here: what leaves is hidden from all other tokens"
        elif site.mask.kind == "sliding_window":
            yield f"{site.key}: no decoder: a sliding window and eviction share no cache"

    def apply(self, site: Attention, label: str, edit: Editor) -> None:
        given = operands(site, self, edit)
        self._check_site(site)
        hidden = laid(stage(site, "hidden"), site, "hidden", edit)
        path = edit.module(label, lambda: beside(self._module(site), edit))
        valid = keeps(site, given.q, edit)
        found = edit.call(path, hidden, valid, name=label)
        training = attribute(edit.program.module, path).training
        flags, loss = found if training else (found, None)
        heads = stage(site, "heads")
        numbers = any(m.node.meta["val"].dtype != torch.bool for m in site.maskings)
        spread = site.spelling != "sdpa" or numbers  # torch's operator gives 0 where a boolean mask hides everything
        rules = (
            site.scale,
            site.mask.causal,
            site.mask.window or 0,
            self.budget,
            site.soft_cap or 0.0,
            spread,
            self.recent,
        )
        out = edit.call(evicted, given.q, given.k, given.v, flags, valid, *rules, name="heads")
        out = laid_back(out, site, edit)
        if loss is not None:
            out = edit.call(with_loss, out, loss, edit.parameter(f"{path}.loss_scale"), name=label)
        edit.replace(heads.node, out)
        forget(site, edit)
        edit.discard(heads.node)

    def _check_site(self, site: Attention) -> None:
        mask = site.mask
        wrong = [
            ("a mask that adds numbers to the scores", mask.bias),
            ("a mask over packed sequences", mask.kind == "packed"),
            (f"dropout {site.dropout:g} of the weights", bool(site.dropout)),
            ("a budget, and a mask that is not plainly causal", bool(self.budget) and mask.kind != "causal"),
            (
                "tokens that stay for being recent, where no token comes before another",
                bool(self.recent) and not mask.causal,
            ),
        ]
        for found, holds in wrong:
            if holds:
                raise self.refused(site, found, "self-attention whose mask hides later tokens and padding alone")

    def _module(self, site: Attention) -> EvictionGate:
        width = static_sizes(stage(site, "hidden")).get("c")
        if not site.heads or width is None:
            raise self.refused(site, "heads or features of no fixed number", "a layer input (B, N, C) with fixed C")
        return EvictionGate(width, site.kv_heads, self.hidden, self.bias, self.target, self.weight)


def evicted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    valid: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    budget: int,
    softcap: float,
    spread: bool,
    recent: int,
) -> Tensor:
    """The operator's result."""
    options: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "budget": budget}
    options |= {"softcap": softcap, "spread": spread, "recent": recent}
    return torch.ops.gatecc.evicted_attention(q, k, v, keep, valid, **options)[0]


class EvictionGate(nn.Module):
    """The gate of `Evict`: flags (B, K, N), 1 where a token is kept; in training with the loss of their mean.

    weight: (K, C), zeros, bias: (K); with a hidden layer inner: (R, C) and weight: (K, R). Its loss is read and scaled
    as those of routers are (`gatecc.aux_losses`, `gatecc.train.routing`).
    """

    cut: Tensor
    loss_scale: Tensor
    loss_rate: Tensor
    routed_step: Tensor

    def __init__(self, width: int, heads: int, hidden: int, bias: float, target: float, weight: float) -> None:
        super().__init__()
        self.target, self.strength = target, weight
        self.inner = nn.Linear(width, hidden) if hidden else None
        self.weight = nn.Parameter(torch.zeros(heads, hidden or width))
        self.bias = nn.Parameter(torch.full((heads,), bias))
        self.register_buffer("cut", torch.tensor(0.5))
        self.register_buffer("loss_scale", torch.ones(()), persistent=False)
        self.register_buffer("loss_rate", torch.zeros(3), persistent=False)
        self.register_buffer("routed_step", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """x: (B, N, C), valid: (B, N), False at padding."""
        x = x if x.dtype == self.weight.dtype else x.to(self.weight.dtype)
        inner = x if self.inner is None else torch.nn.functional.gelu(self.inner(x))
        p = torch.nn.functional.linear(inner, self.weight, self.bias).sigmoid().transpose(1, 2)
        on = (p > self.cut).to(p.dtype)
        if not self.training:
            return on
        flags = on + (p - p.detach())  # straight-through
        loss = self.strength * (_mean(flags.float(), valid) - self.target).square()
        figures = torch.stack((torch.ones_like(loss), loss)).detach()
        torch.ops.gatecc.record(self.loss_rate, figures, self.routed_step)
        return flags, loss


def _mean(flags: Tensor, valid: Tensor | None) -> Tensor:
    """Over what is no padding."""
    if valid is None:
        return flags.mean()
    here = valid.unsqueeze(1).to(flags.dtype)
    return (flags * here).sum() / (here.sum() * flags.size(1)).clamp_min(1.0)
