"""Work: what a step of a stage computes, and on which parameters."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from gatecc.errors import ArgumentError, TrainingError
from gatecc.train.batches import Batch, call_of, device_of, labels_of, padding_of
from gatecc.train.layers import layers_of, match_loss, recorded, transfer_loss, yields
from gatecc.train.lora import Adapters
from gatecc.train.losses import next_token_loss
from gatecc.train.stage import Transfer, Tune


class Work(ABC):
    """A stage at work on a student. Making one decides which parameters require gradients."""

    student: nn.Module
    trained: dict[str, nn.Parameter]

    @abstractmethod
    def backward(self, batch: Batch, weight: float) -> float:
        """The loss of a batch, after ``weight`` times its gradients were added."""

    def clipped(self) -> Sequence[Sequence[nn.Parameter]]:
        """The sets of parameters whose gradients are clipped together."""
        return [list(self.trained.values())]

    def check(self) -> None:
        """Called after the first gradients. Raises TrainingError if the stage can have no effect."""
        if all(p.grad is None for p in self.trained.values()):
            raise TrainingError("no parameter that trains has any effect on the loss", found=", ".join(self.trained))

    def evaluated(self) -> AbstractContextManager[None]:
        """The student as it would be if training ended now."""
        return nullcontext()

    def finish(self) -> None:  # noqa: B027 - most have nothing to finish
        """Called after the last step."""

    def modules(self) -> Mapping[str, nn.Module]:
        """What a checkpoint keeps."""
        return {"student": self.student}


class TransferWork(Work):
    """Layer-wise transfer: each layer runs on the teacher's input, and its gradients stay in it."""

    def __init__(
        self, stage: Transfer, student: nn.Module, teacher: nn.Module, layers: list[str], new: frozenset[str]
    ) -> None:
        self.student, self.teacher, self.layers = student, teacher, layers
        inside = {id(p) for name in layers for p in student.get_submodule(name).parameters()}
        self.trained = _train(student, lambda n, p: id(p) in inside and stage.chooses(n, n in new), str(stage.train))

    def backward(self, batch: Batch, weight: float) -> float:
        args, kwargs = call_of(batch, device_of(self.teacher))
        with torch.no_grad(), recorded(self.teacher, self.layers) as seen:
            self.teacher(*args, **without_cache(self.teacher, kwargs))
        total = 0.0
        for name in self.layers:  # one after the other: the activations of one layer at a time
            loss = transfer_loss(self.student.get_submodule(name), seen[name], name)
            if not loss.requires_grad:
                raise ArgumentError("nothing trains in a layer", where=name, do='Transfer(train="all")')
            cast("Any", loss * weight).backward()
            total += float(loss.detach()) / len(self.layers)
        return total

    def clipped(self) -> Sequence[Sequence[nn.Parameter]]:
        """Each layer by itself: they are independent."""
        trained = {id(p) for p in self.trained.values()}
        layers = [list(self.student.get_submodule(n).parameters()) for n in self.layers]
        return [[p for p in part if id(p) in trained] for part in layers]


