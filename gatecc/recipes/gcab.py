"""Gated class-attention: masks of channels for each task, in class-attention and the layer behind it."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.task_mask import TaskMask
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "gcab",
    citation="Gated Class-Attention with Cascaded Feature Drift Compensation for Exemplar-free Continual Learning of "
    "Vision Transformers (2022)",
    cases=[Case(samples.conditioned, ("identity", "cost", "export", "reversible"), {"tasks": 3})],
)
def gcab(
    tasks: int,
    task: str = "task",
    attention: str = "attention[-1]",
    mlp: str = "mlp[-1]",
    start: float = 6.0,
) -> tuple[Rewrite, ...]:
    """Each of ``tasks`` has masks over the channels of the last attention and of the MLP behind it.

    m_t = σ(s e_t) multiplies what the query projection reads (in class-attention, the class token), the queries, what
    keys and values are computed from, the keys, the result of attention before and behind the output projection, and
    the hidden units and the output of the MLP. ``task`` is the input of the model, (B,) of int64, that numbers the task
    of each sample. Every e starts at ``start``, so that all channels are on and the model is the original. The defaults
    select the last block, whatever its attention is; for all class-attention name it:
    ``attention="attention[*blocks_token_only*]"`` (CaiT), ``"attention[*cls_attn*]"`` (XCiT), and the MLPs likewise.

    `gatecc.train.task_training` trains one task after another: it anneals s from 1/s_max to s_max in each epoch,
    guards what earlier tasks use, by 1 - their masks together, and has the loss Σ m (1 - c) / Σ (1 - c).
    `gatecc.train.FeatureDrift` is the compensation of drift: the distance of projected features from those before.
    Masks of earlier tasks are 1[m > 1/2]. So are all masks in eval: there a channel that is off is neither read nor
    computed, and the samples of one task share a product (`gatecc::masked_linear`). With a quarter of the channels on,
    a ViT-S whose blocks all have masks takes 0.5 to 0.65 of the time (benchmarks/dynamic.py, tasks); class-attention
    is so small a part of a CaiT that a batch of eight takes 0.95 and a single image no less. On a GPU, where reading
    masks would wait for the device, every channel is computed.
    """
    sites = (f"{attention}.out", f"{mlp}.out")
    return tuple(TaskMask(Selector.parse(site), tasks, task, start) for site in sites)
