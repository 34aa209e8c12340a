"""Multi-scale gates: a decoder's convolutions see what its own maps call foreground."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.map_gate import MapGate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "multi-scale-gates",
    citation="Learning to Segment from Scribbles using Multi-scale Adversarial Attention Gates (IEEE TMI 2021)",
    cases=[
        Case(samples.pictures, ("cost", "export", "gradient", "reversible"), {"classes": 3}),
        Case(samples.pictures, ("identity", "reversible"), {"background": 1e-6}),
    ],
)
def multi_scale_gates(
    sites: str = "conv[...]",
    classes: int = 2,
    background: float = 0.0,
) -> tuple[Rewrite, ...]:
    """Each convolution of a decoder is off where a map at its scale says background, and the maps are outputs, too.

    A = softmax_c(conv1x1(f)) for the convolution's input f, and y = conv(f) ⊙ Σ_(c >= 1) A_c: class 0 is background.
    ``sites`` are the decoder's convolutions, at its scales, such as ``conv[decoder.*]``; of a convolution with strides
    the map is read at the nearest pixels. The maps start at random as in the paper, or with ``background`` at one share
    of it everywhere: 1e-6 is nearly the original, with gradients as small.

    `gatecc.train.class_maps` returns a call's output and its maps, with gradients. The paper trains them against a
    discriminator that reads all scales, on masks of other images: `gatecc.train.mask_pyramid` brings real masks to the
    maps' scales; the discriminator and its least-squares loss are the user's. Maps are shares, none of which is exactly
    0, so there is no form that skips pixels.
    """
    return (MapGate(Selector.parse(sites).out, classes, background),)
