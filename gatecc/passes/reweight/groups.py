"""Groups: products between groups of units, of which a constant number of pairs is kept (G2GNet)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, exact
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import attribute
from gatecc.ir.site import Site
from gatecc.passes.operands import beside, place, stage, static_sizes
from gatecc.passes.reweight.weight_edit import WeightEdit
from gatecc.passes.svd_split import whole_matrix


@dataclass(frozen=True)
class Groups(WeightEdit, tag="groups"):
    """W <- mask * W, with the inputs and the outputs of a matrix in ``groups`` groups each and one bit for each pair.

    ``density`` of the pairs is kept, exactly ``round(density * groups^2)`` of them at every time: at first the
    ``strongest``, by their mean absolute weights, or ``random`` ones. After every ``every`` steps of the optimizer the
    weakest ``share`` of the kept pairs makes room for as many others, those whose activations correlate most in
    absolute value (``every=0``: the mask stays). ``gatecc.train.routing.step`` counts the steps; `heal` and the
    callbacks call it.
    """

    groups: int = 8
    density: float = 0.25
    every: int = 0
    share: float = 0.1
    start: Literal["strongest", "random"] = "strongest"

    def check(self) -> None:
        self.require(self.groups > 0, "groups", "at least 1")
        self.require(0 < self.density <= 1 and self.kept > 0, "density", "a share of the pairs that keeps one at least")
        self.require(self.every >= 0, "every", "a number of steps, 0: never")
        self.require(0 < self.share <= 1, "share", "a share of the kept pairs, more than 0")

    @property
    def kept(self) -> int:
        """How many pairs of groups are connected."""
        return round(self.density * self.groups**2)

    @property
    def contract(self) -> Contract:
        return exact() if self.kept == self.groups**2 else changes_function()

    @property
    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    def build(self, site: Site, edit: Editor) -> None:
        weight = whole_matrix(site)
        value, out = stage(site, "in"), stage(site, "out")
        sizes = static_sizes(value)["c"], static_sizes(out)["c"]
        if any(size % self.groups for size in sizes):
            raise SiteRefusedError(
                "the units cannot be cut into groups of one size",
                where=place(site),
                found=f"{sizes[0]} inputs, {sizes[1]} outputs, {self.groups} groups",
                expected="a number of groups that divides both",
                do="ask for another number of groups, or leave this site out",
            )
        names = [edit.program.relative_name(name) for name in (weight.fqn, weight.bias) if name]

        def fill(new: Any, layer: nn.Module) -> None:
            matrix = cast("Tensor", attribute(layer, names[0])).detach()
            cast("GroupMask", new).start(matrix if weight.orientation == "out_in" else matrix.T)

        path = edit.module("groups", lambda: beside(GroupMask(self), edit), fill)
        nodes = [edit.parameter(name) for name in names]
        if weight.orientation == "in_out":
            nodes[0] = edit.call(transposed, nodes[0])
        edit.replace(out.node, edit.call(path, value.node, *nodes, name="grouped"))
        edit.discard(out.node, inside=True)


def transposed(weight: Tensor) -> Tensor:
    """A matrix with its axes exchanged."""
    return weight.T


class GroupMask(nn.Module):
    """The mask (G, H) of a matrix, and in training the statistics of its groups. x: (..., I) -> (..., O).

    ``activity``, which is not saved, holds the step that it began at, then sums over the tokens since the last change:
    their number, x and x^2 of each group of inputs, y and y^2 of each of outputs, y x of each pair; and |W| of each.
    """

    mask: Tensor

    def __init__(self, spec: Groups) -> None:
        super().__init__()
        self.spec, G = spec, spec.groups
        self.register_buffer("mask", torch.zeros(G, G, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("changes", torch.zeros(()), persistent=False)
        self.register_buffer("activity", torch.zeros(2 + 4 * G + 2 * G * G), persistent=False)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Choose the first pairs."""
        G = self.spec.groups
        drawn = self.spec.start == "random"
        score = torch.rand(G * G) if drawn else strengths(weight.float(), G).flatten()
        mask = torch.zeros(G * G, dtype=torch.bool, device=score.device)
        mask[score.argsort(descending=True, stable=True)[: self.spec.kept]] = True
        self.get_buffer("mask").copy_(mask.view(G, G))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.ops.gatecc.group_linear(x, weight, self.get_buffer("mask"), bias)
        if self.training and self.spec.every:
            found = figures(x.detach(), y.detach(), weight.detach(), self.spec.groups)
            torch.ops.gatecc.record(self.get_buffer("activity"), found, self.get_buffer("changes"))
        return y

    @torch.no_grad()
    def advance(self) -> bool:
        """A step of the optimizer has ended: whether the mask changed. All processes count together."""
        steps = self.get_buffer("steps").add_(1)
        if not self.spec.every or int(steps) % self.spec.every:
            return False
        activity = self.get_buffer("activity")[1:].clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(activity)
        changed = self.regrow(activity)
        self.get_buffer("changes").add_(1)
        return changed

    def regrow(self, activity: Tensor) -> bool:
        """Exchange the weakest kept pairs for those that correlate most. Nothing happens before a forward in training,
        or where every pair is kept."""
        mask, G = self.get_buffer("mask"), self.spec.groups
        count = min(max(round(self.spec.share * self.spec.kept), 1), int((~mask).sum()))
        if not count or not float(activity[0]):
            return False
        weak = activity[-G * G :].masked_fill(~mask.flatten(), float("inf")).argsort(stable=True)[:count]
        strong = correlation(activity, G).abs().flatten().masked_fill(mask.flatten(), -1.0)
        grown = strong.argsort(descending=True, stable=True)[:count]
        flat = mask.flatten()
        flat[weak], flat[grown] = False, True
        mask.copy_(flat.view(G, G))
        return True

    def _apply(self, fn: Any, recurse: bool = True) -> GroupMask:
        """Sums stay in float32: in bfloat16 they would stand still."""
        super()._apply(fn, recurse)
        for name in ("activity", "changes"):
            buffer = self.get_buffer(name)
            if buffer.dtype != torch.float32 and not buffer.is_meta:
                self.register_buffer(name, buffer.float(), persistent=False)
        return self


def strengths(weight: Tensor, groups: int) -> Tensor:
    """The mean of |W| of each pair of groups, (G, G)."""
    return weight.abs().unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).mean((1, 3))


def figures(x: Tensor, y: Tensor, weight: Tensor, groups: int) -> Tensor:
    """What one pass adds to the activity; the activation of a group is the mean over its units."""
    a, b = (v.float().reshape(-1, groups, v.size(-1) // groups).mean(-1) for v in (x, y))
    tokens = torch.ones_like(a[:, :1]).sum().unsqueeze(0)
    sums = (a.sum(0), (a * a).sum(0), b.sum(0), (b * b).sum(0), (b.T @ a).flatten())
    return torch.cat([tokens, *sums, strengths(weight.float(), groups).flatten()])


def correlation(activity: Tensor, groups: int) -> Tensor:
    """Pearson's correlation of the activations of output and input groups, (G, G); 0 where one is constant."""
    G, n = groups, activity[0].clamp_min(1)
    x, xx, y, yy = activity[1 : 1 + 4 * G].div(n).split(G)
    both = activity[1 + 4 * G : 1 + 4 * G + G * G].div(n).view(G, G)
    deviation = ((yy - y * y).clamp_min(0)[:, None] * (xx - x * x).clamp_min(0)).sqrt()
    return torch.where(deviation > 1e-12, (both - y[:, None] * x) / deviation.clamp_min(1e-12), 0.0)
