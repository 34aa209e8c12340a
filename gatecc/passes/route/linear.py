"""A linear layer as a feed-forward network without a nonlinearity, so that experts can take its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gatecc.errors import SiteRefusedError
from gatecc.ir.program import Program, attribute
from gatecc.ir.site import Linear, Site
from gatecc.passes.operands import place, stage
from gatecc.passes.route.ffn import FFN, Stacked, oriented, rows_of


@dataclass(frozen=True)
class Matrix(FFN):
    """``W = down @ up`` with min(d, o) hidden features. ``directions``: these are the singular directions, the
    strongest first, so that a part of them is the best approximation of its rank; else one of the two is the
    identity.
    """

    directions: bool = False

    @property
    def bias(self) -> tuple[bool, bool]:
        return False, self.weights["weight"].bias is not None

    @property
    def last(self) -> str:
        return self.weights["weight"].fqn.rpartition(".")[0]

    def stacked(self, read: Callable[[str], Tensor]) -> Stacked:
        weight = self.weights["weight"]
        matrix = oriented(weight, read(weight.fqn))
        bias = None if weight.bias is None else rows_of(weight, read(weight.bias))
        return Stacked(*self._factors(matrix), bias)

    def _factors(self, matrix: Tensor) -> tuple[Tensor, None, Tensor]:
        out, width = matrix.shape
        if matrix.is_meta:
            return matrix.new_empty(self.hidden, width), None, matrix.new_empty(out, self.hidden)
        if self.directions:
            u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
            root = s.sqrt()
            return (root[:, None] * vh).to(matrix.dtype), None, (u * root).to(matrix.dtype)
        eye = torch.eye(self.hidden, device=matrix.device, dtype=matrix.dtype)
        return (matrix, None, eye) if out <= width else (eye, None, matrix)


def read_linear(site: Site, program: Program, *, directions: bool) -> Matrix:
    """The formula of a linear site. Raises SiteRefusedError."""
    given, out = stage(site, "in"), stage(site, "out")
    weight = site.weights.get("weight")
    if not isinstance(site, Linear) or weight is None or given.axes[-1] != "c" or out.axes[-1] != "c":
        raise SiteRefusedError(
            "this is no linear layer that experts can compute",
            where=place(site),
            found=f"a site of kind {site.kind}, axes {given.axes} in, {out.axes} out",
            expected="a product with one parameter, channels as the last axis",
            do="leave this site out",
        )
    out_features, width = oriented(weight, attribute(program.module, program.relative_name(weight.fqn))).shape
    hidden = min(width, out_features)
    return Matrix(dict(site.weights), "plain", width, hidden, out_features, "identity", directions)
