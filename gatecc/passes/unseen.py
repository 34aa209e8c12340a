"""Unseen: what random numbers do not show of a formula, and how to make them show it.

A trial of a part of a graph leaves dropout out, has no gradients, and draws numbers of usual size: a clamp at 1e4 or an
epsilon of 1e-8 would pass as nothing. What can be shown by other sizes of numbers is (`scales`), the rest is looked for
in the graph (`unseen`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from gatecc.ir.ops import DROPOUTS, argument, opname
from gatecc.ir.program import Program, fake

_LARGE, _SMALL = 8.0, 1e-2  # numbers within show in what is drawn
_MET = 1.5  # and so do thresholds up to this one: what lies behind it may not be drawn
_BEYOND = 16.0  # times the largest number in a graph, or below the smallest
_MOST, _LEAST = 1e30, 1e-30  # what a square in float64 holds
_COMPARED = frozenset(
    "clamp clamp_min clamp_max hardtanh threshold minimum maximum where masked_fill lt le gt ge eq ne mul div add sub "
    "rsub hardshrink softshrink".split()
)
_THRESHOLDS = frozenset(
    "clamp clamp_min clamp_max hardtanh threshold minimum maximum where masked_fill lt le gt ge hardshrink softshrink "
    "relu6 hardswish hardsigmoid".split()
)
_IMPLIED = {"relu6": 6.0, "hardswish": 3.0, "hardsigmoid": 3.0}
_FOR_NONFINITE = frozenset("nan_to_num isnan isinf isfinite isposinf isneginf".split())


def unseen(nodes: Iterable[fx.Node], *, training: bool) -> str:
    """What stands in a part of a graph that no trial of it shows; empty if nothing does."""
    for node in nodes:
        name = opname(node)
        if name in DROPOUTS and argument(node, 1, "p", 0.5) and argument(node, 2, "train", True):
            return "numbers are dropped inside of it (dropout)"
        if name in _FOR_NONFINITE and _floats(node.all_input_nodes):
            return f"numbers that are not finite are treated inside of it ({name})"
        if training and name == "detach" and _floats([node]):
            return "gradients are stopped inside of it (detach)"
    return ""


def scales(program: Program, nodes: Iterable[fx.Node]) -> list[float]:
    """By what to multiply random numbers, so that they lie beyond each number that the graph may compare them with."""
    found = sorted(((abs(x), node) for node in nodes for x in _numbers(program, node)), key=lambda one: one[0])
    large = [x for x, node in found if (_MET if _is_threshold(node) else _LARGE) <= x <= _MOST]
    small = [x for x, _ in found if _LEAST <= x <= _SMALL]
    return [x * _BEYOND for x in large[-1:]] + [x / _BEYOND for x in small[:1]]


def _is_threshold(node: fx.Node) -> bool:
    """Whether a number is compared there; a tensor of one number may be, wherever it is read."""
    return node.op == "get_attr" or opname(node) in _THRESHOLDS


def _numbers(program: Program, node: fx.Node) -> Iterator[float]:
    constant = program.constant(node) if node.op == "get_attr" else None
    if isinstance(constant, Tensor) and not isinstance(constant, FakeTensor) and constant.is_floating_point():
        yield from [float(constant)] if constant.numel() == 1 else []
    if opname(node) in _IMPLIED:
        yield _IMPLIED[opname(node)]
    if node.op == "call_function" and _floats(node.all_input_nodes):
        kinds = (int, float) if opname(node) in _COMPARED else (float,)
        yield from (float(x) for x in pytree.tree_leaves((node.args, node.kwargs)) if type(x) in kinds)


def _floats(nodes: Iterable[fx.Node]) -> bool:
    held = map(fake, nodes)
    return any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in held)
