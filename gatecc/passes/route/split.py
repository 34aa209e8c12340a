"""Split and Groups: experts that are parts of the dense layer."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.option import Option
from gatecc.passes.route import partition
from gatecc.passes.route.ffn import Stacked
from gatecc.passes.route.spec import ExpertsSpec


@dataclass(frozen=True)
class Partition(Option, slot="partition"):
    """Base: which hidden neurons share an expert."""

    @property
    def reads_names(self) -> bool:
        """Whether layers that compute the same may be cut differently, by their names."""
        return False

    def groups(self, dense: Stacked, count: int, name: str) -> Tensor:
        """(m, F/m) neurons. Raises ArgumentError if m does not divide F. ``name``: of the module of the last
        product.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Contiguous(Partition, tag="contiguous"):
    """Neighbours."""

    def groups(self, dense: Stacked, count: int, name: str) -> Tensor:
        return partition.contiguous(dense.down.size(1), count)


@dataclass(frozen=True)
class Random(Partition, tag="random"):
    """At random, the same for the same seed."""

    seed: int = 0

    def groups(self, dense: Stacked, count: int, name: str) -> Tensor:
        return partition.random(dense.down.size(1), count, self.seed)


@dataclass(frozen=True)
class KMeans(Partition, tag="kmeans"):
    """Neurons whose weight rows point the same way, by k-means with groups of one size."""

    seed: int = 0

    def groups(self, dense: Stacked, count: int, name: str) -> Tensor:
        halves = dense.gate_up.size(0) // dense.down.size(1)
        return partition.kmeans(dense.gate_up.chunk(halves), count, self.seed)


@dataclass(frozen=True)
class Measured(Partition, tag="measured"):
    """A group for each neuron, measured beforehand: `gatecc.train.coactivation` makes one from calibration inputs.

    ``layers``: names of the modules of the last products; ``coded``: for each the groups of its neurons, see `encoded`.
    """

    layers: tuple[str, ...]
    coded: tuple[str, ...]

    def check(self) -> None:
        self.require(len(self.layers) == len(self.coded), "coded", "as many as layers")

    @property
    def reads_names(self) -> bool:
        return True

    def groups(self, dense: Stacked, count: int, name: str) -> Tensor:
        if name not in self.layers:
            raise ArgumentError(
                "no partition of this layer was measured",
                where=name,
                found=", ".join(self.layers)[:200],
                do="measure it: gatecc.train.coactivation(model, batches, groups, layers=...)",
            )
        chosen = decoded(self.coded[self.layers.index(name)])
        if chosen.numel() != dense.down.size(1):
            raise ArgumentError(
                "the partition was measured on another layer",
                where=name,
                found=f"{chosen.numel()} neurons",
                expected=f"{dense.down.size(1)}",
            )
        return partition.grouped(chosen, count)


def encoded(chosen: Tensor) -> str:
    """The groups of neurons, (F,) below 65536, as text."""
    return base64.b64encode(zlib.compress(chosen.to(torch.uint16).numpy().tobytes(), 9)).decode()


def decoded(text: str) -> Tensor:
    """The inverse of `encoded`. Raises ArgumentError."""
    try:
        return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.uint16).long()
    except (ValueError, zlib.error) as e:
        raise ArgumentError("cannot read this partition", found=str(e), expected="what `encoded` wrote") from e


@dataclass(frozen=True)
class Split(ExpertsSpec, tag="split"):
    """Fine-grained experts: the hidden neurons in ``n`` parts of one size. All parts together are the layer.

    So it is exact while all run with one weight; how much fewer lose depends on ``by``, which neurons share a part:
    ``contiguous``, ``random(seed)``, ``kmeans(seed)`` of the weight rows, ``measured(...)`` co-activation.
    """

    n: int
    by: Partition = Contiguous()

    def check(self) -> None:
        self.require(self.n > 0, "n", "a positive number of experts")

    @property
    def count(self) -> int:
        return self.n

    @property
    def parts(self) -> tuple[int, ...]:
        return tuple(range(self.n))

    @property
    def reads_names(self) -> bool:
        return self.by.reads_names

    def hidden(self, features: int) -> int:
        return partition.group_size(features, self.n)

    def neurons(self, dense: Stacked, name: str) -> Tensor:
        return self.by.groups(dense, self.n, name)


@dataclass(frozen=True)
class Groups(ExpertsSpec, tag="groups"):
    """Virtual groups: the hidden neurons in ``shards`` parts, each part ``copies`` times (Upcycling LLMs into MoE,
    2024).

    Exact for a router that takes of each part the same weight, whatever its logits are: ``per_group(shards)``. Expert e
    is a copy of part e // copies. What the weights lack to 1 is multiplied into ``down_proj`` alone: spread over all
    three matrices it would go through the activation.
    """

    shards: int
    copies: int
    by: Partition = Contiguous()

    def check(self) -> None:
        self.require(self.shards > 0, "shards", "a positive number")
        self.require(self.copies > 0, "copies", "a positive number")

    @property
    def count(self) -> int:
        return self.shards * self.copies

    @property
    def parts(self) -> tuple[int, ...]:
        return tuple(e // self.copies for e in range(self.count))

    @property
    def reads_names(self) -> bool:
        return self.by.reads_names

    def hidden(self, features: int) -> int:
        return partition.group_size(features, self.shards)

    def neurons(self, dense: Stacked, name: str) -> Tensor:
        return self.by.groups(dense, self.shards, name).repeat_interleave(self.copies, 0)
