"""causal-mask: fused attention whose mask tensor is proved causal says ``is_causal`` instead, which is half the work.

Decoders of transformers build the mask as a tensor, and the fused kernel then computes every score and reads the mask
beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from gatecc.ir.program import Program, fake
from gatecc.ir.site import Attention, Site
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings

_MASK, _CAUSAL = 3, 5  # places of the arguments of scaled_dot_product_attention


class CausalMask(Lowering):
    """SDPA(mask proved causal) -> SDPA(is_causal=True)."""

    name = "causal-mask"

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        for site in sites:
            if isinstance(site, Attention) and site.spelling == "sdpa" and isinstance(site.core.args[_MASK], fx.Node):
                yield self._at(site)

    def _at(self, site: Attention) -> Outcome:
        found = f"fused attention with a mask tensor, {site.mask}"
        reason = _unfit(site)
        if reason:
            return Outcome(self.name, site.owner, site.line, found, reason=reason)
        args = list(site.core.args)
        args[_MASK], args[_CAUSAL] = None, True
        site.core.args = tuple(args)
        proof = "the mask was evaluated at several sizes"
        return Outcome(self.name, site.owner, site.line, found, "is_causal=True", proof, "half of the scores")


def _unfit(site: Attention) -> str:
    """Why the mask has to stay; empty if it says no more than that no query sees a later key."""
    mask = site.mask
    if mask.kind == "unknown":
        return mask.reason
    if mask.kind != "causal" or mask.padding or mask.bias or not site.mask_whole:
        return f"the mask says more than that no query sees a later key: {mask}"
    if mask.asserted:
        return "the mask is an input of the graph: it may be another one at the next call"
    q, k = fake(site.values["q"].node), fake(site.values["k"].node)
    if q is None or k is None or not _equal(q.shape[-2], k.shape[-2]):
        return "there are more keys than queries, and is_causal counts queries from the first key"
    return ""


def _equal(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two sizes are the same for every input, without a guard that says so."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return str(one) == str(other)
