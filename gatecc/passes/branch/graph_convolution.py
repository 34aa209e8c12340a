"""GraphConvolution: each token takes from its neighbours in a graph that the model is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import shape
from gatecc.ir.site import Site, Value
from gatecc.ir.sizes import on_example
from gatecc.passes.branch.body import Body, operand
from gatecc.passes.operands import beside, condition, place


@dataclass(frozen=True)
class GraphConvolution(Body, tag="graph_convolution"):
    """relu(sum_k P^k x W_k + b), k = 0 to ``order``, P = D^-1 A: the rows of A divided by their sums.

    ``adjacency`` names an input of the model with the weights of the edges, not negative, (N, N) or (B, N, N): row i
    says from whom token i takes. A token without neighbours takes nothing. ``of``: the stage that is read.
    """

    adjacency: str
    order: int = 1
    of: str = "self"

    def check(self) -> None:
        self.require(self.order > 0, "order", "a positive number")

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.of == "self" else (self.of,)

    @property
    def effects(self) -> Effects:
        return Effects(whole_model=True, loses_cache=True, same_for_layers=True)

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        source, channels, width = operand(site, value, self.of)
        edges = condition(self.adjacency, edit.program, value).node
        sizes = [on_example(size) for size in shape(edges)]
        tokens = on_example(shape(source.node)[1]) if source.axes == "bnc" else None
        if len(sizes) not in (2, 3) or sizes[-2:] != [tokens, tokens]:
            raise SiteRefusedError(
                "the graph does not have the tokens of this value as its nodes",
                where=place(site),
                found=f"{self.adjacency} {tuple(sizes)}, a value with the axes {source.axes} and {tokens} tokens",
                expected="a value bnc, and edges (N, N) or (B, N, N) between its tokens",
                do="select the sites whose tokens are the nodes",
            )
        path = edit.module("graph", lambda: beside(Graph(channels, width, self.order), edit))
        return edit.call(path, source.node, edges, name="graph")


class Graph(nn.Module):
    """The module of `GraphConvolution`. x: (B, N, C), edges: (N, N) or (B, N, N) -> (B, N, O)."""

    def __init__(self, channels: int, width: int, order: int) -> None:
        super().__init__()
        self.weight = nn.Linear((order + 1) * channels, width)
        self.order = order

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        edges = edges.to(x.dtype)
        total = edges.sum(-1, keepdim=True)
        step = edges / torch.where(total == 0, torch.ones_like(total), total)
        hops = [x]
        for _ in range(self.order):
            hops.append(step @ hops[-1])
        return torch.relu(self.weight(torch.cat(hops, -1)))
