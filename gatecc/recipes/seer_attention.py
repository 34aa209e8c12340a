"""SeerAttention: a learned gate that chooses blocks of keys for blocks of queries."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.attention_edit.attention_edit import AttentionEdit
from gatecc.passes.attention_edit.blocks import Blocks
from gatecc.passes.attention_edit.token_blocks import TokenBlocks
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "seer-attention",
    citation="SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs (2024)",
    cases=[
        Case(samples.language, ("identity", "cost", "reversible"), {"block": 2, "width": 4, "share": 1.0}),
        Case(samples.language, ("causality", "export"), {"block": 2, "width": 4}),
        Case(samples.language_in_training, ("gradient",), {"block": 2, "width": 4}),
        Case(
            samples.language,
            ("identity", "cost", "reversible"),
            {"block": 2, "width": 4, "share": 1.0, "pool_queries": False},
        ),
        Case(
            samples.language,
            ("causality", "export", "state"),
            {"block": 2, "width": 4, "share": 0.6, "pool_queries": False},
        ),
        Case(samples.language_in_training, ("gradient",), {"block": 2, "width": 4, "pool_queries": False}),
        Case(samples.sequences, ("export",), {"block": 4, "width": 4, "threshold": 0.3}),
    ],
)
def seer_attention(
    sites: str = "attention[...]",
    block: int = 64,
    width: int = 32,
    share: float = 0.5,
    threshold: float | None = None,
    joint: bool = False,
    pool_queries: bool = True,
) -> tuple[Rewrite, ...]:
    """Let a block of queries see those blocks of keys alone that a small gate chooses from their pools.

    Queries and keys before the rotary embedding are pooled over blocks of ``block`` tokens (mean, maximum and minimum,
    joined), mapped per head to ``width`` features and turned by the place of their block: s_ij = q_i k_j / sqrt(width).
    Row i of the blocks keeps the best ``share`` of those that it may see, or with ``threshold`` those whose softmax
    exceeds it; always itself and the first. ``share=1`` keeps all, and computes what the model did. Either number is
    the buffer ``gate.cut``, a dial of the finished model. Rows and heads need different numbers of blocks: at the same
    share in all, a threshold keeps more of what the model was. Padding is pooled nowhere, and the last block may be
    short.

    The gate learns by ``gatecc.train.heal(model, None, data, tune=Tune(steps, train=("*gate.*",)))`` or any training
    with the rest frozen: in training mode attention is dense, and the loss of a gate, KL(p || softmax(s)), where p is
    the largest attention weight in each block divided by the sum of its row, enters in the backward pass. The task's
    loss does not reach it. ``joint`` trains a model with what its gates choose, on top.

    In eval mode ``gatecc::attention`` gets the chosen blocks: its kernels compute no others, and its formula masks them
    where a gradient is wanted. Pooled queries see their whole block, so a causal model is causal for blocks, not for
    tokens, and no decoder steps through it.

    ``pool_queries=False`` is the form for decoding: each token asks by itself, with the mean of the queries of the
    heads that share a key head, and chooses among the whole blocks before its own; its own and the first are always
    kept. It learns as above, of the largest weights in a group's heads. The model stays causal for tokens. A step of
    the decoder holds the features of whole blocks and the pools of the one that is not whole, and reads the keys and
    values of the chosen blocks alone; calls with several tokens mask, in decode.onnx there is no such cache.
    """
    change = Blocks if pool_queries else TokenBlocks
    return (AttentionEdit(Selector.parse(sites), change(block, width, share, threshold, joint), label="gate"),)
