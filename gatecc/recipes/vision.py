"""Linear attention for images: ViG and LINA, each with a convolution over the grid of patches."""

from __future__ import annotations

from typing import Any

from gatecc.ir.rewrite import Rewrite
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.grid import GridConv
from gatecc.passes.mix.mix import Mix
from gatecc.passes.mix.mixers.lina import Lina
from gatecc.passes.mix.mixers.vig import ViG
from gatecc.recipes import samples
from gatecc.recipes.linearize import chosen
from gatecc.recipes.registry import Case, recipe


@recipe(
    "vig",
    citation="ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention (2024)",
    cases=[Case(samples.patches, ("cost", "gradient", "reversible"))],
)
def vig(
    sites: str = "attention[...]",
    keep: str = "",
    conv: int = 3,
    prefix: int = 0,
    rows: int = 0,
    columns: int = 0,
    rank: int = 16,
    normalizer: float = 16.0,
    rope: bool = False,
    start: str = "published",
) -> tuple[Rewrite, ...]:
    """Gated linear attention forwards and backwards over the patches of an image, blended with a local path.

    x <- silu(a depthwise convolution of x over the grid) first, for everything that the attention reads; q, k and v are
    shared by both directions, the decays come from one projection of ``rank``; then o = g * norm((o_f + o_b) / 2) +
    (1 - g) * norm(x), g = sigmoid(W x + b). ``conv=0`` leaves the convolution out. The first ``prefix`` tokens (1 for a
    class token) are not convolved; the others are ``rows`` by ``columns`` patches, a square where these are 0.

    ``start="identity"`` adds the convolution to x instead and begins it with zeros, which leaves pretrained projections
    their input. ``rope`` keeps rotary embeddings where the model has them.
    """
    where = chosen(sites, keep)
    window: dict[str, Any] = {"prefix": prefix, "rows": rows, "columns": columns, "bias": False}
    mix = Mix(where, ViG(rank, normalizer, rope))
    if not conv:
        return (mix,)
    if start == "identity":
        return Branch(where.hidden, GridConv(conv, "silu", start="zero", **window), label="local"), mix
    return Branch(where.hidden, GridConv(conv, "silu", rest="keep", **window), label="local", op="lerp"), mix


@recipe(
    "lina",
    citation="LINA, linear attention for image generation with gates on keys and values",
    cases=[Case(samples.patches, ("cost", "gradient", "reversible"))],
)
def lina(
    sites: str = "attention[...]",
    keep: str = "",
    conv: int = 5,
    prefix: int = 0,
    rows: int = 0,
    columns: int = 0,
    start: str = "published",
) -> tuple[Rewrite, ...]:
    """Divided linear attention with relu features, and learned constants of shape (heads, tokens) on keys and values.

    q <- relu(q) + 1e-6, k <- (relu(k) + 1e-6) * kappa, v <- v * nu, kappa and nu 1 at first; y = q (k^T v) / (q · sum
    k), to which a depthwise convolution of the attention's input over the grid of image tokens is added, before the
    output projection. The constants fix the number of tokens. The first ``prefix`` tokens (the text) are not in the
    grid; the others are ``rows`` by ``columns``, a square where these are 0. ``conv=0`` leaves the convolution out,
    ``start="identity"`` begins it with zeros.
    """
    where = chosen(sites, keep)
    mix = Mix(where, Lina())
    if not conv:
        return (mix,)
    first = "zero" if start == "identity" else "random"
    window = GridConv(conv, of="hidden", prefix=prefix, rows=rows, columns=columns, start=first)
    return mix, Branch(where.heads, window, label="local")
