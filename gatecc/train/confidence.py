"""Confidence: when a loop over steps may stop, from the traces of a calibration set; and networks made to spike."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatecc.capture.signature import split_inputs
from gatecc.errors import ArgumentError
from gatecc.passes.loop.merge import Confidence
from gatecc.passes.loop.neuron import Neuron

NEVER = 2.0  # a threshold that no probability is above


@dataclass(frozen=True)
class Stop:
    """What a threshold does on a calibration set: the share of right answers, and the mean number of steps."""

    threshold: float
    accuracy: float
    steps: float


@torch.no_grad()
def confidence_traces(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """The accumulated logits of every step of a loop that may stop, (samples, T, C). ``batches`` are inputs of the
    model. All samples take all steps meanwhile. Raises ArgumentError for a model without such a loop."""
    found: list[Tensor] = []
    for inputs in batches:
        args, kwargs = split_inputs(inputs)
        with _all_steps(model) as sums:
            last = model(*args, **kwargs)
        out = last if isinstance(last, Tensor) else last.logits
        steps = [sums[t] for t in sorted(sums)]
        found.append(torch.stack([*steps, out * (len(steps) + 1)], 1))
    if not found:
        raise ArgumentError("there is nothing to calibrate on", found="no batch", expected="inputs of the model")
    return torch.cat(found)


def stops(
    traces: Tensor, labels: Tensor, thresholds: Iterable[float] | None = None, *, temperature: float = 1.0
) -> list[Stop]:
    """What each threshold would do, by falling number of steps, from traces (N, T, C) alone; nothing runs again.

    Without ``thresholds``: those halfway between the confidences that occur, one that always and one that never stops.
    """
    if traces.dim() != 3 or labels.shape != traces.shape[:1] or not len(labels):
        raise ArgumentError(
            "these are not the traces of labelled samples",
            found=f"traces {tuple(traces.shape)}, labels {tuple(labels.shape)}",
            expected="(N, T, C) with N > 0, and (N,)",
        )
    confidence = (traces.float() / temperature).softmax(-1).amax(-1)  # (N, T)
    right = traces.argmax(-1) == labels.unsqueeze(-1)
    if thresholds is None:  # between those that occur, where rounding decides nothing
        occur = confidence[:, :-1].double().flatten().unique()
        thresholds = [NEVER, 0.0, *((occur[:-1] + occur[1:]) / 2).tolist()]
    tried = [torch.tensor(t, dtype=torch.float32).item() for t in thresholds]  # as the buffer holds it
    found: list[Stop] = []
    for threshold in tried:
        sure = confidence > threshold
        sure[:, -1] = True
        at = sure.int().argmax(1, keepdim=True)
        accuracy = float(right.gather(1, at).double().mean())
        found.append(Stop(threshold, accuracy, float((at + 1).double().mean())))
    return sorted(found, key=lambda s: (-s.steps, s.threshold))


def pareto(tried: Iterable[Stop]) -> list[Stop]:
    """Those that no other beats in accuracy with as few steps, by falling number of steps."""
    found: list[Stop] = []
    for stop in sorted(tried, key=lambda s: (s.steps, -s.accuracy)):
        if not found or stop.accuracy > found[-1].accuracy:
            found.append(stop)
    return found[::-1]


def pick_threshold(traces: Tensor, labels: Tensor, loss: float = 0.0, *, temperature: float = 1.0) -> Stop:
    """The point of the Pareto front with the fewest steps that loses at most ``loss`` of the accuracy of all steps."""
    tried = stops(traces, labels, temperature=temperature)
    whole = next(s for s in tried if s.threshold == NEVER)
    return next(s for s in reversed(pareto(tried)) if s.accuracy >= whole.accuracy - loss)


@torch.no_grad()
def balance(model: nn.Module, run: Callable[[nn.Module], Any], original: nn.Module) -> dict[str, float]:
    """Set threshold and amplitude of each neuron to the largest output of the activation that it stands for.

    ``run(original)`` calls the network of before on calibration data. Returns the thresholds by neuron. Raises
    ArgumentError for activations that are no modules, which cannot be watched.
    """
    found: dict[str, float] = {}
    for name, neuron in model.named_modules():
        if not isinstance(neuron, Neuron):
            continue
        path = name.rpartition("neuron_")[2]
        watched = {n.replace(".", "_"): m for n, m in original.named_modules()}.get(path)
        if watched is None or next(watched.children(), None) is not None:
            raise ArgumentError(
                "the activation of a neuron is no module of the original",
                where=name,
                do="set its buffers threshold and amplitude yourself",
            )
        peaks: list[float] = []
        handle = watched.register_forward_hook(lambda _, __, y, peaks=peaks: peaks.append(float(y.max())))
        try:
            run(original)
        finally:
            handle.remove()
        if not peaks or max(peaks) <= 0:
            raise ArgumentError("an activation is 0 on all calibration data", where=path, do="give more data")
        found[name] = max(peaks)
    for name, peak in found.items():
        neuron = model.get_submodule(name)
        neuron.get_buffer("threshold").fill_(peak)
        neuron.get_buffer("amplitude").fill_(peak)
    return found


@contextmanager
def _all_steps(model: nn.Module) -> Generator[dict[int, Tensor]]:
    """Let no sample stop, and note the accumulated logits of each step but the last, by its number."""
    modules = [m for m in model.modules() if isinstance(m, Confidence)]
    if len(modules) != 1:
        raise ArgumentError(
            "the model has no loop that may stop",
            found=f"{len(modules)} of them",
            expected="one",
            do='gatecc.transform(model, "dynamic-confidence", inputs)',
        )
    (module,) = modules
    seen: dict[int, Tensor] = {}
    before = module.threshold.clone()
    module.threshold.fill_(NEVER)

    def note(_: nn.Module, given: tuple[Tensor, Tensor], __: Tensor) -> None:
        seen[int(given[1])] = given[0].clone()

    handle = module.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
        module.threshold.copy_(before)
