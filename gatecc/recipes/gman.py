"""Gated fusion of a spatial and a temporal branch (GMAN, STTN)."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.bottleneck import Bottleneck
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.graph_convolution import GraphConvolution
from gatecc.passes.fuse import Fuse
from gatecc.recipes import streams
from gatecc.recipes.registry import Case, recipe


@recipe(
    "gman",
    citation="GMAN: A Graph Multi-Attention Network for Traffic Prediction (2020)",
    cases=[
        Case(streams.parallel, ("causality", "cost", "gradient", "export", "state", "reversible")),
        Case(streams.parallel, ("identity", "causality", "gradient"), {"scale": 2.0}),
        Case(streams.parallel, ("gradient", "reversible"), {"width": 8}),
    ],
)
def gman(
    sites: str = "merge[...]",
    spatial: str = "in0",
    temporal: str = "in1",
    granularity: Literal["element", "channel", "token", "scalar"] = "element",
    scale: float = 1.0,
    width: int = 0,
) -> tuple[Rewrite, ...]:
    """z * H_S + (1 - z) * H_T with z = sigmoid(W [H_S; H_T] + b), in the place of the sum of two parallel branches.

    ``sites`` are the joins of the branches, ``spatial`` and ``temporal`` their two parts: stages of the join, or values
    of other sites (``at("attention[temporal.*].out")``, the k-th for the k-th). z is one number for each element, and
    starts at 1/2. ``scale=2`` doubles the fusion, which then starts as the sum H_S + H_T. With ``width`` two linear
    layers follow with a ReLU between them, as in the paper; they start at random, so the model has to be trained.

    Both branches are computed whatever z is: it is seldom 0 for all channels of a token, and what one token leaves out
    its branch computes for the others. So there is no form that skips, and none is claimed to be faster.
    """
    gate = GateSpec.parse(f"fused(0)+fused(1), linear, {granularity}, sigmoid, init=zero")
    joined = Fuse(Selector.parse(sites).out, gate, (spatial, temporal), scale, "fusion_gate")
    if not width:
        return (joined,)
    layers = Bottleneck(width, activation="relu", of="self", start="random")
    return joined, Branch(Selector.parse(sites).out, layers, label="fusion_layers", op="lerp")


@recipe(
    "sttn",
    citation="Spatial-Temporal Transformer Networks for Traffic Flow Forecasting (2020)",
    cases=[Case(streams.nodes, ("cost", "gradient", "export", "reversible"))],
)
def sttn(
    adjacency: str = "adjacency", sites: str = "attention[...]", order: int = 1, init: str = "zero"
) -> tuple[Rewrite, ...]:
    """g * U_S + (1 - g) * X_G, U_S the attention's output and X_G a convolution over a fixed graph of the tokens.

    X_G = relu(sum_k (D^-1 A)^k x W_k), k up to ``order``, of what the attention reads; ``adjacency`` is an input of the
    model, (N, N) or (B, N, N), whose rows are divided by their sums. g = sigmoid(f_s(U_S) + f_g(X_G)), both linear: one
    linear map of both. It starts at 1/2; with ``init="identity(how=bias)"`` at 0.9975, nearly the attention alone.

    Both values are computed whatever g is, for it differs from channel to channel; there is no form that skips.
    """
    gate = GateSpec.parse(f"fused(0)+fused(1), linear, element, sigmoid, init={init}")
    graph = GraphConvolution(adjacency, order, of="hidden")
    return (Fuse(Selector.parse(sites).out, gate, ("self", str(graph)), label="graph_gate"),)
