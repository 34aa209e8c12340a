"""SvdSplit: a matrix as the sum of its singular parts, some of which a gate weighs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.init import Identity
from gatecc.ir.program import attribute
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Linear, Site, Weight
from gatecc.passes.gating import gate_node, read_by, reads_afar
from gatecc.passes.operands import beside, place, stage, static_sizes

_ROUNDING = 1e-5  # of a singular value decomposition in float32


@dataclass(frozen=True)
class SvdSplit(Rewrite):
    """W x <- W_0 x + sum over j of g_j W_j x, where W = W_0 + W_1 + ... + W_J by its singular values.

    The ``shared`` largest fraction of the singular values is W_0, which every input uses; the rest is cut in order into
    ``parts`` of equal rank, which ``gate``, a gate over experts, weighs; what does not fill a part is shared. With all
    gates at 1 it is W x. The weight leaves the layer (`revert` puts it back bitwise), and its factors are trained.
    """

    name = "svd_split"

    gate: GateSpec
    parts: int = 4
    shared: float = 0.5
    label: str = "gate"

    def contract(self) -> Contract:
        starts = isinstance(self.gate.init, Identity) and self.gate.start is not None
        return identity_at_init(max(_ROUNDING, self.gate.residual)) if starts else changes_function()

    def effects(self) -> Effects:
        return Effects(same_for_layers=True, whole_model=reads_afar(self.gate))

    def reads(self) -> Iterable[str]:
        return ("in", "out", *read_by(self.gate))

    def rewrite(self, site: Site, edit: Editor) -> None:
        weight = whole_matrix(site)
        value, out = stage(site, "in"), stage(site, "out")
        channels, width = static_sizes(value)["c"], static_sizes(out)["c"]
        rank = min(channels, width)
        each = int(rank * (1 - self.shared)) // self.parts
        if each < 1:
            raise SiteRefusedError(
                "the matrix has too few singular values for so many parts",
                where=place(site),
                found=f"rank {rank}, of which {self.shared:.0%} shared, {self.parts} parts",
                expected="at least one for each part",
                do="ask for fewer parts, or leave this site out",
            )
        gates, _ = gate_node(self.gate, self.site, out, edit, self.label, self.parts)
        names = [edit.program.relative_name(name) for name in (weight.fqn, weight.bias) if name]

        def build() -> nn.Module:
            return beside(SvdParts(channels, width, self.parts, each, len(names) > 1), edit)

        def fill(new: Any, layer: nn.Module) -> None:
            matrix, *bias = (cast("Tensor", attribute(layer, name)).detach() for name in names)
            cast("SvdParts", new).fill(matrix if weight.orientation == "out_in" else matrix.T, *bias)

        path = edit.module("svd", build, fill)
        edit.replace(out.node, edit.call(path, value.node, gates, name="svd"))
        edit.discard(out.node, inside=True)
        for name in (weight.fqn, weight.bias):
            if name:
                edit.drop(name)


def whole_matrix(site: Site) -> Weight:
    """The weight of a linear site that is a matrix of its own. Raises SiteRefusedError."""
    weight = site.weights.get("weight") if isinstance(site, Linear) else None
    if weight is not None and weight.rows is None and weight.orientation != "conv":
        return weight
    raise SiteRefusedError(
        "only a matrix of its own can be cut into parts",
        where=place(site),
        found=f"a site of kind {site.kind}" if weight is None else f"{weight.fqn}, rows {weight.rows}",
        expected="a linear site with one weight",
        do="leave this site out",
    )


class SvdParts(nn.Module):
    """Factors a (R, C) and b (R, O) of a matrix, R its full rank; the last ``parts`` times ``each`` rows are weighed.

    x: (..., C), gates (..., parts) -> (..., O).
    """

    def __init__(self, channels: int, width: int, parts: int, each: int, bias: bool) -> None:
        super().__init__()
        self.parts, self.each = parts, each
        rank = min(channels, width)
        self.a = nn.Parameter(torch.empty(rank, channels))
        self.b = nn.Parameter(torch.empty(rank, width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Write the factors of a matrix (O, C). Each has the root of the singular values."""
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        self.a.copy_(s.sqrt().unsqueeze(1) * v)
        self.b.copy_(s.sqrt().unsqueeze(1) * u.T)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        h = F.linear(x, self.a)
        shared, rest = h.split([h.size(-1) - self.parts * self.each, self.parts * self.each], -1)
        weighed = (rest.unflatten(-1, (self.parts, self.each)) * gates.unsqueeze(-1)).flatten(-2)
        return F.linear(torch.cat([shared, weighed], -1), self.b.T, self.bias)
