"""Workspace: the blocks of a model as modules that a controller calls in an order of its own, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, fx, nn

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector, select
from gatecc.ir.site import Block, Site, Value
from gatecc.ir.skipped import mark, sees_all, skipped_at
from gatecc.passes.loop.carry import needed
from gatecc.passes.operands import beside, place, stage, static_sizes
from gatecc.passes.samples import over

SCRIPT = 4.0  # the logit of a scripted module before training: e^4 times as likely as each of the others


class Controller(nn.Module):
    """An LSTM cell over the steps. ``script`` (T, E): what the modules of a step score before anything is learned."""

    def __init__(self, channels: int, hidden: int, modules: int, steps: int) -> None:
        super().__init__()
        self.cell = nn.Linear(channels + hidden, 4 * hidden)
        self.score = nn.Linear(hidden, modules)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        order = torch.arange(steps) % modules
        self.script = nn.Parameter(SCRIPT * nn.functional.one_hot(order, modules).float())

    def forward(self, x: Tensor, h: Tensor, c: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C), h, c: (B, H) -> probabilities of the modules (B, E), and the next h and c."""
        i, f, g, o = self.cell(torch.cat([x, h], -1)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (self.score(h) + self.script[step]).softmax(-1), h, c


def pooled(w: Tensor, channels: int) -> Tensor:
    """The mean of a workspace over its positions. w: (B, ..., C) with C at an axis -> (B, C)"""
    return w.movedim(channels, 1).flatten(2).mean(2)


def unset(x: Tensor, hidden: int) -> Tensor:
    """A state before the first step, (B, H)"""
    return x.new_zeros(x.size(0), hidden)


def takes(p: Tensor, w: Tensor, number: int) -> Tensor:
    """Whether a module is the most likely one, the first of equals. p: (B, E) -> (B, 1, ...) of bool"""
    return over(p.argmax(-1) == number, w)


def chosen(condition: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """w <- module(w) where the sample takes it"""
    return torch.where(condition, value, other)


def credited(w: Tensor, p: Tensor) -> Tensor:
    """w times p_i / p_i of the module that was taken: 1, with the gradient of log p_i. p: (B, E)"""
    taken = p.amax(-1)
    return w * over(taken / taken.detach(), w).to(w.dtype)


def weighted(p: Tensor, *results: Tensor) -> Tensor:
    """w <- sum_i p_i module_i(w)"""
    y = over(p[:, 0], results[0]).to(results[0].dtype) * results[0]
    for i, result in enumerate(results[1:], 1):
        y = y + over(p[:, i], result).to(result.dtype) * result
    return y


@dataclass(frozen=True)
class Workspace(Rewrite):
    """Let a controller call the blocks of a model in an order of its own: w <- module_i(w), step by step.

    The stream is the workspace; ``blocks`` selects the modules, a chain in which each reads what the one before left.
    An LSTM cell of ``hidden`` units reads the mean of the workspace over its positions in each of ``steps`` steps
    (0: as many as there are modules) and gives every module a probability. The most likely one is taken, and the others
    do not run for this sample; with ``hard=False`` all of them run, w <- sum_i p_i module_i(w). At first step t takes
    module t: the model's own chain, exactly.
    """

    name = "workspace"

    blocks: str = "block[...]"
    steps: int = 0
    hidden: int = 32
    hard: bool = True

    def __post_init__(self) -> None:
        Selector.parse(self.blocks)
        if type(self.steps) is not int or self.steps < 0 or self.hidden < 1:
            raise ArgumentError(
                "a controller of this kind calls nothing",
                found=f"steps={self.steps!r}, hidden={self.hidden!r}",
                expected="a number of steps (0: one for each module), and hidden >= 1",
            )
        if self.site.kind != "model":
            raise ArgumentError("a workspace is that of a model", found=str(self.site), expected="model[...]")

    def contract(self) -> Contract:
        return identity_at_init() if self.hard and not self.steps else changes_function()

    def effects(self) -> Effects:
        return Effects(whole_model=True, loses_cache=True)

    def reads(self) -> Iterable[str]:
        return (self.site.stage,)

    def rewrite(self, site: Site, edit: Editor) -> None:
        modules = [s for s in select(Selector.parse(self.blocks), edit.sites) if isinstance(s, Block)]
        _check_chain(modules, site)
        given, out = stage(modules[0], "in"), stage(modules[-1], "out")
        bodies = [_body(stage(m, "in").node, stage(m, "out").node, m) for m in modules]
        channels = static_sizes(given).get("c")
        if channels is None:
            raise SiteRefusedError(
                "the workspace has no channels that a controller could read",
                where=place(modules[0]),
                found=f"axes {given.axes}",
                expected="a fixed number of channels, c",
            )
        steps = self.steps or len(modules)
        path = edit.module("controller", lambda: beside(Controller(channels, self.hidden, len(modules), steps), edit))
        last = self._stepped(path, given, bodies, steps, edit)
        edit.replace(out.node, last)

    def _stepped(self, path: str, given: Value, bodies: Sequence[_Body], steps: int, edit: Editor) -> fx.Node:
        w, axis = given.node, given.axes.index("c")
        read = edit.call(pooled, w, axis, name="read")
        h = c = edit.call(unset, read, self.hidden, name="unset")
        for t in range(steps):
            read = edit.call(pooled, w, axis, name="read") if t else read
            p, h, c = cast("tuple[fx.Node, fx.Node, fx.Node]", edit.call(path, read, h, c, t, name="controller"))
            results = [edit.duplicate(body.nodes, {body.given: w})[body.out] for body in bodies]
            if not self.hard:
                w = edit.call(weighted, p, *results, name="workspace")
                continue
            left, joins = w, list[fx.Node]()
            for i, result in enumerate(results):
                left = edit.call(chosen, edit.call(takes, p, w, i, name="takes"), result, left, name="module")
                joins.append(left)
            for node, body in zip(joins, bodies, strict=True):
                _mark(node, body, edit)
            w = edit.call(credited, left, p, name="workspace")
        return w


@dataclass(frozen=True, eq=False)
class _Body:
    """What one module computes, in order."""

    site: Site
    given: fx.Node
    out: fx.Node
    nodes: list[fx.Node]


def _body(given: fx.Node, out: fx.Node, site: Site) -> _Body:
    wanted, found, todo = needed(out), set[fx.Node](), [given]
    while todo:
        for user in todo.pop().users:
            number = isinstance(user.meta.get("val"), torch.SymInt)
            if user in wanted and user not in found and not number:
                found.add(user)
                todo.append(user)
    return _Body(site, given, out, sorted(found))


def _check_chain(modules: Sequence[Block], site: Site) -> None:
    if len(modules) < 2:
        raise SiteRefusedError(
            "a controller needs modules to choose between",
            where=place(site),
            found=f"{len(modules)} blocks",
            expected="two or more repeated units that map the stream to itself",
        )
    for one, other in pairwise(modules):
        if stage(one, "out").node is not stage(other, "in").node:
            raise SiteRefusedError(
                "the modules are no chain",
                where=place(other),
                found=f"{other.owner} does not read what {one.owner} left",
                expected="blocks of which each reads the one before",
                do='select those that are: blocks="block[layers.*]"',
            )
    first = stage(modules[0], "in").node.meta["val"]
    for one in modules:
        held = stage(one, "out").node.meta["val"]
        if held.shape != first.shape or held.dtype != first.dtype:
            raise SiteRefusedError(
                "a module leaves another shape than it was given",
                where=place(one),
                found=f"{tuple(held.shape)}",
                expected=f"{tuple(first.shape)}",
                do="select blocks of one shape",
            )


def _mark(node: fx.Node, body: _Body, edit: Editor) -> None:
    if any(map(sees_all, body.nodes)) or node.meta["val"].shape[0] == 0:
        return  # such as a batch norm in training: it runs for all samples
    why = skipped_at(edit.program, node)
    if isinstance(why, str):
        raise SiteRefusedError(
            "the module cannot be left out for some samples and run for others",
            where=place(body.site),
            found=why,
            expected="a block that computes each sample by itself, on an example with two samples or more",
            do="leave out what shows the inside (use_cache=False), or hard=False",
        )
    mark(node)
