"""estimate: what a way to spread a model with experts costs: bytes that each rank sends, and bytes that it holds.

Nothing is measured here. Bytes of an exchange are those of the collectives that the operator makes (the tests count
them); experts are taken to be chosen alike. How long they take is left to two numbers of a machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from gatecc.errors import ArgumentError
from gatecc.parallel.dispatch import AllGather, AllReduce, AllToAll
from gatecc.parallel.experts import STACKED

Strategy = Literal["replicate", "fsdp", "ep", "ep+fsdp"]
STRATEGIES: tuple[Strategy, ...] = ("replicate", "fsdp", "ep", "ep+fsdp")
_INDEX, _WIDE = 8, 4  # bytes of an index, of a weight and of a sum


@dataclass(frozen=True)
class Layers:
    """Layers of experts of one shape. ``parameters``: elements of one layer's experts; d wide in, ``out`` wide out."""

    count: int
    experts: int
    slots: int
    width: int
    out: int
    parameters: int


@dataclass(frozen=True)
class Sizes:
    """A model: its layers of experts, and the elements of all other parameters. ``element``: bytes of one."""

    layers: tuple[Layers, ...]
    others: int
    element: int = 2

    @classmethod
    def of(cls, model: nn.Module, slots: int) -> Sizes:
        """Of a model with stacked experts (on the meta device as well), of which each token has ``slots``."""
        layers: list[Layers] = []
        held: set[int] = set()
        for module in model.modules():
            bank = [p for n in STACKED if (p := module._parameters.get(n)) is not None]
            first, last = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
            if first is None or last is None or first.dim() != 3:
                continue
            held |= {id(p) for p in bank}
            size = sum(p.numel() for p in bank)
            layers.append(Layers(1, first.shape[0], slots, first.shape[2], last.shape[1], size))
        others = sum(p.numel() for p in model.parameters() if id(p) not in held)
        element = next((p.element_size() for p in model.parameters()), 2)
        return cls(tuple(layers), others, element)

    @property
    def experts(self) -> int:
        """Elements of all experts."""
        return sum(layer.count * layer.parameters for layer in self.layers)

    @property
    def active(self) -> float:
        """Elements that a token passes through."""
        return self.others + sum(n.count * n.parameters * n.slots / n.experts for n in self.layers)


@dataclass(frozen=True)
class Machine:
    """One rank of many: memory in bytes, operations a second that training reaches, and bytes a second that it sends
    to others of its node of ``node`` ranks, and to other nodes. By default about an H100 with NVLink and 400 Gbit/s."""

    memory: float = 80e9
    flops: float = 4e14
    inside: float = 3e11
    between: float = 4.5e10
    node: int = 8


