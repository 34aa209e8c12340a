"""Max-Former: a spiking transformer whose early stages have convolutions, and a max-pool behind its patches."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.max_pool import MaxPool
from gatecc.passes.loop import Loop
from gatecc.passes.loop.carry import Spikes
from gatecc.passes.loop.merge import Mean
from gatecc.passes.mix.mix import Mix
from gatecc.passes.mix.mixers.spiking import SpikingAttention, SpikingConv
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "max-former",
    citation="Spiking Transformers Need High-Frequency Information (Max-Former, 2025)",
    cases=[
        Case(
            samples.picture_patches,
            ("cost", "gradient", "export", "reversible"),
            {"kernels": (3,), "steps": 2, "threshold": 0.3},
        )
    ],
)
def max_former(
    steps: int = 4,
    kernels: tuple[int, ...] = (3, 5, 7),
    late: str = "",
    embedding: str = "embedding[...].out",
    pool: int = 3,
    sites: str = "model[...].out",
    threshold: float = 1.0,
    decay: float = 1.0,
    scale: float = 0.0,
    prefix: int = 0,
    rows: int = 0,
    columns: int = 0,
    replaces: tuple[str, ...] = ("relu", "gelu", "silu"),
) -> tuple[Rewrite, ...]:
    """A vision transformer as a spiking network: convolutions early, attention of spikes late, over ``steps`` steps.

    The first layers have a depthwise convolution over the grid of tokens in the place of attention and its projections,
    with a window of ``kernels``: a layer for each number. The others (or those that ``late`` selects) have attention of
    spikes without a softmax, s(scale s(q) (s(k)^T s(v))) (Spikformer); ``scale`` 0 is that of the attention before.
    Behind the patch embedding the largest spike in a window of ``pool`` by ``pool`` is taken: it is a spike again, and
    keeps the high frequencies that a mean takes away. s, and every activation named in ``replaces``, is an
    integrate-and-fire neuron (`tsm-conv`) of ``threshold`` and ``decay``, whose membrane starts at 0. The result is
    the mean over the steps. The first ``prefix`` tokens (1 for a class token) are in no grid; the others are ``rows``
    by ``columns`` patches, a square where these are 0.

    No identity: the model is trained afterwards, with the surrogate gradient of the spikes. There is no skipping form:
    which spikes are 0 differs from unit to unit, and on a CPU or GPU a step costs the products of a step. What is saved
    is attention's: an early layer costs its convolution alone.
    """
    early = len(kernels)
    grid = {"prefix": prefix, "rows": rows, "columns": columns}
    mixed = [Mix(Selector.parse(f"attention[{i}]"), SpikingConv(k, **grid)) for i, k in enumerate(kernels)]
    late = late or f"attention[{early}:]"
    pooled = (Branch(Selector.parse(embedding), MaxPool(pool), label="pool", op="lerp"),) if pool else ()
    ours = ("mix", "branch")
    spikes = Spikes(threshold=threshold, decay=decay, start_at=0.0, replaces=replaces, of_rewrites=ours)
    loop = Loop(Selector.parse(sites), steps, spikes, Mean())
    return (*mixed, Mix(Selector.parse(late), SpikingAttention(scale)), *pooled, loop)