class TuneWork(Work):
    """The task's loss, the distance from the teacher's logits, and that of layers from the teacher's layers."""

    def __init__(self, stage: Tune, student: nn.Module, teacher: nn.Module | None, new: frozenset[str]) -> None:
        self.stage, self.student = stage, student
        self.teacher = teacher if stage.distill or stage.hidden else None
        self.layers: list[str] = []
        if stage.hidden and teacher is not None:
            self.layers = layers_of(student, teacher, stage.layers)
        spec, self.adapters = stage.lora, None
        if spec is not None and spec.package == "gatecc":
            self.adapters = Adapters(student, spec)
        added = spec is not None and spec.package == "peft"
        self.trained = _train(
            student,
            lambda n, _: stage.chooses(n, n in new) or (added and ".lora_" in n),
            str(stage.train),
            empty=self.adapters is not None,
        )
        if self.adapters is not None:
            for name in self.adapters.names:
                self.trained.pop(name, None)
                student.get_parameter(name).requires_grad_(False)
            self.trained |= {f"lora.{n}": p for n, p in self.adapters.named_parameters()}

    def backward(self, batch: Batch, weight: float) -> float:
        device = device_of(self.student)
        args, kwargs = call_of(batch, device)
        kwargs = without_cache(self.student, kwargs)
        with yields(self.student, self.layers) as made:
            if self.adapters is None:
                output = self.student(*args, **kwargs)
            else:
                output = functional_call(self.student, self.adapters.weights(self.student), args, kwargs)
        loss = self._loss(output, made, batch, device)
        cast("Any", loss * weight).backward()
        return float(loss.detach())

    def _loss(self, output: Any, made: dict[str, list[Tensor]], batch: Batch, device: torch.device) -> Tensor:
        loss = torch.zeros((), device=device)
        if self.stage.task:
            loss = loss + self.stage.task * self._task(output, batch, device)
        if self.teacher is not None:
            args, kwargs = call_of(batch, device_of(self.teacher))
            with torch.no_grad(), yields(self.teacher, self.layers) as wanted:
                theirs = self.teacher(*args, **without_cache(self.teacher, kwargs))
            keep = padding_of(batch, device)
            if self.stage.distill:
                distance = self.stage.distance_of(logits_of(output), logits_of(theirs).to(device), keep)
                loss = loss + self.stage.distill * distance
            if self.layers:
                loss = loss + self.stage.hidden * match_loss(made, wanted, keep).to(device)
        return loss

    def _task(self, output: Any, batch: Batch, device: torch.device) -> Tensor:
        if self.stage.loss is not None:
            return self.stage.loss(output, pytree.tree_map_only(Tensor, lambda t: t.to(device), batch))
        labels = labels_of(batch, device)
        if labels is None:
            raise ArgumentError(
                "the batch has no token ids to predict", found=type(batch).__name__, do="Tune(loss=...), or task=0"
            )
        return next_token_loss(logits_of(output), labels)

    def check(self) -> None:
        """Adapters of which one gets no gradient would train nothing there and be merged as if they had."""
        super().check()
        idle = [n for n, p in self.trained.items() if "lora" in n and p.grad is None]
        if idle:
            raise TrainingError(
                "an adapter has no effect", found=", ".join(idle), do="choose Lora(targets=...) that the forward reads"
            )

    def evaluated(self) -> AbstractContextManager[None]:
        return nullcontext() if self.adapters is None else self.adapters.merged(self.student)

    def finish(self) -> None:
        if self.adapters is not None:
            self.adapters.merge(self.student)

    def modules(self) -> Mapping[str, nn.Module]:
        own = {"student": self.student}
        return own if self.adapters is None else {**own, "adapters": self.adapters}


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the output itself, its ``logits``, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = logits if logits is not None else _first(output)
    if not isinstance(found, Tensor):
        raise ArgumentError("the model's output has no logits", found=type(output).__name__, do="Tune(loss=...)")
    return found


def without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Training reads no cache: models that would fill one are told so."""
    if "use_cache" in kwargs or "use_cache" not in inspect.signature(model.forward).parameters:
        return kwargs
    return {**kwargs, "use_cache": False}


def _first(output: Any) -> Any:
    return next(iter(cast("Any", output)), None) if isinstance(output, tuple | list) else None


def _train(student: nn.Module, chosen: Any, what: str, *, empty: bool = False) -> dict[str, nn.Parameter]:
    """Let the chosen parameters require gradients, and no others. Raises ArgumentError if there are none."""
    trained = {n: p for n, p in student.named_parameters() if chosen(n, p) and p.is_floating_point()}
    if not trained and not empty:
        raise ArgumentError("no parameter of the student is chosen to train", found=f"train={what}")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
    return trained
