"""NiNformer: a token mixing MLP gates its own input, in the place of attention."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.passes.mix.mix import Mix
from gatecc.passes.mix.mixers.ninformer import NiNformer
from gatecc.recipes import samples
from gatecc.recipes.linearize import chosen
from gatecc.recipes.registry import Case, recipe


@recipe(
    "ninformer",
    citation="NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function (2024)",
    cases=[Case(samples.sequences, ("cost", "gradient", "reversible"))],
)
def ninformer(sites: str = "attention[...]", keep: str = "", hidden: int = 0) -> tuple[Rewrite, ...]:
    """(W x + b) * mixer(x) in the place of attention and of its projections, with the mixer of MLP-Mixer.

    The mixer adds an MLP over the tokens and then one over the channels to x, each behind a norm of its own and with
    ``hidden`` features inside (4 times the channels if that is 0). Its weights are those of one number of tokens, that
    of the example: other lengths are refused, and so are causal masks and padding. The block's own norms, feed-forward
    network and residuals stay as they are (the paper lets both sublayers share a norm). The old projections stay in the
    state dict, unread. Nothing of the pretrained attention is used: train it.
    """
    return (Mix(chosen(sites, keep).out, NiNformer(hidden)),)
