"""causal-mask: fused attention whose mask tensor is proved to be causal, or to hide nothing, goes without the tensor.

``is_causal`` is half the work. Decoders of transformers build the mask as a tensor where they cannot know that it is
plainly causal, and the fused kernel then computes every score and reads the mask beside it. A sliding window stays a
tensor: the fused operator has no word for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.program import Program, shape
from gatecc.ir.site import Attention, Site
from gatecc.passes.lower.attention.mask_proof import prove
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings

_MASK, _CAUSAL = 3, 5  # places of the arguments of scaled_dot_product_attention


class CausalMask(Lowering):
    """SDPA(mask proved causal) -> SDPA(is_causal=True)."""

    name = "causal-mask"
    left = "a mask that is handed in, a sliding window, one that is not proved at other sizes"

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        masked = [s for s in sites if isinstance(s, Attention) and s.spelling == "sdpa" and _given(s.core) is not None]
        flow = Flow(program) if masked else None
        for site in masked:
            if flow is not None:
                yield self._at(site, flow)

    def _at(self, site: Attention, flow: Flow) -> Outcome:
        found, mask = f"fused attention with a mask tensor, {site.mask}", _given(site.core)
        assert mask is not None
        lengths = [shape(n)[-2] for n in site.core.args[:2] if isinstance(n, fx.Node)]
        proof = prove(site.mask, [mask], (lengths[0], lengths[1]), flow)
        if not proof.kind:
            return Outcome(self.name, site.owner, site.line, found, reason=proof.reason)
        args = list(site.core.args)
        args[_MASK], args[_CAUSAL] = None, proof.kind == "causal"
        site.core.args = tuple(args)
        became, gain = (
            ("is_causal=True", "half of the scores") if proof.kind == "causal" else ("no mask", "reading the mask")
        )
        why = "the mask was evaluated at several sizes"
        return Outcome(self.name, site.owner, site.line, found, became, why, gain, proof.buffers)


def _given(core: fx.Node) -> fx.Node | None:
    mask = core.args[_MASK]
    return mask if isinstance(mask, fx.Node) and not core.args[_CAUSAL] else None
