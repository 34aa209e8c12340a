"""ExpertsSpec: what experts are made of, from the weights of the dense layer whose place they take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatecc.ir.gates.option import Option
from gatecc.ir.router import RouterSpec
from gatecc.passes.route.exactness import Coverage, coverage
from gatecc.passes.route.experts import Experts
from gatecc.passes.route.ffn import FFN, Stacked


@dataclass(frozen=True)
class ExpertsSpec(Option, slot="experts"):
    """Base: how many experts there are, of which shapes, and how they are filled.

    An expert is a list of hidden neurons of the dense layer, or of new ones. ``parts`` says which part of the layer
    each expert computes: the layer is the sum of its parts, and is what it was if each part gets the weight 1.
    """

    @property
    def keeps_function(self) -> bool:
        """Whether fresh experts compute their parts of the layer exactly."""
        return True

    @property
    def reads_names(self) -> bool:
        """Whether the fill depends on the name of the layer."""
        return False

    @property
    def count(self) -> int:
        """E, the number of experts."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[int, ...]:
        """The part of the dense layer that each expert computes."""
        return (0,) * self.count

    @property
    def bias_apart(self) -> bool:
        """Whether the last bias of the layer is added once, and not by each expert in proportion to its weight."""
        return len(set(self.parts)) > 1

    @property
    def cuts(self) -> bool:
        """Whether an expert has some of the layer's neurons: a linear layer then needs neurons that mean something."""
        return len(set(self.parts)) > 1

    def coverage(self, router: RouterSpec, options: int) -> Coverage:
        """What fresh experts weigh in all with a router of so many logits. Raises ArgumentError for one with others."""
        return coverage(router, self.parts, options)

    def hidden(self, features: int) -> int:
        """The hidden neurons of an expert, from those of the layer. Raises ArgumentError."""
        return features

    def neurons(self, dense: Stacked, name: str) -> Tensor:
        """The neurons of the layer that an expert is made of: (E, F') int64, or one row for all experts. -1: a new one.

        ``name``: of the module of the last product.
        """
        return torch.arange(dense.down.size(1)).unsqueeze(0)

    def build(self, ffn: FFN, device: torch.device | None, dtype: torch.dtype | None) -> nn.Module:
        """The module, not filled. Raises ArgumentError for sizes that do not go together."""
        return self.build_one(ffn, device, dtype)

    def stacks(self, made: nn.Module, features: int) -> Iterator[tuple[Experts, ExpertsSpec]]:
        """The stacks of a module that `build` made for a layer of so many hidden neurons, and how each is filled."""
        assert isinstance(made, Experts)
        yield made, self

    def build_one(self, ffn: FFN, device: torch.device | None, dtype: torch.dtype | None) -> Experts:
        """Experts of one size, in a stack."""
        first, last = ffn.bias
        return Experts(
            self.count,
            ffn.width,
            self.hidden(ffn.hidden),
            ffn.out,
            activation=ffn.activation,
            gated=ffn.gated,
            bias=(first, last and not self.bias_apart),
            bias_apart=last and self.bias_apart,
            device=device,
            dtype=dtype,
        )

    def fill(self, experts: Stacked, dense: Stacked, scale: float, name: str) -> None:
        """Write experts from the dense layer's weights; ``scale`` multiplies what they yield."""
        if dense.down.is_meta:
            return  # the weights are still to come, and those of the experts with them
        chosen = self.neurons(dense, name).to(dense.down.device)
        for e in range(experts.down.size(0)):
            at = chosen[e % len(chosen)]
            _fill_one(Stacked(*(None if t is None else t[e] for t in experts)), dense, at, scale)  # pyright: ignore[reportArgumentType]  # the first and third are there
        self.finish(experts, dense)

    def finish(self, experts: Stacked, dense: Stacked) -> None:
        """Change filled experts, such as by noise."""


def _fill_one(expert: Stacked, dense: Stacked, at: Tensor, scale: float) -> None:
    """One expert from neurons of the layer. New ones have random rows and no way out, so that they change nothing."""
    features, old = dense.down.size(1), at >= 0
    halves = dense.gate_up.size(0) // features
    known = at.clamp(min=0)
    rows = torch.cat([known + half * features for half in range(halves)])
    expert.gate_up.copy_(dense.gate_up[rows])
    if expert.gate_up_bias is not None and dense.gate_up_bias is not None:
        expert.gate_up_bias.copy_(dense.gate_up_bias[rows])
    expert.down.copy_(dense.down[:, known] * scale)
    if expert.down_bias is not None and dense.down_bias is not None:
        expert.down_bias.copy_(dense.down_bias * scale)
    if not bool(old.all()):
        new = ~old.repeat(halves)
        expert.gate_up[new] = torch.randn_like(expert.gate_up[new]) * dense.gate_up.std()
        expert.down[:, ~old] = 0
        if expert.gate_up_bias is not None:
            expert.gate_up_bias[new] = 0
