"""record: the values of a step's nodes (``meta["val"]``), as capture records them: fake tensors of symbolic sizes.

Symbols of their own are the number of tokens before (past), that of the new ones, and the room in buffers and tables;
the batch and the lengths of a context are those of the captured graph. Nothing is computed and no size is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import DimDynamic

from gatecc.decoder.emit.step import Step
from gatecc.ir.loops import free_lengths
from gatecc.ir.program import Program

_NUMBER = count()  # symbols are told apart by their sources
_SAMPLES, _PAST, _NEW, _ROOM = 2, 6, 5, 16  # sizes where there is no example


def record(step: Step, example: Sequence[Any]) -> None:
    """Record the values of all nodes. ``example``: what the step is called with, one value per placeholder.

    The example's sizes are the hints of the symbols, at which costs are counted.
    """
    program = step.program
    _record(step, dict(zip(program.graph.find_nodes(op="placeholder"), example, strict=True)))
    program.example = [x for x in example if isinstance(x, torch.Tensor)]
    program.paths = [(node.name,) for node in program.placeholders]


def record_sizes(step: Step) -> None:
    """Record the values of all nodes where no example is to be had. The hints of the symbols are some numbers."""
    tokens, past, *_ = placeholders = step.program.graph.find_nodes(op="placeholder")
    given: dict[fx.Node, Any] = {node: torch.empty([_ROOM] * 8, device="meta") for node in placeholders}
    given |= {tokens: torch.empty(_SAMPLES, 1 if step.single else _NEW, device="meta"), past: _PAST}
    _record(step, given | dict.fromkeys(step.sources.starts, 0))


def _record(step: Step, given: dict[fx.Node, Any]) -> None:
    program, tokens = step.program, step.plan.inputs.tokens
    mode = detect_fake_mode([tokens.meta["val"]])
    assert mode is not None
    assert mode.shape_env is not None
    with mode, enable_python_dispatcher(), free_lengths(), torch.no_grad():
        for node, value in _inputs(step, given, Symbols(mode.shape_env)):
            node.meta["val"] = value
        record_calls(program, mode.shape_env)


def record_calls(program: Program, shape_env: Any) -> None:
    """Record the values of all calls of a program whose inputs and weights have theirs."""
    with shape_env.ignore_fresh_unbacked_symbols():
        for node in program.calls():
            node.meta["val"] = _value(node)


class Symbols:
    """The symbols of the sizes of one program's inputs, by name."""

    def __init__(self, shape_env: Any) -> None:
        self._shape_env = shape_env
        self._made: dict[str, Any] = {}

    def __call__(self, name: str, hint: int) -> Any:
        """The symbol of this name. ``hint``: its size in the example."""
        from torch._dynamo.source import ConstantSource  # half of the time of ``import gatecc``, if imported there

        if name not in self._made:
            source = ConstantSource(f"gatecc_step_{next(_NUMBER)}_{name}")
            made = self._shape_env.create_unspecified_symbol(hint, source, DimDynamic.DYNAMIC)
            self._made[name] = self._shape_env.create_symintnode(made, hint=hint, source=source)
        return self._made[name]


def _value(node: fx.Node) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return cast("Callable[..., Any]", node.target)(*args, **kwargs)


def _inputs(step: Step, given: dict[fx.Node, Any], symbol: Symbols) -> Iterator[tuple[fx.Node, Any]]:
    """The fake value of every placeholder."""
    sources, plan = step.sources, step.plan

    def along(like: torch.Tensor, axes: Sequence[int], size: Any) -> torch.Tensor:
        return like.new_empty([size if i in axes else plan.lengths.settled(s) for i, s in enumerate(like.shape)])

    for node, value in given.items():
        if isinstance(value, int):
            yield node, symbol(node.name, value)
    tokens = plan.inputs.tokens.meta["val"]
    first = next(iter(given))
    yield first, along(tokens, [1], 1 if step.single else symbol("new", given[first].shape[1]))
    for node, slot in zip(sources.slots, plan.slots, strict=True):
        size: Any = 1 if slot.kind == "scan" else slot.count
        if slot.kind == "keys":
            room = f"room_{slot.span.window or ''}"
            size = symbol(room, given[node].shape[slot.axis])
        yield node, along(slot.like, [] if slot.kind == "state" else [slot.axis], size)
    for captured, node in sources.history.items():
        yield node, along(captured.meta["val"], [1], symbol("room_", given[node].shape[1]))
    for captured, node in sources.context.items():
        yield node, captured.meta["val"]
    for captured, node in sources.carried.items():
        new = 1 if step.single else symbol("new", given[first].shape[1])
        yield node, along(captured.meta["val"], [1], new)
    for captured, node in sources.tables.items():
        axes = plan.lengths.axes(captured)
        size = symbol("reach", given[node].shape[axes[0]]) if axes else 0
        yield node, along(captured.meta["val"], axes, size)
