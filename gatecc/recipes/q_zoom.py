"""Q-Zoom: a first pass decides, sample by sample, who is looked at again at a higher resolution, and where."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.zoom import NEVER, Zoom
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "q-zoom",
    citation="Q-Zoom: query-aware adaptive perception for multimodal models (2025)",
    cases=[
        Case(samples.two_scales, ("identity", "reversible")),
        Case(samples.two_scales, ("cost", "export", "reversible"), {"threshold": 0.0, "joined": False}),
    ],
)
def q_zoom(
    sites: str = "block[0]",
    threshold: float = NEVER,
    fine: str = "fine",
    share: float = 0.5,
    size: int = 32,
    grid: tuple[int, ...] = (),
    joined: bool = True,
) -> tuple[Rewrite, ...]:
    """A twig on an early block says whether a sample is looked at again, and where: a region at a higher resolution.

    The twig attends from the mean of the block's tokens to each of them, p = softmax(q·k / sqrt(d)). A sample zooms if
    σ(w·Σ p v + b) >= ``threshold``; the region, ``share`` of each side, is centred on the mean of the places under p,
    cut out of the input ``fine`` (B, C, H', W') and brought to the size of the image. It goes through the model with
    the same weights, and the result is the mean of both passes' logits (``joined=False``: the second's). The paper
    puts the tokens of the region beside those of the image, in a language model that takes any number of them; models
    of images take one number, so here answers meet and not tokens.

    Each sample decides by itself: in a batch the second pass runs for those that zoom, and not at all if none does (the
    authors' code asks whether all of them agree). Above 1, the start, nobody zooms and the model is the original,
    bitwise; at 0 everybody does. Exports hold an If at batch 1.

    A model as it comes has no input ``fine``: `gatecc.train.TwoScales(model)` gives it one; ``fine=""`` cuts the region
    out of the image itself. `gatecc.train.fit_zoom` trains the twig with the model frozen: the gate on whether the
    first pass is wrong and the second right, the region by the second's loss (the paper distils its map from the
    model's own attention). Then the threshold, ``*.twig.threshold``, may be moved.
    """
    return (Zoom(Selector.parse(sites).out, threshold, fine, share, size, grid, joined),)
