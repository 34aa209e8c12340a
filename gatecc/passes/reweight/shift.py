"""Shift: the rows of MLP projections that point most against a direction are moved along it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, exact
from gatecc.ir.site import MLP, Site, Weight
from gatecc.ir.weights import Effect, ShiftRows
from gatecc.passes.operands import place
from gatecc.passes.reweight.weight_edit import WeightEdit


@dataclass(frozen=True)
class Shift(WeightEdit, tag="shift"):
    """w <- w + alpha v for the ``count`` rows w, of all selected MLPs together, with the least cos(w, v).

    ``direction`` is v, as wide as what the MLPs read. ``weight`` names the projection: its gate, or up. ``alpha=0``
    changes nothing.
    """

    direction: tuple[float, ...]
    alpha: float = 1.0
    count: int = 16384
    weight: Literal["gate", "up"] = "gate"

    def check(self) -> None:
        self.require(any(self.direction), "direction", "a vector that is not 0")
        self.require(self.count > 0, "count", "the number of rows that are shifted, at least 1")

    @property
    def contract(self) -> Contract:
        return changes_function() if self.alpha else exact()

    def at(self, model: nn.Module, sites: Sequence[Site]) -> Sequence[Effect]:
        if not self.alpha:
            return ()
        v = torch.tensor(self.direction, dtype=torch.float64)
        found = [_rows(model, site, self.weight, len(v)) for site in sites]
        scores = [_cosines(matrix, v.to(matrix.device)) for _, _, _, matrix in found]
        total = sum(len(s) for s in scores)
        if self.count > total:
            raise ArgumentError(
                "more rows are to be shifted than there are",
                found=f"count={self.count}, {total} rows in {len(sites)} MLPs",
                expected=f"count of at most {total}",
            )
        chosen = torch.zeros(total, dtype=torch.bool)
        chosen[torch.cat([s.cpu() for s in scores]).argsort(stable=True)[: self.count]] = True
        effects = list[Effect]()
        for (path, first, transposed, matrix), own in zip(found, chosen.split([len(s) for s in scores]), strict=True):
            if own.any():
                rows = own.nonzero().squeeze(1) + first
                effects.append(ShiftRows(path, rows, (self.alpha * v).to(matrix.dtype), transposed))
        return effects


def _cosines(matrix: Tensor, v: Tensor) -> Tensor:
    wide = matrix.double()
    return (wide @ v) / (wide.norm(dim=1) * v.norm()).clamp_min(1e-300)


def _rows(model: nn.Module, site: Site, role: str, width: int) -> tuple[str, int, bool, Tensor]:
    """The path of the matrix, its first row of this role, whether rows are its columns, and these rows."""
    weight = _weight(site, role)
    parameter = model.get_parameter(weight.fqn)
    if parameter.is_meta:
        raise ArgumentError(
            "rows are chosen by their numbers, and there are none yet",
            where=weight.fqn,
            found="a parameter on the meta device",
            do="gatecc.materialise the model first",
        )
    transposed = weight.orientation == "in_out"
    matrix = parameter.detach().T if transposed else parameter.detach()
    first, last = weight.rows or (0, matrix.size(0))
    if matrix.dim() != 2 or matrix.size(1) != width:
        raise SiteRefusedError(
            "the direction does not fit the rows",
            where=place(site),
            found=f"a direction of {width} numbers, {weight.fqn} {tuple(matrix.shape)}",
            expected=f"a direction of {matrix.size(-1)} numbers, as wide as what the MLP reads",
            do="give a direction of the hidden states of this model",
        )
    return weight.fqn, first, transposed, matrix[first:last]


def _weight(site: Site, role: str) -> Weight:
    if isinstance(site, MLP) and site.form != "experts" and role in site.weights:
        return site.weights[role]
    raise SiteRefusedError(
        "the site has no such projection",
        where=place(site),
        found=f"{site.kind} {getattr(site, 'form', '')}: {', '.join(site.weights) or 'no weights'}".replace(" :", ":"),
        expected=f"an MLP with the weight {role!r}",
        do='take another one: weight="up"; or leave this site out',
    )
