"""Dispatchers: how tokens reach the ranks that hold their experts, and how results come back.

A dispatcher makes a `Route` of the experts that this rank's tokens chose. A route copies rows of tokens to ranks
(``send``) and sums rows back into tokens (``gather``); each is the adjoint of the other, so the two are all that the
operator and its gradient need. Collectives are those of torch.distributed; every rank of the group must make the same
calls, with no token as well.

Another library's kernels (DeepEP) come in as a dispatcher of one's own: `register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gatecc.errors import ArgumentError

OPS = torch.ops._c10d_functional


class Route(ABC):
    """Where the tokens of one call go. ``rows``: how many rows this rank gets; T is the number of its own tokens."""

    rows: int

    @abstractmethod
    def send(self, tokens: Tensor) -> Tensor:
        """tokens: (T, ...) -> (rows, ...), those of all ranks that this rank has an expert for."""

    @abstractmethod
    def gather(self, rows: Tensor) -> Tensor:
        """rows: (rows, ...) -> (T, ...): each token's rows from all ranks, summed in float32 in the order of ranks."""

    @abstractmethod
    def kept(self) -> Tensor:
        """What `Dispatcher.again` needs to make the route once more without communication: int64, (n,)."""


class Dispatcher(ABC):
    """A way to exchange tokens. ``replicated``: all ranks of the group hold the same tokens; otherwise their own."""

    name: ClassVar[str]
    replicated: ClassVar[bool] = False

    @abstractmethod
    def route(self, owners: Tensor, group: ProcessGroup) -> Route:
        """owners: (T, k), the rank of each slot's expert; the size of the group for a slot that is empty."""

    @abstractmethod
    def again(self, owners: Tensor, group: ProcessGroup, kept: Tensor) -> Route:
        """The same route, in the backward pass."""

    def rows(self, tokens: int, ranks: int) -> int | None:
        """How many rows a rank gets of ``tokens`` on each of the ranks; None if that depends on their experts."""
        return None


# --- each token to the ranks that have its experts -------------------------------------------------------------------


