"""heal: training after a rewrite that changes the function. First layer by layer, then the whole model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from gatecc.errors import ArgumentError, CheckpointError, TrainingError
from gatecc.train import routing
from gatecc.train.batches import Batch, Stream, device_of, random_state, set_random_state, tokens_in
from gatecc.train.layers import layers_of
from gatecc.train.peft import inject
from gatecc.train.progress import Bar
from gatecc.train.ranks import Ranks, clip
from gatecc.train.resume import Folder, Stored, load_optimizers, load_tensors, settings_of
from gatecc.train.stage import Optimizers, Stage, Transfer, Tune, hidden_matrices
from gatecc.train.work import TransferWork, TuneWork, Work


@dataclass(frozen=True)
class Point:
    """One step of the curve: the stage, tokens read so far by both stages, the loss, and the evaluation if there was
    one."""

    stage: str
    step: int
    tokens: int
    loss: float
    value: float | None = None


@dataclass
class Healed:
    """What healing did: the curve, tokens and seconds; ``student`` is the model that was passed, trained in place."""

    student: nn.Module
    curve: list[Point] = field(default_factory=list[Point])
    tokens: int = 0
    seconds: float = 0.0

    @property
    def values(self) -> list[tuple[int, float]]:
        """The evaluations as (tokens, value)."""
        return [(p.tokens, p.value) for p in self.curve if p.value is not None]


def heal(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Iterable[Batch],
    *,
    transfer: Transfer | None = None,
    tune: Tune | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    every: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 50,
    progress: bool | None = None,
) -> Healed:
    """Train a student in place towards its teacher: layer-wise attention transfer, then the task with distillation.

    Args:
        student: the rewritten model, or any module.
        teacher: the model before the rewrite; None if no stage asks for it.
        data: a DataLoader or any iterable of batches: ids (B, N), a tuple of positional arguments, or a dict of
            keyword arguments (``labels`` in it are for the loss; -100 is left out). It is read again when it ends.
        transfer, tune: the stages, in this order; one may be None.
        evaluate: a figure of the student, recorded before the first step, after each stage, and ``every`` so many
            steps. The student is in eval mode, adapters are merged, and no gradient is taken.
        checkpoint: a folder that holds the whole state of the run, replaced as one every ``save_every`` steps and
            after each stage. If it holds a state of a run with these settings, that run is continued, bit by bit; with
            more steps in its last stage, or further stages, it goes on where it ended. Rates are those of the schedule
            of all steps: at step n of N that of an uninterrupted run of N steps.
        progress: show a bar; None: if stderr is a terminal.

    Under torchrun, with a process group, each rank takes batches of its own, gradients are averaged, and the first rank
    writes checkpoints and shows progress: W ranks take the steps of one that accumulates W batches. ``evaluate`` runs
    on all ranks, and its mean is recorded. Experts may be sharded by `gatecc.parallel.expert_parallel`.

    Training and eval modes, and which parameters require gradients, are afterwards as they were before.

    Raises ArgumentError, CheckpointError, MissingPackageError; TrainingError if a loss is not finite, or an adapter
    turns out to have no effect.
    """
    stages = [s for s in (transfer, tune) if s is not None]
    if not stages:
        raise ArgumentError("no stage to run", expected="transfer=Transfer(...), tune=Tune(...), or both")
    if teacher is None and (transfer is not None or (tune is not None and (tune.distill or tune.hidden))):
        raise ArgumentError("this needs a teacher", found="teacher=None", do="pass the model before the rewrite")
    if teacher is student:
        raise ArgumentError("the teacher is the student", do="transform makes a copy unless inplace=True")
    ranks = Ranks()
    ranks.alike(student, teacher)
    folder = None if checkpoint is None else Folder(checkpoint, [settings_of(s) for s in stages], ranks)
    run = _Run(student, teacher, Stream(data, ranks), evaluate, every, folder, save_every)
    modes = [(m, m.training) for model in (student, teacher) if model is not None for m in model.modules()]
    needs = {p: p.requires_grad for model in (student, teacher) if model is not None for p in model.parameters()}
    try:
        with Bar(progress if ranks.first else False) as bar, torch.inference_mode(False), torch.enable_grad():
            run.stages(stages, bar)
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needed in needs.items():
            parameter.requires_grad_(needed)
    return run.healed


class _Run:
    """One call of heal."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        stream: Stream,
        evaluate: Callable[[nn.Module], float] | None,
        every: int,
        folder: Folder | None,
        save_every: int,
    ) -> None:
        self.healed = Healed(student)
        self.teacher = teacher
        self.stream = stream
        self.ranks = stream.ranks
        self.evaluate = evaluate
        self.every = every
        self.folder = folder
        self.save_every = save_every
        self.new = _new_names(student, teacher)

    def stages(self, stages: Sequence[Stage], bar: Bar) -> None:
        """All stages, or what is left of them."""
        stored = None if self.folder is None else self.folder.read()
        first = 0 if stored is None else int(stored[0]["stage"])
        if stored is None:
            self._point("start", 0, float("nan"), self._value())
        for number in range(first, len(stages)):
            self._stage(number, stages[number], stored if number == first else None, bar)

    def _stage(self, number: int, stage: Stage, stored: Stored | None, bar: Bar) -> None:
        work = self._work(stage)
        if routing.aux_losses(self.healed.student):
            routing.scale_losses(self.healed.student, 1 / stage.accumulate)
        optimizers = stage.optimizers(work.trained, self.new, hidden_matrices(self.healed.student))
        done = 0 if stored is None else self._restore(stored, work, optimizers)
        name = type(stage).__name__.lower()
        bar.stage(name, stage.steps, done)
        clock, before = time.monotonic(), self.healed.tokens
        for step in range(done, stage.steps):
            loss = self._step(stage, work, optimizers, step)
            last = step + 1 == stage.steps
            if last:
                work.finish()
            due = last or (self.every > 0 and (step + 1) % self.every == 0)
            self._point(name, step + 1, loss, self._value(work) if due else None)
            elapsed = time.monotonic() - clock
            bar.step(step + 1, loss, (self.healed.tokens - before) / max(elapsed, 1e-9))
            if last or (step + 1) % self.save_every == 0:
                self._save(number, step + 1, work, optimizers)
        self.healed.seconds += time.monotonic() - clock

    def _work(self, stage: Stage) -> Work:
        student, teacher = self.healed.student, self.teacher
        for module in student.modules():
            module.training = isinstance(stage, Tune)  # in the transfer dropout would be noise that no layer can learn
        if teacher is not None:
            teacher.eval()
        if isinstance(stage, Transfer):
            assert teacher is not None
            return TransferWork(stage, student, teacher, layers_of(student, teacher, stage.layers), self.new)
        assert isinstance(stage, Tune)
        if stage.lora is not None and stage.lora.package == "peft":
            inject(student, stage.lora)
        return TuneWork(stage, student, teacher, self.new)

    def _step(self, stage: Stage, work: Work, optimizers: Optimizers, step: int) -> float:
        """One update. The batches of an accumulation count alike."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * stage.rate(step)
            optimizer.zero_grad()
        device, loss = device_of(self.healed.student), 0.0
        for _ in range(stage.accumulate):
            batch = self.stream.next()
            with _autocast(stage, device):
                loss += work.backward(batch, 1 / stage.accumulate) / stage.accumulate
            self.healed.tokens += int(self.ranks.total(tokens_in(batch), device))
        self.ranks.average(list(work.trained.values()))
        loss = self.ranks.mean(loss, device)
        if loss != loss or abs(loss) == float("inf"):
            raise TrainingError(
                "the loss is not finite", found=f"{loss} at step {step + 1}", do="lower the rate, or autocast=None"
            )
        if step == 0:
            work.check()
        for part in work.clipped():
            if stage.clip:
                clip(part, stage.clip)
        for optimizer in optimizers:
            optimizer.step()
        if isinstance(stage, Tune):  # in the transfer routers are in eval mode
            routing.step(self.healed.student)
        return loss

    def _value(self, work: Work | None = None) -> float | None:
        if self.evaluate is None:
            return None
        student = self.healed.student
        modes = [(m, m.training) for m in student.modules()]
        student.eval()
        try:
            with torch.no_grad(), nullcontext() if work is None else work.evaluated():
                return self.ranks.mean(float(self.evaluate(student)), device_of(student))
        finally:
            for module, training in modes:
                module.training = training

    def _point(self, stage: str, step: int, loss: float, value: float | None) -> None:
        self.healed.curve.append(Point(stage, step, self.healed.tokens, loss, value))

    def _save(self, number: int, step: int, work: Work, optimizers: Optimizers) -> None:
        if self.folder is None:
            return
        state = {
            "stage": number,
            "step": step,
            "tokens": self.healed.tokens,
            "curve": [list(asdict(p).values()) for p in self.healed.curve],
            "stream": self.stream.place(),
            "random": self.ranks.all(random_state()),
        }
        self.folder.save(state, work.modules(), optimizers)

    def _restore(self, stored: Stored, work: Work, optimizers: Optimizers) -> int:
        """Put a stored state back; returns the number of steps that were done in its stage."""
        state, tensors = stored
        random = state["random"] if isinstance(state["random"], list) else [state["random"]]
        if len(random) != self.ranks.count:
            raise CheckpointError(
                "the run was begun on another number of ranks",
                found=str(len(random)),
                expected=str(self.ranks.count),
                do="go on with as many, or begin anew from the weights",
            )
        for name, module in work.modules().items():
            load_tensors(name, module, tensors)
        load_optimizers(optimizers, state["optimizers"])
        self.healed.curve = [Point(*values) for values in state["curve"]]
        self.healed.tokens = int(state["tokens"])
        self.stream.go(state["stream"])
        set_random_state(random[self.ranks.rank])
        return int(state["step"])


def _new_names(student: nn.Module, teacher: nn.Module | None) -> frozenset[str]:
    """The student's parameters that the teacher has none of; without a teacher none is new."""
    if teacher is None:
        return frozenset()
    return frozenset({n for n, _ in student.named_parameters()} - {n for n, _ in teacher.named_parameters()})


def _autocast(stage: Stage, device: torch.device) -> Any:
    return nullcontext() if stage.autocast is None else torch.autocast(device.type, dtype=stage.autocast)
