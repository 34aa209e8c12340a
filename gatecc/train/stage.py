"""Stages: the settings of healing. How long and how fast, which parameters train, and on what."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gatecc.errors import ArgumentError
from gatecc.train.lora import Lora
from gatecc.train.losses import kld
from gatecc.train.muon import Muon

Loss = Callable[[Any, Any], Tensor]  # (output of the student, batch) -> scalar
Optimizers = list[Optimizer]
Distillation = Callable[[Tensor, Tensor], Tensor]  # (student's logits, teacher's logits) -> scalar


@dataclass(frozen=True)
class Stage:
    """``steps`` updates, each from ``accumulate`` batches.

    ``optimizer``: "adamw"; "muon" gives the matrices of hidden layers to torch.optim.Muon, at AdamW's rates, and the
    rest to AdamW, which gets further on little data (where a CPU is slow at bfloat16, in float32: train/muon.py). The
    rate climbs to ``lr`` over ``warmup`` steps and falls along a cosine to ``floor`` times it. Parameters that the
    teacher does not have, such as gates, have ``lr_new`` (None: ``lr``). ``train``: "new" trains these alone, "all"
    every parameter, a tuple of globs those whose names match. Gradients are clipped to the norm ``clip`` (0: not).
    ``autocast`` is the dtype of matrix products, such as torch.bfloat16.
    """

    steps: int
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    lr_new: float | None = None
    warmup: int = 10
    floor: float = 0.02
    train: Literal["new", "all"] | tuple[str, ...] = "all"
    accumulate: int = 1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1 or self.lr <= 0 or self.warmup < 0 or not 0 <= self.floor <= 1:
            raise ArgumentError(
                "no such stage",
                found=str(self),
                expected="steps and accumulate >= 1, lr > 0, warmup >= 0, floor between 0 and 1",
            )
        if self.optimizer not in ("adamw", "muon"):
            raise ArgumentError("unknown optimizer", found=repr(self.optimizer), expected='"adamw" or "muon"')
        if isinstance(self.train, str) and self.train not in ("new", "all"):
            raise ArgumentError("what trains?", found=repr(self.train), expected='"new", "all", or a tuple of globs')

    def rate(self, step: int) -> float:
        """The factor of the rate at a step, counted from 0."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        return warm * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * step / self.steps)))

    def chooses(self, name: str, new: bool) -> bool:
        """Whether a parameter trains; ``new``: the teacher has none of this name."""
        if self.train == "all":
            return True
        return new if self.train == "new" else any(fnmatchcase(name, glob) for glob in self.train)

    def optimizers(
        self, trained: Mapping[str, nn.Parameter], new: frozenset[str], hidden: frozenset[str]
    ) -> Optimizers:
        """The optimizers over what trains. ``new``: the teacher has none of the name; ``hidden``: for Muon."""
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            rate = self.lr_new if name in new and self.lr_new is not None else self.lr
            groups.setdefault((self.optimizer == "muon" and name in hidden, rate), []).append(parameter)
        muon, adamw = (
            [{"params": part, "lr": lr, "peak": lr} for (kind, lr), part in groups.items() if kind is wanted]
            for wanted in (True, False)
        )
        made: list[Optimizer] = []
        if muon:
            made.append(Muon(muon, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw"))
        if adamw:
            made.append(AdamW(adamw, betas=self.betas, weight_decay=self.weight_decay))
        return made


def hidden_matrices(model: nn.Module) -> frozenset[str]:
    """The matrices that map features to features: no embedding, nothing as long as a vocabulary, no thin table."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    sizes = {t.shape[0] for t in tables}
    return frozenset(
        n
        for n, p in model.named_parameters()
        if p.dim() == 2 and p.shape[0] not in sizes and min(p.shape) > 8 and not any(p is t for t in tables)
    )


@dataclass(frozen=True)
class Transfer(Stage):
    """Stage 1, attention transfer: each rewritten layer learns to yield what the teacher's layer yields on its input.

    The inputs are the teacher's, so the layers learn independently of one another and no error adds up. ``layers``:
    names or globs of modules that both models have; None: every scope of the student. The loss of a layer is the mean
    squared difference of its first output tensor, relative to the mean square of the teacher's (LoLCATs, 2024).
    """

    layers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Tune(Stage):
    """Stage 2: the whole model on its task, by full fine-tuning or adapters.

    The loss is ``task`` times the task's loss (next token cross entropy, or ``loss(output, batch)``) plus ``distill``
    times the distance from the teacher's logits: KL with ``temperature``, or ``distance(student, teacher)``, for
    example ``functools.partial(topk_kld, k=32)``, plus ``hidden`` times the distance of what layers yield from what the
    teacher's yield, as in Transfer, but each model in its own stream (MOHAWK, 2024). ``layers``: names or globs of
    modules that both models have; None: every scope of the student. ``lora``: the matrices that it selects train
    through low-rank adapters, and in full only what ``train`` chooses, by default the new parameters. At the end they
    are merged.
    """

    task: float = 1.0
    loss: Loss | None = None
    distill: float = 0.0
    temperature: float = 1.0
    distance: Distillation | None = None
    hidden: float = 0.0
    layers: tuple[str, ...] | None = None
    lora: Lora | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = (self.task, self.distill, self.hidden)
        if min(weights) < 0 or not any(weights) or self.temperature <= 0:
            raise ArgumentError(
                "nothing to learn from",
                found=f"task={self.task}, distill={self.distill}, hidden={self.hidden}",
                expected="one of them > 0, none < 0",
            )
        if self.lora is not None and self.train == "all":
            object.__setattr__(self, "train", "new")

    def distance_of(self, student: Tensor, teacher: Tensor, keep: Tensor | None) -> Tensor:
        """The distillation loss of logits (..., V); ``keep`` (...) leaves padding out."""
        if self.distance is None:
            return kld(student, teacher, temperature=self.temperature, keep=keep)
        return self.distance(*((student, teacher) if keep is None else (student[keep], teacher[keep])))
