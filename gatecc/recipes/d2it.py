"""D²iT: coarse tokens where an image has little detail."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.grains import Grains
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "d2it",
    citation="D²iT: Dynamic Diffusion Transformer for Accurate Image Generation (CVPR 2025), a reading of its abstract",
    cases=[Case(samples.picture_patches, ("cost", "export", "reversible"))],
)
def d2it(
    ratio: float = 0.5,
    sites: str = "block[...]",
    size: int = 2,
    map: str = "",
    grid: tuple[int, ...] = (),
) -> tuple[Rewrite, ...]:
    """Blocks run on fine tokens in the regions with the most entropy, and on one coarse token for each other region.

    Of R regions of ``size`` by ``size`` tokens the ``ratio`` with the largest entropy is fine: the blocks see
    size² fine + coarse tokens (and those before the grid), and behind them each token of a coarse region is the
    region's. The number of tokens is the same for all samples, so that training and inference are one graph, and
    nothing is masked: what is left out is left out in both. The entropy is that of the model's first input; where that
    is noise, as in a diffusion model, ``map`` names an input (B, R) with a number for each region, such as a grain
    transformer predicts: the largest are fine. With ``ratio=1`` the model is the original, bitwise.

    ``sites`` selects blocks from the first to the last that has grains. Rewrites inside of them come before this one.
    On a CPU a ViT-S with a quarter of its regions fine takes 0.55 to 0.65 of the time (benchmarks/dynamic.py, grains).
    There is no parameter; the model is trained on its two grains afterwards.
    """
    return (Grains(Selector.parse(sites), ratio, size, map, grid),)