@dataclass(frozen=True)
class Estimate:
    """Of one training step on each of ``ranks`` with ``tokens`` of its own.

    ``forward``, ``backward``: bytes that a rank sends for each of its tokens to exchange them; ``step``: bytes that it
    sends once a step for parameters and gradients; ``held``: bytes of weights, gradients and optimizer; ``kept``: bytes
    that layers of experts keep for the backward pass, beside what the dense model keeps.
    """

    strategy: Strategy
    ranks: int
    expert_ranks: int
    tokens: int
    forward: float
    backward: float
    step: float
    held: float
    kept: float

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a step."""
        return self.tokens * (self.forward + self.backward) + self.step

    def seconds(self, sizes: Sizes, machine: Machine) -> tuple[float, float]:
        """Of a step: of computing, and of sending if nothing is hidden behind computing."""
        exchange = machine.inside if self.expert_ranks <= machine.node else machine.between
        rest = machine.inside if self.ranks <= machine.node else machine.between
        sending = self.tokens * (self.forward + self.backward) / exchange + self.step / rest
        return 6 * sizes.active * self.tokens / machine.flops, sending

    def fits(self, machine: Machine) -> bool:
        """Whether it leaves a fifth of the memory to activations of the rest."""
        return self.held + self.kept <= 0.8 * machine.memory


def estimate(
    sizes: Sizes,
    ranks: int,
    strategy: Strategy = "ep",
    *,
    expert_ranks: int | None = None,
    dispatcher: str = AllToAll.name,
    tokens: int = 8192,
    state: int = 12,
) -> Estimate:
    """What a step of training costs each rank.

    Args:
        sizes: of the model, `Sizes.of` one.
        ranks: all of them; each has data of its own.
        strategy: "replicate" (DDP), "fsdp" (everything sharded by FSDP2), "ep" (experts sharded by `expert_parallel`,
            the rest repeated), "ep+fsdp" (the rest sharded by FSDP2, and experts over the ranks that repeat them).
        expert_ranks: over how many ranks the experts of a layer lie; by default as many as divide both.
        dispatcher: "all-to-all", "all-gather" or "all-reduce".
        tokens: of a rank in a step.
        state: bytes that the optimizer keeps for each element; AdamW with a copy in float32 has 12.

    Raises ArgumentError for a strategy that there is not, or ranks that do not divide.
    """
    if strategy not in STRATEGIES:
        raise ArgumentError("no such strategy", found=str(strategy), expected=", ".join(STRATEGIES))
    spread = _expert_ranks(sizes, ranks, expert_ranks) if strategy.startswith("ep") else 1
    copies = ranks // spread
    sharded = strategy.endswith("fsdp")
    ways = [_exchange(layer, spread, sizes.element, dispatcher) for layer in sizes.layers]
    rest = sizes.others + (0 if spread > 1 else sizes.experts)
    mine = sizes.experts / spread if spread > 1 else 0.0
    step = _reduced(rest, ranks, sizes.element, sharded) + _reduced(mine, copies, sizes.element, sharded)
    elements = (rest / ranks + mine / copies) if sharded else rest + mine
    return Estimate(
        strategy,
        ranks,
        spread,
        tokens,
        forward=sum(layer.count * way[0] for layer, way in zip(sizes.layers, ways, strict=True)),
        backward=sum(layer.count * way[1] for layer, way in zip(sizes.layers, ways, strict=True)),
        step=step,
        held=elements * (2 * sizes.element + state) + (_largest(sizes, spread) * sizes.element if sharded else 0),
        kept=tokens * sum(n.count * way[2] for n, way in zip(sizes.layers, ways, strict=True)) if spread > 1 else 0.0,
    )


def _expert_ranks(sizes: Sizes, ranks: int, wanted: int | None) -> int:
    """How many ranks the experts lie over: they divide the experts of each layer, and all ranks."""
    most = math.gcd(ranks, *(layer.experts for layer in sizes.layers)) if sizes.layers else 1
    if wanted is not None and most % wanted:
        raise ArgumentError(
            "the ranks do not divide the experts",
            found=f"{wanted} of {ranks} ranks, {', '.join(str(n.experts) for n in sizes.layers[:4])} experts",
            expected=f"a divisor of {most}",
        )
    return most if wanted is None else wanted


def others(layer: Layers, ranks: int) -> float:
    """How many other ranks a token goes to: those with one of its experts, if all sets of them are as likely."""
    here = layer.experts // ranks
    none = math.comb(layer.experts - here, layer.slots) / math.comb(layer.experts, layer.slots)
    return (ranks - 1) * (1 - none)


def _exchange(layer: Layers, ranks: int, element: int, dispatcher: str) -> tuple[float, float, float]:
    """Bytes that a token costs its rank forwards and backwards, and that the ranks keep of it for the gradient."""
    chosen = layer.slots * (_INDEX + _WIDE)
    there, back = layer.width * element + chosen, layer.out * element
    grad = layer.width * element + layer.slots * _WIDE
    if ranks == 1:
        return 0.0, 0.0, 0.0
    if dispatcher == AllToAll.name:
        n = others(layer, ranks)
        return n * (there + back), n * (back + grad), (n * ranks / (ranks - 1)) * there
    wide, wide_grad = layer.out * _WIDE, layer.width * _WIDE + layer.slots * _WIDE
    if dispatcher == AllGather.name:
        n = ranks - 1
        return n * (there + wide), n * (back + wide_grad), ranks * there
    if dispatcher == AllReduce.name:
        n = 2 * (ranks - 1) / ranks
        return n * wide, n * wide_grad, there
    raise ArgumentError(
        "the bytes of this dispatcher are not known",
        found=dispatcher,
        expected=", ".join((AllToAll.name, AllGather.name, AllReduce.name)),
    )


def _reduced(elements: float, ranks: int, element: int, sharded: bool) -> float:
    """Bytes of a step for the parameters of ``ranks``: FSDP gathers them twice and scatters gradients, DDP reduces."""
    return (3 if sharded else 2) * elements * element * (ranks - 1) / ranks


def _largest(sizes: Sizes, spread: int) -> float:
    """Elements of a layer that FSDP holds whole for a while."""
    return max((layer.parameters / spread for layer in sizes.layers), default=0.0)


def compare(
    sizes: Sizes, ranks: int, machine: Machine | None = None, *, tokens: int = 8192, state: int = 12
) -> Iterator[tuple[Estimate, float, float, bool]]:
    """Each strategy with its seconds of computing and sending, and whether it fits; those that are no other first."""
    machine = machine or Machine()
    seen: set[tuple[bool, int]] = set()
    for strategy in STRATEGIES:
        found = estimate(sizes, ranks, strategy, tokens=tokens, state=state)
        kind = (strategy.endswith("fsdp"), found.expert_ranks)
        if kind not in seen and not (ranks == 1 and seen):
            seen.add(kind)
            yield found, *found.seconds(sizes, machine), found.fits(machine)
