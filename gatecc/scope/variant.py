"""Variant: one captured and rewritten graph as a Python function of a live module and the tensor leaves of a call.

The function reads parameters from the module that it is given (``self.q_proj.weight``), so one variant serves every
layer of the same structure, follows ``.to()``, ``functional_call``, DDP and FSDP, and is traced through by torch.export
and Dynamo as if it were the module's own forward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from gatecc.capture.guards import Check, compile_guards
from gatecc.capture.reads import Read, Ties, grouped
from gatecc.ir.boundary import Boundary
from gatecc.ir.program import Program, fake
from gatecc.ops import paths
from gatecc.passes.autocast import casts_to, is_cast
from gatecc.pipeline.cost import by_data
from gatecc.scope.hooked import HookCalls
from gatecc.scope.printed_calls import PrintedCalls
from gatecc.scope.printed_rows import PrintedRows
from gatecc.scope.printed_weights import Weights


class Variant:
    """``variant(module, leaves)`` is the module's output; ``accepts(leaves)`` checks the sizes that it bakes in."""

    def __init__(self, program: Program, reads: tuple[Read, ...] = (), ties: Ties = (), *, hooks: bool = False) -> None:
        """Freeze the program's present graph; later edits of the program do not reach the variant.

        With ``hooks``, it calls the hooks of submodules at the boundaries of the program.
        """
        self.accepts: Check = compile_guards(program.guards)
        self.guards = tuple(program.guards)
        self.by_data = by_data(program)
        self.reads, self.groups = reads, grouped(reads)
        self.ties = ties
        self.source, self._function, self._extra, self._weights = _function(program, hooks)
        exempt = program.autocast is not None and not program.exempt.isdisjoint(program.graph.nodes)
        self._without = program.autocast[0] if program.autocast and exempt else None  # autocast is spelled out for it
        spec = program.out_spec
        self._out_spec = None if _is_plain(spec) else spec

    def without(self, gone: Collection[str]) -> tuple[tuple[Read, ...], Ties]:
        """What it read of the module and which parameters were one, but for modules and tensors that are gone."""
        reads = tuple(read for read in self.reads if not _is_gone(read.path, gone))
        ties = tuple(tie for tie in self.ties if not any(_is_gone(".".join(steps), gone) for steps in tie))
        return reads, ties

    def same_as(self, other: Variant) -> bool:
        """Whether another variant is the same function of a module and leaves."""
        mine, its = ((one.source, one.guards, one._out_spec, one._weights.paths) for one in (self, other))
        return mine == its and len(self._extra) == len(other._extra) and all(map(_same, self._extra, other._extra))

    def __call__(self, module: nn.Module, leaves: Sequence[torch.Tensor]) -> Any:
        if not torch.compiler.is_compiling() and paths.is_watched():
            with paths.inside(module):
                return self._run(module, leaves)
        return self._run(module, leaves)

    def _run(self, module: nn.Module, leaves: Sequence[torch.Tensor]) -> Any:
        given = (*leaves, *self._extra, *self._weights(module))
        if self._without is None:
            out = self._function(module, *given)
        else:
            with torch.autocast(self._without, enabled=False):
                out = self._function(module, *given)
        return out if self._out_spec is None else pytree.tree_unflatten(out, self._out_spec)


