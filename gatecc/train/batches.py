"""Batches: what healing reads. A stream that knows its place and can be resumed, and how a batch becomes a call."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DistributedSampler

from gatecc.errors import ArgumentError
from gatecc.train.losses import IGNORED
from gatecc.train.ranks import Ranks

Batch = Any  # ids (B, N); a tuple or list of positional arguments; a dict of keyword arguments


class Stream:
    """The batches of an iterable, again from its start whenever it ends; ``place`` says where it stands.

    A stream is resumed by going to the same epoch's start (the states of the random generators then) and reading as
    many batches as were read. So an iterable must repeat its order from the same random states: DataLoaders do, lists
    do, an iterator that was already begun does not.

    On several ranks all read in the first one's order, and each takes one batch of as many as there are ranks. A
    DataLoader with a DistributedSampler has each rank's own already.
    """

    def __init__(self, data: Iterable[Batch], ranks: Ranks | None = None) -> None:
        self.data = data
        self.read = 0
        self.epoch = -1
        self.start: dict[str, Any] = {}
        self.ranks = ranks or Ranks()
        self._sampler = _distributed(data) if self.ranks.count > 1 else None
        self._shared = self.ranks.count > 1 and self._sampler is None
        self._order: dict[str, Any] = {}  # random states that the order is drawn from, where it is shared
        self._iterator: Iterator[Batch] | None = None

    def next(self) -> Batch:
        """The next batch. Raises ArgumentError if the data is used up and cannot be begun again, or is empty."""
        if not self._shared:
            return self._next()
        own = random_state(self._generator)
        if not self._order:
            self._order = self.ranks.from_first(own)
        set_random_state(self._order, self._generator)
        try:
            return self._next()
        finally:
            self._order = random_state(self._generator)
            set_random_state(own, self._generator)

    def _next(self) -> Batch:
        if self._iterator is None:
            self._begin(random_state(self._generator))
        iterator = cast("Iterator[Batch]", self._iterator)
        try:
            found = [next(iterator) for _ in range(self.ranks.count if self._shared else 1)]
            batch = found[self.ranks.rank if self._shared else 0]
        except StopIteration:
            if self.read == 0 or isinstance(self.data, Iterator):
                raise ArgumentError(
                    "the data ended before the steps did",
                    found=f"{self.read} batches" + (f" for each of {self.ranks.count} ranks" if self._shared else ""),
                    do="pass something that can be read again (a list, a DataLoader), or ask for fewer steps",
                ) from None
            self._iterator = None
            return self._next()
        self.read += 1
        return batch

    def place(self) -> dict[str, Any]:
        """What `go` takes."""
        return {"read": self.read, "start": self.start, "epoch": self.epoch}

    def go(self, place: Mapping[str, Any]) -> None:
        """Continue where another stream over the same data stood; the random states are those after the last batch."""
        if not place["start"]:
            return
        self.epoch = int(place.get("epoch", 0)) - 1
        set_random_state(place["start"], self._generator)
        self._begin(dict(place["start"]))
        for _ in range(place["read"]):
            self._next()
        self._order = random_state(self._generator)

    def _begin(self, state: dict[str, Any]) -> None:
        self.start, self.read = state, 0
        self.epoch += 1
        if self._sampler is not None:
            self._sampler.set_epoch(self.epoch)
        self._iterator = iter(self.data)

    @property
    def _generator(self) -> torch.Generator | None:
        """A DataLoader may draw its order from a generator of its own."""
        generator = getattr(self.data, "generator", None)
        return generator if isinstance(generator, torch.Generator) else None


def _distributed(data: Any) -> Any:
    """A sampler that gives each rank its own."""
    sampler = getattr(data, "sampler", None)
    return sampler if isinstance(sampler, DistributedSampler) else None


def random_state(generator: torch.Generator | None = None) -> dict[str, Any]:
    """The states of the generators of torch, Python and numpy (and a further one), as `capture.tree` writes them."""
    name, keys, *more = cast("tuple[Any, ...]", np.random.get_state())
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *more),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if generator is not None:
        state["generator"] = generator.get_state()
    return state


def set_random_state(state: Mapping[str, Any], generator: torch.Generator | None = None) -> None:
    """The inverse of random_state."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *more = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *more))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if generator is not None and "generator" in state:
        generator.set_state(state["generator"])


def call_of(batch: Batch, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as (args, kwargs) of the model, on its device; ``labels`` stay with the loss.

    Raises ArgumentError for a batch of another kind.
    """
    if isinstance(batch, Tensor):
        args, kwargs = (batch,), dict[str, Any]()
    elif isinstance(batch, tuple | list):
        args, kwargs = tuple(cast("tuple[Any, ...]", batch)), {}
    elif isinstance(batch, Mapping):
        args, kwargs = (), {str(k): v for k, v in cast("Mapping[Any, Any]", batch).items() if k != "labels"}
    else:
        raise ArgumentError(
            "a batch of unknown kind",
            found=type(batch).__name__,
            expected="ids (a tensor), a tuple of positional arguments, or a dict of keyword arguments",
        )
    return cast(
        "tuple[tuple[Any, ...], dict[str, Any]]",
        pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), (args, kwargs)),
    )


def labels_of(batch: Batch, device: torch.device) -> Tensor | None:
    """The batch's ``labels``; else its token ids, -100 where ``attention_mask`` is 0; None if it has neither."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return cast("Tensor", batch["labels"]).to(device)
    ids = _ids(batch)
    if ids is None:
        return None
    labels, real = ids.to(device=device, dtype=torch.long), padding_of(batch, device)
    return labels if real is None else labels.masked_fill(~real, IGNORED)


def padding_of(batch: Batch, device: torch.device) -> Tensor | None:
    """Where the tokens of a batch are real, (B, N) of bool, by its ``attention_mask``; None if it has none."""
    mask = cast("Any", batch).get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.to(device) != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def tokens_in(batch: Batch) -> int:
    """How many tokens a batch holds, padding left out; the number of samples if it holds no ids."""
    ids = _ids(batch)
    if ids is None:
        tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim()]
        return tensors[0].shape[0] if tensors else 0
    real = padding_of(batch, ids.device)
    return ids.numel() if real is None else int(real.sum())


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _ids(batch: Batch) -> Tensor | None:
    """``input_ids``, or else the first integer tensor of two axes."""
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return cast("Tensor", batch["input_ids"])
    found = (t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim() == 2)
    return next((t for t in found if t.dtype in (torch.int64, torch.int32, torch.uint8)), None)
