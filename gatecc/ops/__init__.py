"""Operators, one package or file each. Importing this package registers them: see gatecc.ops.registry."""

from gatecc.ops import (
    attention,
    block_gate,
    cached_attention,
    carried,
    estimators,
    evicted_attention,
    gated_conv,
    group_linear,
    grouped,
    kept_graphs,
    linear,
    linear_attention,
    moe_ffn,
    only_if,
    rnn,
    routing,
    sequences,
    short_convolution,
    spike,
    transient,
)

kept_graphs.tell()

__all__ = [
    "attention",
    "block_gate",
    "cached_attention",
    "carried",
    "estimators",
    "evicted_attention",
    "gated_conv",
    "group_linear",
    "grouped",
    "linear",
    "linear_attention",
    "moe_ffn",
    "only_if",
    "rnn",
    "routing",
    "sequences",
    "short_convolution",
    "spike",
    "transient",
]
