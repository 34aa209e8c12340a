"""JointAttention: attention of each sample to a partner, beside its attention to itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.site import Attention, Site, Value
from gatecc.passes.branch.body import Body, operand
from gatecc.passes.operands import beside, condition, place


@dataclass(frozen=True)
class JointAttention(Body, tag="joint_attention"):
    """y <- y + W attention(q of x, k and v of x'), x' the input of another sample of the batch; W starts at 0.

    ``partner`` is an input of the model: the row (B,) of each sample's partner, such as its condition. Both have the
    same number of tokens. The heads are as many as those of the site.
    """

    partner: str = "partner"

    @property
    def reads(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def effects(self) -> Effects:
        return Effects(whole_model=True, same_for_layers=True, loses_cache=True)

    @property
    def starts_at_zero(self) -> bool:
        return True

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        source, channels, width = operand(site, value, "hidden")
        if not isinstance(site, Attention) or site.mask.kind != "bidirectional" or site.mask.padding:
            raise SiteRefusedError(
                "attention to another sample reads all of its tokens",
                where=place(site),
                found=f"the mask is {site.mask}" if isinstance(site, Attention) else f"a site of kind {site.kind}",
                expected="attention with a bidirectional mask without padding",
                do="leave this site out",
            )
        heads = site.heads or 1
        row = condition(self.partner, edit.program, source)
        path = edit.module("joint", lambda: beside(Joint(channels, width, heads), edit))
        return edit.call(path, source.node, row.node, name="joint")


class Joint(nn.Module):
    """The module of `JointAttention`. x: (B, N, C), partner: (B,) -> (B, N, O)."""

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.out = nn.Linear(channels, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, partner: Tensor) -> Tensor:
        other = x.index_select(0, partner.long())
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, t in ((self.q, x), (self.k, other), (self.v, other))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
