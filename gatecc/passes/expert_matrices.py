"""Matrices: the weights of experts as ``gatecc::moe_ffn`` takes them, of stacks or of one parameter per expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # up, down and their biases


@dataclass(frozen=True)
class Role:
    """One matrix, or one bias, of every expert: parameters of one shape. ``names``: one name for all, if they are a
    stack, or one an expert. ``shape``: of one expert."""

    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Matrices:
    """``up``: the matrices that tokens meet first, gate and up or one; ``down``: the last; their biases, if any.

    ``place``: who holds them, for a refusal. ``swapped``: whether up and down hold (in, out). ``gated``: whether the
    one matrix of ``up`` holds gate and up.
    """

    place: str
    experts: int
    up: tuple[Role, ...]
    down: Role
    up_bias: tuple[Role, ...] = ()
    down_bias: Role | None = None
    swapped: tuple[bool, bool] = (False, False)
    gated: bool = False

    @property
    def roles(self) -> tuple[Role, ...]:
        """All of them, in the order in which the operator takes them."""
        return (*self.up, self.down, *self.up_bias, *(() if self.down_bias is None else (self.down_bias,)))

    @property
    def layouts(self) -> tuple[str, ...]:
        """What the rows of the first matrix may be."""
        if len(self.up) > 1:
            return ("halves",)
        return ("halves", "interleaved") if self.gated else ("plain",)

    @property
    def hidden(self) -> int:
        """Features between the products, F."""
        rows = self.up[0].shape[1 if self.swapped[0] else 0]
        return rows // 2 if self.gated else rows

    @property
    def width(self) -> int:
        """Features of a token, d."""
        return self.up[0].shape[0 if self.swapped[0] else 1]

    def named(self) -> dict[str, tuple[Role, int | None]]:
        """By the name of a parameter, its role, and the expert whose it is, None for all."""
        return {
            name: (role, at if len(role.names) > 1 else None)
            for role in self.roles
            for at, name in enumerate(role.names)
        }

    def operands(self, numbers: Mapping[Role, Tensor]) -> Operands:
        """What the operator takes, of the stacks of each role: (E, *shape)."""
        up, bias = ([numbers[role] for role in roles] for roles in (self.up, self.up_bias))
        down_bias = None if self.down_bias is None else numbers[self.down_bias]
        return self._joined(up), numbers[self.down], torch.cat(bias, 1) if bias else None, down_bias

    def together(self, own: Sequence[Tensor]) -> Operands:
        """The same of the parameters of the roles, in their order: one copy of each."""
        given, parts = iter(own), list[list[Tensor]]()
        for role in self.roles:
            parts.append([next(given) for _ in role.names])
        by_role = dict(zip(self.roles, parts, strict=True))
        up, bias = ([by_role[role] for role in roles] for roles in (self.up, self.up_bias))
        down_bias = None if self.down_bias is None else self._stacked([by_role[self.down_bias]])
        return (
            self._stacked(up, axis=1 if self.swapped[0] else 0),
            self._stacked([by_role[self.down]]),
            self._stacked(bias) if bias else None,
            down_bias,
        )

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Gate and up of stacks as one."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), 2 if self.swapped[0] else 1)

    def _stacked(self, parts: Sequence[Sequence[Tensor]], axis: int = 0) -> Tensor:
        """Of one or two parts, each one tensor per expert or one for all, the stack of what stands along an axis."""
        first = parts[0]
        if len(first) == 1:
            return self._joined([held for (held,) in parts])
        if axis:
            return torch.stack([torch.cat(own, axis) for own in zip(*parts, strict=True)])
        rows = torch.cat([tensor for own in zip(*parts, strict=True) for tensor in own])
        return rows.view(len(first), -1, *first[0].shape[1:])
