"""Linear attention in the place of softmax attention: GLA, retention, the delta rule, scalar decay."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.init import Random
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.gate import Gate
from gatecc.passes.mix.mix import Mix
from gatecc.passes.mix.mixers.decay import LowRank, Retention, Scalar
from gatecc.passes.mix.mixers.features import FeatureMap, UnitMap
from gatecc.passes.mix.mixers.linear import Linear
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


def chosen(sites: str, keep: str) -> Selector:
    """The attention sites to convert: ``sites`` without those that ``keep`` names ("3::4", "0,-1", a glob)."""
    selector = Selector.parse(sites)
    return selector.but(Selector.parse(f"{selector.kind}[{keep}]").where) if keep else selector


def output_gate(where: Selector) -> Gate:
    """swish(W hidden) on each element of the heads, as the published layers have it."""
    return Gate(where.heads, GateSpec("hidden", "linear(bias=False)", "element", "silu", init=Random()), label="gate")


@recipe(
    "gla",
    citation="Gated Linear Attention Transformers with Hardware-Efficient Training (2024)",
    cases=[Case(samples.language, ("causality", "cost", "gradient", "state", "reversible"))],
)
def gla(
    sites: str = "attention[...]",
    keep: str = "",
    feature: str = "none",
    rope: bool = False,
    rank: int = 16,
    normalizer: float = 16.0,
    bias: float = 0.0,
    longest: float = 0.0,
    normalize: bool = False,
    norm: bool = True,
    norm_weight: float = 1.0,
    gate: bool = True,
    conv: int = 0,
) -> tuple[Rewrite, ...]:
    """Gated linear attention: S <- diag(a) S + k v^T with a decay per key channel that is read from the input.

    a = exp(logsigmoid(W2 W1 x + b) / ``normalizer``) with W1 of rank ``rank``; each head of the output is normalised
    (``norm``) and multiplied by swish(W x) (``gate``): the published layer, for training from scratch. A converted
    model heals faster from ``feature="hedgehog(temperature=1.0)", rope=True, normalize=True, norm=False, gate=False,
    conv=4, longest=256``: an average of values at first, with memories of 2 to 256 tokens. ``keep="3::4"`` leaves every
    fourth attention as it is.
    """
    where = chosen(sites, keep)
    mixer = Linear(
        FeatureMap.parse(feature),
        LowRank(rank, normalizer, bias, longest=longest),
        rope=rope,
        normalize=normalize,
        norm="rms" if norm else "none",
        norm_weight=norm_weight,
        conv=conv,
    )
    return (Mix(where, mixer), *((output_gate(where),) if gate else ()))


@recipe(
    "retention",
    citation="Retentive Network: A Successor to Transformer for Large Language Models (2023)",
    cases=[Case(samples.language, ("causality", "cost", "gradient", "state", "reversible"))],
)
def retention(sites: str = "attention[...]", keep: str = "", gate: bool = True) -> tuple[Rewrite, ...]:
    """Retention: linear attention that forgets at a constant rate per head, log(1 - 2^-(5+h)).

    Rotary embeddings stay, each head of the output is normalised and multiplied by swish(W x) (``gate``). The
    rates are constants: nothing that decides what is forgotten is computed from the input or trained.
    """
    where = chosen(sites, keep)
    return (
        Mix(where, Linear(decay=Retention(), rope=True, norm="rms")),
        *((output_gate(where),) if gate else ()),
    )


@recipe(
    "gated-delta-net",
    citation="Gated Delta Networks: Improving Mamba2 with Delta Rule (2025)",
    cases=[Case(samples.language, ("causality", "cost", "gradient", "state", "reversible"))],
)
def gated_delta_net(
    sites: str = "attention[...]",
    keep: str = "",
    conv: int = 4,
    gate: bool = True,
    start: str = "published",
    form: Literal["published", "qwen3-next"] = "published",
    eps: float = 1e-6,
) -> tuple[Rewrite, ...]:
    """The gated delta rule: S <- a S + k (beta (v - a S^T k))^T, with unit queries and keys.

    a = exp(-exp(A) softplus(W x + b)) and beta = sigmoid(W x), one number per head. ``conv`` taps of a causal
    convolution run over q, k and v first, the identity at first; ``start="slow"`` begins with hardly any decay.

    ``form="qwen3-next"``: as the linear layers of Qwen3-Next compute it, for `gatecc.to_transformers`: a SiLU after the
    convolution, no norms of queries and keys before it, and ``eps`` in the norm of the output: the model's
    rms_norm_eps.
    """
    where = chosen(sites, keep)
    if form == "qwen3-next":
        unit, decay = UnitMap(smooth=True), Scalar("slow" if start == "slow" else "published")
        qwen = Linear(unit, decay, rule="delta", norm="rms", conv=conv, activation="silu", linear=True, norm_eps=eps)
        return (Mix(where, qwen), *((output_gate(where),) if gate else ()))
    mixer = Linear(UnitMap(), Scalar("slow" if start == "slow" else "published"), rule="delta", norm="rms", conv=conv)
    return (Mix(where, mixer), *((output_gate(where),) if gate else ()))


@recipe(
    "scalar-decay",
    citation="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space "
    "Duality (2024), its decay",
    cases=[Case(samples.language, ("causality", "cost", "gradient", "state", "reversible"))],
)
def scalar_decay(
    sites: str = "attention[...]", keep: str = "", conv: int = 0, gate: bool = True, start: str = "published"
) -> tuple[Rewrite, ...]:
    """Linear attention with the decay of Mamba-2: one number per head and token, exp(-exp(A) softplus(W x + b)).

    ``conv`` taps of a causal convolution run over q, k and v first; ``start="slow"`` begins with hardly any decay.
    """
    where = chosen(sites, keep)
    mixer = Linear(decay=Scalar("slow" if start == "slow" else "published"), norm="rms", conv=conv)
    return (Mix(where, mixer), *((output_gate(where),) if gate else ()))
