"""HRPO: a language model that thinks in mixtures of tokens."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.loop.think import Think
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "hrpo",
    citation="Hybrid Latent Reasoning via Reinforcement Learning (2025)",
    cases=[
        Case(samples.thinking, ("causality", "cost", "export", "gradient", "reversible")),
        Case(samples.thinking, ("identity", "reversible"), {"start": (1.0, 1.0)}),
    ],
)
def hrpo(
    sites: str = "embedding[0]",
    soft: str = "soft",
    until: tuple[int, ...] = (),
    start: tuple[float, float] = (0.99, 0.999),
) -> tuple[Rewrite, ...]:
    """While a model thinks, the embedding of each token takes in what the step before predicted.

    e' = a ⊙ e + sqrt(1 - a² + 1e-8) ⊙ (i ⊙ s), with r = σ(W_r e), i = σ(W_i e) and a = exp(-8 softplus(-Λ) ⊙ r). The
    thought s = p E / |p| is the embedding of the probabilities p of the step before, over the model's own table E. Λ
    starts so that a lies within ``start`` where r is 1, as in the authors' scripts. (1, 1) is the identity up to the
    1e-8 in the root: 1e-4 s. Rows of s that are zero are no thoughts, and leave e bitwise as it is: so a prompt is read
    as before.

    ``soft`` names the input of the model that holds s, (B, N, C): a model as it comes has none, and
    `gatecc.train.Thinking(model)` gives it one. `gatecc.decoder` keeps s in its state and needs no such input: it
    thinks from the end of a prompt (a prefill) until a sample reads a token of ``until``, the marker of the answer;
    this token and those behind it are plain. What is given to a prefill as ``soft`` is read in its place.

    Trained as in the paper: `gatecc.train.rollout` draws answers and returns the s of each token beside them; a policy
    gradient (GRPO, trl) reads the log probabilities of model(ids, soft=s), the same numbers in one forward, in which s
    is data. W_r, W_i and Λ, ``*.thinking.*``, have learning rates of their own. There is no form that skips: each
    thought costs one product of p with E, as much as the logits themselves.
    """
    return (Think(Selector.parse(sites).out, soft, until, start),)