class AllToAll(Dispatcher):
    """Each token goes once to each rank that holds some of its experts. Sizes depend on the router: the host waits."""

    name = "all-to-all"

    def route(self, owners: Tensor, group: ProcessGroup) -> Route:
        need = _needed(owners, group.size())
        sent = need.sum(1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return _Exchange(need, received, group)

    def again(self, owners: Tensor, group: ProcessGroup, kept: Tensor) -> Route:
        return _Exchange(_needed(owners, group.size()), kept, group)


def _needed(owners: Tensor, ranks: int) -> Tensor:
    """(W, T): whether a rank has an expert of a token."""
    return (owners.unsqueeze(0) == torch.arange(ranks, device=owners.device)[:, None, None]).any(2)


class _Exchange(Route):
    def __init__(self, need: Tensor, received: Tensor, group: ProcessGroup) -> None:
        self.group, self.received = group, received
        self.ranks, self.tokens = need.nonzero(as_tuple=True)  # by rank, then as the tokens come
        both: list[list[int]] = torch.stack([need.sum(1), received]).tolist()
        self.sent, self.back = both
        self.rows, self.count = sum(self.back), need.size(1)
        self.place = (need.long().cumsum(0) - 1)[self.ranks, self.tokens]  # which of its token's rows each is

    def send(self, tokens: Tensor) -> Tensor:
        mine = tokens.index_select(0, self.tokens)
        theirs = mine.new_empty(self.rows, *mine.shape[1:])
        dist.all_to_all_single(theirs, mine, self.back, self.sent, group=self.group)
        return theirs

    def gather(self, rows: Tensor) -> Tensor:
        mine = rows.new_empty(sum(self.sent), *rows.shape[1:])
        dist.all_to_all_single(mine, rows.contiguous(), self.sent, self.back, group=self.group)
        most = int(self.place.max()) + 1 if self.place.numel() else 0
        total = mine.new_zeros(self.count, *mine.shape[1:], dtype=_wide(mine))
        for number in range(most):  # a token has at most one row of each number: the sum has one order
            chosen = (self.place == number).nonzero().squeeze(1)
            at = self.tokens.index_select(0, chosen)
            total[at] += mine.index_select(0, chosen)
        return total.to(mine.dtype)

    def kept(self) -> Tensor:
        return self.received


# --- every token to every rank ----------------------------------------------------------------------------------------


class AllGather(Dispatcher):
    """Every token goes to every rank, which skips what is not its own. Sizes are fixed, the host never waits; all ranks
    have equally many tokens."""

    name = "all-gather"

    def route(self, owners: Tensor, group: ProcessGroup) -> Route:
        return _Everywhere(owners.size(0), group)

    def again(self, owners: Tensor, group: ProcessGroup, kept: Tensor) -> Route:
        return _Everywhere(owners.size(0), group)

    def rows(self, tokens: int, ranks: int) -> int | None:
        return tokens * ranks


class _Everywhere(Route):
    def __init__(self, tokens: int, group: ProcessGroup) -> None:
        self.group, self.rows = group, tokens * group.size()

    def send(self, tokens: Tensor) -> Tensor:
        group = self.group.size(), self.group.group_name
        return _waited(OPS.all_gather_into_tensor(tokens.contiguous(), *group))

    def gather(self, rows: Tensor) -> Tensor:
        group = self.group.size(), self.group.group_name
        wide = rows.to(_wide(rows)).contiguous()
        return _waited(OPS.reduce_scatter_tensor(wide, "sum", *group)).to(rows.dtype)

    def kept(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64)


# --- the same tokens on every rank ------------------------------------------------------------------------------------


class AllReduce(Dispatcher):
    """The tokens are the same on all ranks (as in tensor parallelism): each computes its experts, results are summed.
    Sizes are fixed."""

    name = "all-reduce"
    replicated = True

    def route(self, owners: Tensor, group: ProcessGroup) -> Route:
        return _Here(owners.size(0), group)

    def again(self, owners: Tensor, group: ProcessGroup, kept: Tensor) -> Route:
        return _Here(owners.size(0), group)

    def rows(self, tokens: int, ranks: int) -> int | None:
        return tokens


class _Here(Route):
    def __init__(self, tokens: int, group: ProcessGroup) -> None:
        self.rows, self.group = tokens, group

    def send(self, tokens: Tensor) -> Tensor:
        return tokens

    def gather(self, rows: Tensor) -> Tensor:
        wide = rows.to(_wide(rows))
        return _waited(OPS.all_reduce(wide, "sum", self.group.group_name)).to(rows.dtype)

    def kept(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64)


def _waited(x: Tensor) -> Tensor:
    return OPS.wait_tensor(x)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# --- by name ----------------------------------------------------------------------------------------------------------

DISPATCHERS: dict[str, Dispatcher] = {}


@dataclass(frozen=True)
class Setting:
    """How experts on a mesh are run. ``mean``: gradients of experts are averages over the ranks' tokens, not sums."""

    dispatcher: str = AllToAll.name
    mean: bool = True


def register(dispatcher: Dispatcher) -> None:
    """Enter a dispatcher under its name. Raises ArgumentError if another one has it."""
    if type(DISPATCHERS.get(dispatcher.name, dispatcher)) is not type(dispatcher):
        raise ArgumentError("a dispatcher is registered twice", found=dispatcher.name, do="give it another name")
    DISPATCHERS[dispatcher.name] = dispatcher


def dispatcher_of(name: str) -> Dispatcher:
    """The dispatcher of a name. Raises ArgumentError for one that there is not."""
    if name not in DISPATCHERS:
        raise ArgumentError("no such dispatcher of tokens", found=name, expected=", ".join(DISPATCHERS))
    return DISPATCHERS[name]


for _one in (AllToAll(), AllGather(), AllReduce()):
    register(_one)