def _function(program: Program, hooks: bool) -> tuple[str, Callable[..., Any], tuple[Any, ...], Weights]:
    """Print the graph as ``forward(self, *leaves, *extra, *weights)``; extra: constants and bodies of higher-order
    operators. Where hooks are called, which may make parameters, these are read from ``self`` on the way."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    functions = PrintedCalls(program)
    calls = HookCalls(program, graph, copied) if hooks and program.boundaries else None
    extra: dict[str, fx.Node] = {}
    values: list[Any] = []
    held = [n for n in program.graph.nodes if n.op == "get_attr" and not _is_live(program, n)]
    live = [n for n in program.graph.nodes if n.op == "get_attr" and n not in held] if calls is None else []
    weights = Weights(program.module, list(dict.fromkeys(str(n.target) for n in live)))
    casts = _casts(program)

    def emit(node: fx.Node, graph: fx.Graph, copied: dict[fx.Node, fx.Node]) -> None:
        if not functions.printed(node, graph, copied):
            copied[node] = _copied(graph, node, copied.__getitem__, casts.get(node))

    given = [n for n in program.graph.nodes if n.op == "placeholder"]
    if not given:
        raise ValueError("a captured call has at least one tensor argument")
    for node in given:
        copied[node] = _copied(graph, node, copied.__getitem__, None)
    _hold(program, held, graph, copied, extra, values)
    places = {path: graph.placeholder(name) for path, name in zip(weights.paths, weights.names, strict=True)}
    copied.update((n, places[str(n.target)]) for n in live)
    before = {*given, *held, *live}

    rows = PrintedRows(program, emit) if calls is None else None  # hooks see all samples
    for node in program.graph.nodes if calls is None else calls.order():
        value = copied.__getitem__ if calls is None else calls.reader(node)
        if isinstance(node, Boundary):
            cast("HookCalls", calls).call(node)
            continue
        if node.op == "output":
            flat = [value(a) if isinstance(a, fx.Node) else a for a in program.outputs]
            spec = program.out_spec
            graph.output(pytree.tree_unflatten(flat, spec) if _is_plain(spec) else tuple(flat))
            continue
        if node in before or (rows is not None and rows.printed(node, graph, copied)):
            continue
        if functions.printed(node, graph, copied):
            continue
        copied[node] = _copied(graph, node, value, casts.get(node))
    code = graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<gatecc {program.fqn or type(program.module).__name__}>", "exec"), names)
    return "".join([code.src, *(rows.sources if rows else ())]), names["forward"], tuple(values), weights


def _is_gone(path: str, gone: Collection[str]) -> bool:
    return any(f"{path}.".startswith(f"{one}.") for one in gone)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.dtype == b.dtype and torch.equal(a, b))
    return a is b


def _casts(program: Program) -> dict[fx.Node, torch.dtype]:
    """What the call's autocast casts the arguments of nodes to, where some nodes are exempt from it."""
    if program.autocast is None or program.exempt.isdisjoint(program.graph.nodes):
        return {}
    under = [n for n in program.calls() if n not in program.exempt]
    found = {node: casts_to(node, *program.autocast) for node in under}
    return {node: dtype for node, dtype in found.items() if dtype is not None}


def _copied(
    graph: fx.Graph, node: fx.Node, value: Callable[[fx.Node], fx.Node], cast_to: torch.dtype | None
) -> fx.Node:
    """A node in the printed graph, which reads ``value`` of its inputs.

    Sizes are read by method: functorch has no rule for the operator. Dropout outside of training is its input, and
    costs a call.
    """
    if node.target is torch.ops.aten.dropout.default and node.args[2] is False:
        return value(cast("fx.Node", node.args[0]))
    if node.target is torch.ops.aten.sym_size.int:
        source, axis = node.args
        assert isinstance(source, fx.Node)
        return graph.call_method("size", (value(source), axis))
    device = str(node.meta["val"].device.type) if cast_to and isinstance(node.meta["val"], torch.Tensor) else ""

    def read(source: fx.Node) -> fx.Node:
        held = fake(source)
        if cast_to is None or held is None or held.dtype == cast_to or not is_cast(held, device):
            return value(source)
        return graph.call_function(torch.ops.aten.to.dtype, (value(source), cast_to))

    made = graph.node_copy(node, read)
    if node.target is torch.ops.aten.linear.default:
        made.target = torch.nn.functional.linear  # classes of quantised weights know this name, not the operator
    return made


def _hold(
    program: Program,
    held: list[fx.Node],
    graph: fx.Graph,
    copied: dict[fx.Node, fx.Node],
    extra: dict[str, fx.Node],
    values: list[Any],
) -> None:
    for node in held:
        target = str(node.target)
        if target not in extra:
            extra[target] = graph.placeholder("held_" + target.replace(".", "_"))
            values.append(program.constants.get(target, None))
            if values[-1] is None:
                values[-1] = operator.attrgetter(target)(program.graph_module)
        copied[node] = extra[target]


def _is_live(program: Program, node: fx.Node) -> bool:
    """Whether a get_attr reads the live module; else it is a constant, or the body of a higher-order operator."""
    target = str(node.target)
    if target in program.constants:
        return False
    try:
        value = operator.attrgetter(target)(program.module)
    except AttributeError:
        return False
    return isinstance(value, torch.Tensor)


def _is_plain(spec: pytree.TreeSpec) -> bool:
    """Whether an output is built of tuples, lists and dicts alone, which a graph can return by itself."""
    if spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(_is_plain(child) for child in spec.children())
