"""Upcycle: what experts are made of, from the weights of the dense layer whose place they take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.gates.choice import Choice
from gatecc.ir.gates.option import Option
from gatecc.passes.route.experts import Experts
from gatecc.passes.route.ffn import FFN

Stacked = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # gate_up, its bias, down, its bias of the dense layer


@dataclass(frozen=True)
class ExpertsSpec(Option, slot="experts"):
    """Base: how many experts there are, of which shapes, and how they are filled."""

    @property
    def count(self) -> int:
        """E, the number of experts."""
        raise NotImplementedError

    def contract(self, choice: Choice) -> Contract:
        """What a fresh layer of these experts computes with this choice, against the dense one."""
        raise NotImplementedError

    def build(self, ffn: FFN, device: torch.device | None, dtype: torch.dtype | None) -> Experts:
        """The module, not filled. Raises ArgumentError for sizes that do not go together."""
        raise NotImplementedError

    def fill(self, experts: Experts, dense: Stacked) -> None:
        """Write the experts from the dense layer's weights."""
        raise NotImplementedError


@dataclass(frozen=True)
class Copies(ExpertsSpec, tag="copies"):
    """Every expert is the dense layer (Sparse Upcycling). Exact for weights that sum to 1, whatever is chosen."""

    n: int

    def check(self) -> None:
        self.require(self.n > 0, "n", "a positive number of experts")

    @property
    def count(self) -> int:
        return self.n

    def contract(self, choice: Choice) -> Contract:
        return identity_at_init() if choice.sums_to_one else changes_function()

    def build(self, ffn: FFN, device: torch.device | None, dtype: torch.dtype | None) -> Experts:
        return Experts(
            self.n,
            ffn.width,
            ffn.hidden,
            ffn.out,
            activation=ffn.activation,
            gated=ffn.gated,
            bias=ffn.bias,
            device=device,
            dtype=dtype,
        )

    def fill(self, experts: Experts, dense: Stacked) -> None:
        stacks = experts.gate_up_proj, experts.gate_up_proj_bias, experts.down_proj, experts.down_proj_bias
        for stack, one in zip(stacks, dense, strict=True):
            if stack is not None and one is not None:
                stack.copy_(one.expand_as(stack))
