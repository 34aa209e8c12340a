"""TokenBlocks: a gate that chooses, for each token, the blocks of keys that it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import attribute
from gatecc.ir.site import Attention
from gatecc.ops.block_gate.reference import POOLS
from gatecc.passes.attention_edit.blocks import ROTARY_BASE, with_loss
from gatecc.passes.attention_edit.change import Change
from gatecc.passes.attention_edit.operator_call import keeps, laid_back, operands
from gatecc.passes.mix.attention_maps import forget
from gatecc.passes.mix.mix import laid
from gatecc.passes.operands import beside, stage, static_sizes


@dataclass(frozen=True)
class TokenBlocks(Change, tag="token_blocks"):
    """Block-sparse attention behind a learned gate of each token, as decoding takes it (SeerAttention, 2024). See the
    recipe ``seer-attention``.

    ``block``, ``width``, ``share``, ``threshold`` and ``joint`` as of `Blocks`. Nothing is pooled over queries but the
    heads of a group, so the model stays causal for tokens, and a decoder steps through it: it holds the features of
    whole blocks, and reads the keys of those that are chosen.
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
        return Effects(reads_mask=True, loses_cache=True, loses_outputs=True, same_for_layers=True)

    @property
    def contract(self) -> Contract:
        return identity_at_init() if self.share == 1 and self.threshold is None else changes_function()

    def apply(self, site: Attention, label: str, edit: Editor) -> None:
        given = operands(site, self, edit)
        mask = site.mask
        wrong = [
            (f"the mask is {mask}", mask.kind != "causal" or mask.bias),
            (f"dropout {site.dropout:g} of the weights", bool(site.dropout)),
            ("scores with a cap", bool(site.soft_cap)),
        ]
        for found, holds in wrong:
            if holds:
                raise self.refused(site, found, "causal attention whose mask hides later tokens and padding alone")
        keep = keeps(site, given.q, edit)
        raw = [laid(stage(site, name), site, name, edit) for name in ("q_raw", "k_raw")]
        path = edit.module(label, lambda: beside(self._module(site), edit))
        numbers = any(m.node.meta["val"].dtype != torch.bool for m in site.maskings)
        spread = site.spelling != "sdpa" or numbers  # torch's operator gives 0 where a boolean mask hides everything
        found = edit.call(path, given.q, given.k, given.v, *raw, keep, site.scale, spread, name=label)
        heads = stage(site, "heads")
        if not attribute(edit.program.module, path).training:
            edit.replace(heads.node, laid_back(found, site, edit))
        else:
            out, loss = found
            after = laid_back(out, site, edit) if self.joint else heads.node
            edit.replace(
                heads.node, edit.call(with_loss, after, loss, edit.parameter(f"{path}.loss_scale"), name=label)
            )
            if not self.joint:
                return
        forget(site, edit)
        edit.discard(heads.node)

    def _module(self, site: Attention) -> TokenBlockGate:
        width = static_sizes(stage(site, "q_raw")).get("d")
        if not site.heads or width is None:
            raise self.refused(site, "heads of no fixed number or width", "queries (B, H, N, D) with fixed H and D")
        base = ROTARY_BASE if site.rotary else 0.0
        return TokenBlockGate(site.kv_heads, width, self.width, self.block, self.share, self.threshold, base)


class TokenBlockGate(nn.Module):
    """The gate of `TokenBlocks`, and the attention behind it, (B, H, N, E); in training with the loss of the gate.

    query: (K, D, R), key: (K, 3 D, R), as Linear starts them; K key heads. Its loss is read and scaled as those of
    routers are (`gatecc.train.routing`, `gatecc.aux_losses`).
    """

    cut: Tensor
    loss_scale: Tensor
    loss_blocks: Tensor
    routed_step: Tensor

    def __init__(
        self, groups: int, dim: int, width: int, block: int, share: float, threshold: float | None, base: float
    ) -> None:
        super().__init__()
        self.block, self.ranked, self.base = block, threshold is None, base
        self.register_buffer("cut", torch.tensor(share if threshold is None else threshold))
        self.query = nn.Parameter(torch.empty(groups, dim, width).uniform_(-(dim**-0.5), dim**-0.5))
        bound = (POOLS * dim) ** -0.5
        self.key = nn.Parameter(torch.empty(groups, POOLS * dim, width).uniform_(-bound, bound))
        self.register_buffer("loss_scale", torch.ones(()), persistent=False)
        self.register_buffer("loss_blocks", torch.zeros(3), persistent=False)
        self.register_buffer("routed_step", torch.zeros(1), persistent=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_raw: Tensor,
        k_raw: Tensor,
        keep: Tensor | None,
        scale: float,
        spread: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """q_raw, q: (B, H, N, D), k_raw, k: (B, K, N, D) before and after the rotary embedding; keep: (B, N)."""
        gatecc: Any = torch.ops.gatecc
        gate = q_raw.detach(), k_raw.detach(), self.query.detach(), self.key.detach(), self.cut
        options: dict[str, Any] = {"block": self.block, "scale": scale, "base": self.base}
        out = gatecc.chosen_blocks(q, k, v, *gate, keep, **options, ranked=self.ranked, spread=spread)[0]
        if not self.training:
            return out
        heads = q_raw.detach(), k_raw.detach(), q.detach(), k.detach()
        loss = gatecc.chosen_loss(*heads, self.query, self.key, keep, self.block, scale, self.base)
        gatecc.record(self.loss_blocks, torch.stack((torch.ones_like(loss), loss)).detach(), self.routed_step)
        return out, loss
