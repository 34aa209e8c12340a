"""Whether two tensors are the same sequence: queries and keys of self-attention, as opposed to cross-attention."""

from __future__ import annotations

from torch import fx

from gatecc.ir.dataflow import Flow, value_inputs
from gatecc.ir.ops import CASTS, DROPOUTS, VIEWS, opname

# What prepares a stream for a projection: norms, positions, pooling, splitting into windows.
_PREPARES = (
    VIEWS
    | CASTS
    | DROPOUTS
    | frozenset(
        "add mul sub div pow rsqrt mean sum var layer_norm rms_norm batch_norm group_norm instance_norm conv1d "
        "conv2d conv3d "
        "linear addmm cat pad constant_pad_nd avg_pool1d avg_pool2d max_pool2d adaptive_avg_pool2d gelu silu "
        "relu sigmoid "
        "upsample_nearest2d neg sqrt".split()
    )
)
_STEPS = 24


def same_stream(one: fx.Node, other: fx.Node, flow: Flow) -> bool:
    """Whether both are prepared from a common tensor within a few steps, each through norms, positions and views."""
    if one is other:
        return True
    return bool(_prepared_from(one, flow) & _prepared_from(other, flow))


def _prepared_from(node: fx.Node, flow: Flow) -> set[fx.Node]:
    """The tensors that hold data and that ``node`` is prepared from, itself included, stopping at sums of two
    streams."""
    reached: set[fx.Node] = set()
    frontier = [node]
    while frontier and len(reached) < _STEPS:
        current = frontier.pop(0)
        if current in reached or not _holds_stream(current, flow):
            continue
        reached.add(current)
        sources = [n for n in value_inputs(current) if _holds_stream(n, flow)]
        if opname(current) in _PREPARES:
            frontier.extend(sources)
    return reached


def _holds_stream(node: fx.Node, flow: Flow) -> bool:
    return node in flow.data or (node not in flow.raw)
