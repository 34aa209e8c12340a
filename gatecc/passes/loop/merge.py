"""Merge: what becomes of the results of a loop's steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.gates.option import Option
from gatecc.ir.program import shape
from gatecc.ir.site import Site
from gatecc.ir.sizes import described_shape
from gatecc.ir.skipped import mark, sees_all, skipped_at
from gatecc.passes.operands import place


@dataclass(frozen=True)
class Merge(Option, slot="merge"):
    """Base of the ways to make one result of those of all steps."""

    def join(self, results: Sequence[fx.Node], site: Site, edit: Editor) -> fx.Node:
        """The node of the one result. ``results``: of each step, of one shape. Raises SiteRefusedError."""
        raise NotImplementedError


@dataclass(frozen=True)
class Last(Merge, tag="last"):
    """The last step's."""

    def join(self, results: Sequence[fx.Node], site: Site, edit: Editor) -> fx.Node:
        return results[-1]


def total(*results: Tensor) -> Tensor:
    """y_1 + ... + y_T, in their order"""
    y = results[0]
    for result in results[1:]:
        y = y + result
    return y


def average(*results: Tensor) -> Tensor:
    """(y_1 + ... + y_T) / T"""
    return total(*results) / len(results)


@dataclass(frozen=True)
class Mean(Merge, tag="mean"):
    """The mean of all steps'."""

    def join(self, results: Sequence[fx.Node], site: Site, edit: Editor) -> fx.Node:
        return edit.call(average, *results, name="mean_of_steps")


@dataclass(frozen=True)
class Sum(Merge, tag="sum"):
    """The sum of all steps'."""

    def join(self, results: Sequence[fx.Node], site: Site, edit: Editor) -> fx.Node:
        return edit.call(total, *results, name="sum_of_steps")


class Confidence(nn.Module):
    """Whether a sample goes on: unless the largest probability of its accumulated logits is above ``threshold`` ().

    The threshold is a buffer, which may be changed at any time; above 1 every sample takes all steps.
    """

    threshold: Tensor

    def __init__(self, threshold: float, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("threshold", torch.tensor(threshold))

    def forward(self, logits: Tensor, step: Tensor) -> Tensor:
        """logits: (B, C) -> (B, 1) of bool. ``step`` () is for hooks, which are called in any order."""
        return (logits.float() / self.temperature).softmax(-1).amax(-1, keepdim=True) <= self.threshold


def divided(y: Tensor, steps: int) -> Tensor:
    """The mean of so many steps"""
    return y / steps


def numbered(y: Tensor, step: int) -> Tensor:
    """The number of a step, ()"""
    return y.new_full((), step)


def onward(goes_on: Tensor, later: Tensor, now: Tensor) -> Tensor:
    """y <- what later steps make of it where the sample goes on, else what is known now"""
    return torch.where(goes_on, later, now)


@dataclass(frozen=True)
class Confident(Merge, tag="confident"):
    """The mean of the steps up to the first whose confidence is above ``threshold``; the others are not computed.

    Logits are added up step by step; the confidence of a sample is the largest probability of softmax(sum /
    ``temperature``). Samples that are sure leave the batch. With a threshold above 1 (float32 reaches exactly 1) every
    sample takes all steps.
    """

    threshold: float = 0.9
    temperature: float = 1.0

    def check(self) -> None:
        self.require(self.threshold >= 0, "threshold", "a number >= 0; above 1 no sample stops early")
        self.require(self.temperature > 0, "temperature", "a number > 0")

    def join(self, results: Sequence[fx.Node], site: Site, edit: Editor) -> fx.Node:
        if len(shape(results[0])) != 2:
            raise SiteRefusedError(
                "the confidence of a sample is that of one row of logits",
                where=place(site),
                found=f"({described_shape(results[0])})",
                expected="(B, classes)",
                do='loop over an output with one row per sample: "model[...].logits"',
            )
        path = edit.module("confidence", lambda: Confidence(self.threshold, self.temperature))
        sums = [results[0]]
        for result in results[1:]:
            sums.append(edit.call(total, sums[-1], result, name="accumulated"))
        means = [edit.call(divided, y, i + 1, name="mean_of_steps") for i, y in enumerate(sums)]
        steps = [edit.call(numbered, y, t, name="step") for t, y in enumerate(sums[:-1])]
        onwards = [edit.call(path, y, step, name="goes_on") for y, step in zip(sums, steps, strict=False)]
        found, joins = means[-1], list[fx.Node]()
        for goes_on, now in zip(onwards[::-1], means[-2::-1], strict=True):
            found = edit.call(onward, goes_on, found, now, name="until_sure")
            joins.append(found)
        for node in joins:
            _mark(node, site, edit)
        return found


def _mark(node: fx.Node, site: Site, edit: Editor) -> None:
    """See that the later steps can be left out for the samples that stopped, and mark them so."""
    if shape(node)[0] == 0 or any(map(sees_all, edit.program.calls())):
        return  # such as a batch norm in training: all samples take all steps, and what is late is masked
    why = skipped_at(edit.program, node)
    if isinstance(why, str):
        raise SiteRefusedError(
            "later steps cannot be left out for some samples and computed for others",
            where=place(site),
            found=why,
            expected="a model that computes each sample by itself, on an example with two samples or more",
            do='merge="mean", or leave out what shows the inside of the steps',
        )
    mark(node)
