"""Blocks: a gate that chooses, for each block of queries, the blocks of keys that it sees."""

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
from gatecc.ops.block_gate.reference import POOLS, divergence
from gatecc.passes.attention_edit.change import Change
from gatecc.passes.attention_edit.operator_call import attend, keeps, operands
from gatecc.passes.mix.attention_maps import forget
from gatecc.passes.mix.mix import laid
from gatecc.passes.operands import beside, stage, static_sizes

ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class Blocks(Change, tag="blocks"):
    """Block-sparse attention behind a learned gate (SeerAttention, 2024). See the recipe ``seer-attention``.

    ``block``: tokens of a block; ``width``: features of the gate, even. A row of blocks keeps ``share`` of those that
    it may see, or with ``threshold`` those of a larger probability. The number is the buffer ``cut`` of the gate, which
    may be changed at any time. ``joint``: training computes what is chosen; else
    it computes all, and the gate alone learns.

    With ``share=1`` everything is kept. A gate pools the queries of its block, so that a causal model stays causal for
    whole blocks, no longer for tokens. The decoder refuses it (`TokenBlocks` is for decoding);
    a cache object of a model is refused too.
    """

    block: int = 64
    width: int = 32
    share: float = 0.5
    threshold: float | None = None
    joint: bool = False

    def check(self) -> None:
        self.require(self.block > 0, "block", "a positive integer")
        self.require(self.width > 0 and self.width % 2 == 0, "width", "an even number")
        self.require(0 < self.share <= 1, "share", "0 < share <= 1")
        self.require(self.threshold is None or 0 <= self.threshold < 1, "threshold", "0 <= threshold < 1, or None")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("q", "k", "v", "q_raw", "k_raw")

    @property
    def effects(self) -> Effects:
        return Effects(
            reads_mask=True, loses_cache=True, loses_outputs=True, same_for_layers=True, causal_block=self.block
        )

    @property
    def contract(self) -> Contract:
        return identity_at_init() if self.share == 1 and self.threshold is None else changes_function()

    def notes(self, site: Attention) -> Iterable[str]:
        if site.mask.causal:
            yield f"{site.key}: causal for whole blocks of {self.block} tokens, not for tokens"

    def apply(self, site: Attention, label: str, edit: Editor) -> None:
        given = operands(site, self, edit)
        keep = keeps(site, given.q, edit)
        raw = [laid(stage(site, name), site, name, edit) for name in ("q_raw", "k_raw")]
        path = edit.module(label, lambda: beside(self._module(site), edit))
        rules = (site.mask.causal, site.mask.window, site.scale, site.soft_cap)
        found = edit.call(path, *raw, given.q, given.k, given.bias, keep, *rules, name=label)
        heads = stage(site, "heads")
        if not attribute(edit.program.module, path).training:
            edit.replace(heads.node, attend(site, given, found, self.block, edit))
        else:
            blocks, loss = found
            after = attend(site, given, blocks, self.block, edit) if self.joint else heads.node
            after = edit.call(with_loss, after, loss, edit.parameter(f"{path}.loss_scale"), name=label)
            edit.replace(heads.node, after)
            if not self.joint:
                return
        forget(site, edit)
        edit.discard(heads.node)

    def _module(self, site: Attention) -> BlockGate:
        width = static_sizes(stage(site, "q_raw")).get("d")
        if not site.heads or width is None:
            raise self.refused(site, "heads of no fixed number or width", "queries (B, H, N, D) with fixed H and D")
        base = ROTARY_BASE if site.rotary else 0.0
        return BlockGate(site.heads, site.kv_heads, width, self.width, self.block, self.share, self.threshold, base)


class BlockGate(nn.Module):
    """The gate of `Blocks`. In eval the map of blocks (B, H, n, n); in training the map and the loss of the gate.

    query: (H, 3 D, R), key: (G, 3 D, R), as Linear starts them. Its loss is read and scaled as those of routers are
    (`gatecc.train.routing`, `gatecc.aux_losses`).
    """

    cut: Tensor
    loss_scale: Tensor
    loss_blocks: Tensor
    routed_step: Tensor

    def __init__(
        self,
        heads: int,
        groups: int,
        dim: int,
        width: int,
        block: int,
        share: float,
        threshold: float | None,
        base: float,
    ) -> None:
        super().__init__()
        self.block, self.ranked, self.base = block, threshold is None, base
        self.register_buffer("cut", torch.tensor(share if threshold is None else threshold))
        bound = (POOLS * dim) ** -0.5
        self.query = nn.Parameter(torch.empty(heads, POOLS * dim, width).uniform_(-bound, bound))
        self.key = nn.Parameter(torch.empty(groups, POOLS * dim, width).uniform_(-bound, bound))
        self.register_buffer("loss_scale", torch.ones(()), persistent=False)
        self.register_buffer("loss_blocks", torch.zeros(3), persistent=False)
        self.register_buffer("routed_step", torch.zeros(1), persistent=False)

    def forward(
        self,
        q_raw: Tensor,
        k_raw: Tensor,
        q: Tensor,
        k: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        causal: bool,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """q_raw, q: (B, H, N, D), k_raw, k: (B, G, N, D) before and after the rotary embedding; keep: (B, N)."""
        gatecc: Any = torch.ops.gatecc
        raw = q_raw.detach(), k_raw.detach()
        logits = gatecc.block_logits(*raw, self.query, self.key, keep, self.block, self.base)
        blocks = gatecc.block_choice(logits.detach(), self.cut, keep, self.block, self.ranked, causal, window)
        if not self.training:
            return blocks
        peaks = gatecc.block_peaks(q.detach(), k.detach(), bias, self.block, scale, causal, window, softcap)
        loss = divergence(logits, peaks, keep, causal, window, self.block)
        figures = torch.stack((torch.ones_like(loss), loss)).detach()
        gatecc.record(self.loss_blocks, figures, self.routed_step)
        return blocks, loss


def with_loss(x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """x, and ``scale * loss`` in the backward pass."""
    return torch.ops.gatecc.add_loss(x, loss, scale)
