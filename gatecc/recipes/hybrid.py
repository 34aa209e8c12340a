"""Conversions of pretrained models that keep a window of softmax: Liger and LoLCATs; and Hopfield layers."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.passes.mix.mix import Mix
from gatecc.passes.mix.mixers.hopfield import Hopfield
from gatecc.passes.mix.mixers.hybrid import Liger, LoLCATs
from gatecc.recipes import samples
from gatecc.recipes.linearize import chosen
from gatecc.recipes.registry import Case, recipe


@recipe(
    "liger",
    citation="Liger: Linearizing Large Language Models to Gated Recurrent Structures (2025)",
    cases=[Case(samples.language, ("causality", "cost", "gradient", "state", "reversible"))],
)
def liger(sites: str = "attention[...]", keep: str = "", window: int = 64, share: float = 0.5) -> tuple[Rewrite, ...]:
    """Half gated linear attention, half softmax over a window, both from the pretrained weights: no new parameters.

    The linear half reads queries and keys before their rotary embedding, through a softmax over the channels of a head;
    it forgets by exp(logsigmoid(k) / 16). ``share`` is the part of the window, ``keep="3::4"`` leaves every fourth
    attention as it is. Up to ``window`` tokens the softmax half is the attention itself.
    """
    return (Mix(chosen(sites, keep), Liger(window, share)),)


@recipe(
    "lolcats",
    citation="LoLCATs: On Low-Rank Linearizing of Large Language Models (2024)",
    cases=[Case(samples.language, ("identity", "causality", "cost", "state", "reversible"))],
)
def lolcats(sites: str = "attention[...]", keep: str = "", window: int = 64) -> tuple[Rewrite, ...]:
    """Softmax over the last keys and linear attention with learned features to the older ones, one denominator.

    The feature maps start as softmax(2 x) and softmax(-2 x) and are what attention transfer trains; the window's weight
    is a learned number per head, 0.1 at first.
    """
    return (Mix(chosen(sites, keep), LoLCATs(window)),)


@recipe(
    "hopfield",
    citation="Hopfield Networks is All You Need (2021)",
    cases=[Case(samples.language, ("causality", "cost", "gradient", "reversible"))],
)
def hopfield(sites: str = "attention[...]", keep: str = "", steps: int = 3, beta: float = 0.0) -> tuple[Rewrite, ...]:
    """Attention whose queries move towards the keys before they read: xi <- softmax(beta xi K^T) K, several times.

    One step with ``beta=0`` (the model's own scale) is the attention itself. The number of steps is fixed.
    """
    return (Mix(chosen(sites, keep), Hopfield(steps, beta)),)
