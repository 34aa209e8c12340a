"""Ranks: one run of healing in several processes, each with batches of its own; gradients are averaged.

A run on W ranks takes the steps of a run on one that accumulates W batches. Without a process group there is one rank,
and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gatecc.capture.neutral import is_shard
from gatecc.capture.wrappers import wrapper_of
from gatecc.errors import ArgumentError, CheckpointError

BUCKET = 1 << 25  # elements that are averaged at once


class Ranks:
    """The processes of a run. Every method is called by all of them, in the same order."""

    def __init__(self) -> None:
        there = dist.is_available() and dist.is_initialized()
        if not there and dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
            raise ArgumentError(
                "torchrun has started several processes, which have no process group",
                found=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
                do='torch.distributed.init_process_group("nccl"), or "gloo" on CPUs, before heal',
            )
        self.count = dist.get_world_size() if there else 1
        self.rank = dist.get_rank() if there else 0

    @property
    def first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    def alike(self, *models: nn.Module | None) -> None:
        """Give every rank the first one's weights; shards stay each rank's own.

        Raises ArgumentError for a wrapper that averages gradients itself and hides the names.
        """
        for model in models:
            wrapper = None if model is None else wrapper_of(model)
            if wrapper is not None and wrapper.name != "fully_shard":
                raise ArgumentError("healing averages gradients itself", found=wrapper.name, do="pass the model inside")
            if model is not None and self.count > 1:
                for tensor in (*model.parameters(), *model.buffers()):
                    if not is_shard(tensor):
                        dist.broadcast(tensor.detach(), 0)

    def from_first(self, value: Any) -> Any:
        """The first rank's value, which can be pickled."""
        if self.count == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, 0)
        return held[0]

    def all(self, value: Any) -> list[Any]:
        """The values of all ranks, which can be pickled."""
        if self.count == 1:
            return [value]
        held: list[Any] = [None] * self.count
        dist.all_gather_object(held, value)
        return held

    def mean(self, value: float, device: torch.device) -> float:
        """The mean over ranks."""
        return self.total(value, device) / self.count

    def total(self, value: float, device: torch.device) -> float:
        """The sum over ranks."""
        if self.count == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        dist.all_reduce(held)
        return float(held)

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their means over ranks; those of shards are whoever's who made the shards.

        One that some rank has and another has not is zero there.
        """
        if self.count == 1:
            return
        own = [p for p in parameters if not is_shard(p)]
        if not own:
            return
        there = torch.tensor([p.grad is not None for p in own], dtype=torch.uint8, device=own[0].device)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        grads: list[Tensor] = []
        for p, some in zip(own, there.tolist(), strict=True):
            if some:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                grads.append(p.grad)
        for bucket in _buckets(grads):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            flat /= self.count
            for g, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(mean.view_as(g))

    def same_folder(self, step: tuple[int, int] | None, path: object) -> None:
        """Raise CheckpointError unless all ranks have read the same checkpoint, or none."""
        found = self.all(step)
        if any(other != found[0] for other in found):
            raise CheckpointError(
                "the ranks see different checkpoints",
                where=str(path),
                found=", ".join(f"rank {i}: {'none' if s is None else f'step {s[1]}'}" for i, s in enumerate(found)),
                do="choose a folder on a file system that all ranks share",
            )

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()


def clip(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Clip gradients by their norm; shards count as the whole that they are of."""
    held = list(parameters)
    if any(is_shard(p) for p in held):
        from gatecc.parallel import clip_grad_norm_  # it imports DTensor, which takes time

        clip_grad_norm_(held, most)
    else:
        nn.utils.clip_grad_norm_(held, most)


def whole(tree: Any) -> Any:
    """Plain data with the whole tensor in the place of each shard."""
    return pytree.tree_map_only(Tensor, lambda t: cast("Any", t).full_tensor() if is_shard(t) else t, tree)


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as the shard that this rank has of ``like``, or as it is."""
    if not is_shard(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    at = cast("Any", like)
    return distribute_tensor(tensor.to(like.device), at.device_mesh, at.placements, src_data_rank=None)


def placed_state(state: Mapping[int, Any], parameters: Sequence[Tensor]) -> dict[int, Any]:
    """What an optimizer keeps of each parameter, from whole tensors."""
    found: dict[int, Any] = {}
    for i, kept in state.items():
        found[i] = {k: placed(v, parameters[i]) if isinstance(v, Tensor) else v for k, v in kept.items()}
    return found


def _buckets(grads: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Gradients of one dtype and device together, up to a number of elements."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for g in grads:
        kinds.setdefault((g.dtype, g.device), []).append(g)
    for of_kind in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for g in of_kind:
            if bucket and size + g.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(g)
            size += g.numel()
        yield bucket
