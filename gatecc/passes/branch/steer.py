"""Steer: a direction added to the hidden states of all layers, as far as a controller says that reads the last."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, exact, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector, select
from gatecc.ir.site import Site, Value
from gatecc.passes.again import all_again
from gatecc.passes.branch.two_pass import detached
from gatecc.passes.operands import beside, place, readers, source_shape, stage


@dataclass(frozen=True)
class Steer(Rewrite):
    """h_l[t] <- h_l[t] + s sigmoid(z_l) alpha r at each value ``at``, where (s, z) = controller(c[t]).

    c is the concatenation of the last ``layers`` of these values as they are without steering, so the model runs twice:
    early layers are steered by what late ones said in the first pass. No gradient goes into it. The controller is a
    ReLU network with one hidden layer of ``size`` units; ``direction`` is r, as wide as the hidden states.

    ``tokens="last"`` reads and steers the last position alone, as the paper does in each step of a generation;
    ``"each"`` every position by its own c, which is the same for a prompt of one token, is causal, and is what
    a decoder can do step by step. s starts at 0. The value that is selected (``Head.in_``) says where the passes end.
    """

    name = "steer"

    at: Selector
    direction: tuple[float, ...]
    alpha: float = 4.0
    layers: int = 4
    size: int = 1024
    tokens: Literal["last", "each"] = "last"
    label: str = "controller"

    def __post_init__(self) -> None:
        if self.tokens not in ("last", "each") or self.layers < 1 or self.size < 1 or not any(self.direction):
            raise ArgumentError(
                "this steers nothing",
                found=f"tokens={self.tokens!r}, layers={self.layers}, size={self.size}, {len(self.direction)} numbers",
                expected='tokens="last" or "each", layers and size of at least 1, a direction that is not 0',
            )

    def contract(self) -> Contract:
        return identity_at_init() if self.alpha else exact()

    def effects(self) -> Effects:
        return Effects(whole_model=True, loses_cache=True)

    def notes(self, site: Site) -> Iterable[str]:
        yield f"{site.key}: each call runs the model twice, for early layers are steered by what late ones say"

    def rewrite(self, site: Site, edit: Editor) -> None:
        steered = select(self.at, edit.sites)
        values = [stage(one, self.at.stage) for one in steered]
        for one, value in zip(steered, values, strict=True):
            self._check(one, value)
        read = [value.node for value in values[-self.layers :]]
        first = all_again(edit, {value.node: value.node for value in values}, read)
        last = self.tokens == "last"
        c = edit.call(last_positions if last else positions, *first, name="first_pass")
        path = edit.module(self.label, lambda: beside(Controller(self, len(read), len(values)), edit))
        factors, direction = edit.call(path, c, name=self.label), edit.parameter(f"{path}.direction")
        add = steered_last if last else steered_each
        for number, (one, value) in enumerate(zip(steered, values, strict=True)):
            inside = replace(edit, site=one)
            made = inside.call(add, value.node, factors, direction, number, self.alpha, name="steered")
            inside.replace(value.node, made, readers(one, self.at.stage))

    def _check(self, site: Site, value: Value) -> None:
        width = source_shape(value).channels
        if str(value.axes).replace(" ", "") != "bnc" or width != len(self.direction):
            raise SiteRefusedError(
                "the direction does not fit the hidden states",
                where=place(site),
                found=f"axes {value.axes}, {width} channels, a direction of {len(self.direction)} numbers",
                expected="hidden states (b, n, c), and a direction of c numbers",
                do="give a direction of the hidden states of this model, or select others (at=...)",
            )


class Controller(nn.Module):
    """The factors s sigmoid(z_l) of L layers. c: (*positions, layers C) -> (*positions, L)."""

    def __init__(self, spec: Steer, layers: int, steered: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(layers * len(spec.direction), spec.size)
        self.out = nn.Linear(spec.size, 1 + steered)
        with torch.no_grad():  # s is 0
            self.out.weight[0].zero_()
            self.out.bias[0].zero_()
        self.register_buffer("direction", torch.tensor(spec.direction))

    def scores(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """s (*positions) and z (*positions, L)."""
        y = self.out(F.relu(self.hidden(c)))
        return y[..., 0], y[..., 1:]

    def forward(self, c: Tensor) -> Tensor:
        s, z = self.scores(c)
        return s.unsqueeze(-1) * z.sigmoid()


def positions(*values: Tensor) -> Tensor:
    """(B, N, C) each -> (B, N, layers C), without gradient."""
    return torch.cat([detached(value) for value in values], -1)


def last_positions(*values: Tensor) -> Tensor:
    """(B, N, C) each -> (B, 1, layers C) of the last position, without gradient."""
    return torch.cat([detached(value)[:, -1:] for value in values], -1)


def steered_each(h: Tensor, factors: Tensor, direction: Tensor, layer: int, alpha: float) -> Tensor:
    """h: (B, N, C), factors: (B, N, L), direction: (C,) -> (B, N, C)."""
    return h + (factors[..., layer : layer + 1] * alpha).to(h.dtype) * direction.to(h.dtype)


def steered_last(h: Tensor, factors: Tensor, direction: Tensor, layer: int, alpha: float) -> Tensor:
    """The same at the last position alone; factors: (B, 1, L)."""
    return torch.cat([h[:, :-1], steered_each(h[:, -1:], factors, direction, layer, alpha)], 1)


def controllers(model: nn.Module) -> list[Controller]:
    """Those of a model."""
    return [m for m in model.modules() if isinstance(m, Controller)]
