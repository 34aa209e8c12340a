"""NearestDistances: how far the neighbours of each token are, as an embedding."""

from __future__ import annotations

from dataclasses import dataclass

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
class NearestDistances(Body, tag="nearest_distances"):
    """W d + b, d the distances from each token to the ``k`` that are nearest to it, the nearest first.

    ``of`` names an input of the model, (B, N, N), row i the distances from token i; that of a token to itself, the
    least of its row, is left out. Rows need more than ``k`` tokens.
    """

    of: str
    k: int = 8

    def check(self) -> None:
        self.require(self.k > 0, "k", "a positive number")

    @property
    def effects(self) -> Effects:
        return Effects(whole_model=True, loses_cache=True, same_for_layers=True)

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        _, _, width = operand(site, value, "self")
        given = condition(self.of, edit.program, value).node
        sizes = [on_example(size) for size in shape(given)]
        tokens = on_example(shape(value.node)[1]) if value.axes == "bnc" else None
        if len(sizes) != 3 or sizes[1:] != [tokens, tokens] or (tokens or 0) <= self.k:
            raise SiteRefusedError(
                "the distances are not those between the tokens of this value",
                where=place(site),
                found=f"{self.of} {tuple(sizes)}, a value with the axes {value.axes} and {tokens} tokens, k={self.k}",
                expected="a value bnc with more than k tokens, and distances (B, N, N) between them",
                do="select the embedding of the tokens, and choose a smaller k",
            )
        path = edit.module("distances", lambda: beside(Nearest(self.k, width), edit))
        return edit.call(path, given, name="distances")


class Nearest(nn.Module):
    """The module of `NearestDistances`. distances: (B, N, N) -> (B, N, O)."""

    def __init__(self, k: int, width: int) -> None:
        super().__init__()
        self.k, self.embed = k, nn.Linear(k, width)

    def forward(self, distances: Tensor) -> Tensor:
        nearest = distances.topk(self.k + 1, largest=False).values[..., 1:]
        return self.embed(nearest.to(self.embed.weight.dtype))
