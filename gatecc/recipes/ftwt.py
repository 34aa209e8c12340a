"""FTWT: channels of a convolution that fire together are wired together: predicted from what came before, and left
out."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.estimator import Supervised
from gatecc.ir.gates.label import TopKMass
from gatecc.ir.gates.source import Pool, Stage
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.gate_channels import GateChannels
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "ftwt",
    citation="Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction (CVPR 2022)",
    cases=[Case(samples.pictures, ("identity", "cost", "export", "reversible"))],
)
def ftwt(
    sites: str = "conv[1:]", r: float = 0.7, joint: bool = False, weight: float = 1.0, scorer: str = "linear"
) -> tuple[Rewrite, ...]:
    """Leave out channels of each convolution for each image, predicted from what the convolution reads.

    y <- m * act(norm(conv(x))), m = 1[sigmoid(z) > 1/2], z = W max(x) + b: a number per output channel from the largest
    value of each input channel.

    While it trains, every channel is computed and the labels of m are those with the largest mass |y|: the fewest that
    hold the part ``r`` of it. Their cross entropy, times ``weight``, enters in the backward pass. Decoupled, it trains
    the gates and nothing else, and the task trains the rest with the masks in place; ``joint`` lets each reach the
    other: the labels' loss what the gates read, and the task's the gates, straight through. ``r=1`` labels every
    channel. ``gatecc.train.channel_costs`` says what an r costs, on the labels before training and on the gates after.

    It starts with every channel on, as the original exactly, and stays there with ``r=1``. In inference what is off is
    not computed, and the convolution after it does not read it. On one thread of a CPU each sample of a batch computes
    its own channels; on several a batch computes those that any of its samples has on, where that is less work; a GPU
    computes all of them. ``sites`` leaves the first convolution out: nothing comes before it. Grouped convolutions of
    several channels per group are refused: select the others.
    """
    estimator = Supervised(TopKMass(r), weight=weight, joint=joint)
    spec = GateSpec(Pool(Stage("in"), "max", stop=not joint), scorer, "channel", "sigmoid", estimator)
    return (GateChannels(Selector.parse(sites), spec),)
