"""Structural verification: a graph stays well formed through every rewrite.

Checked after each site: no use before definition and no foreign node (graph lint), every inserted or re-wired node gets
from its inputs the shape and dtype that is recorded for it, every named tensor exists, no parameter that was read is
lost that the rewrite does not say it replaces, and the outputs keep their number, shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode

from gatecc.errors import GraphError
from gatecc.ir.loops import free_lengths
from gatecc.ir.printer import window
from gatecc.ir.program import Program, attribute, fake, origin
from gatecc.ir.site import Site
from gatecc.ir.sizes import renamed, size_names


@dataclass(frozen=True)
class Before:
    """What of a program a rewrite must keep."""

    outputs: tuple[tuple[tuple[Any, ...], str] | None, ...]
    parameters: frozenset[str]
    arguments: dict[fx.Node, tuple[fx.Node, ...]]

    @classmethod
    def of(cls, program: Program) -> Before:
        return cls(
            tuple(_kind(o) for o in program.outputs),
            _live_parameters(program),
            {n: tuple(n.all_input_nodes) for n in program.graph.nodes},
        )


@dataclass(frozen=True)
class Suspect:
    """The rewrite that ran last, the sites that it ran at, and the nodes that it made there.

    ``replaces`` are modules and tensors (paths in the program) that it may leave unread, except those in ``made``.
    """

    rewrite: str
    sites: Sequence[Site]
    inserted: set[fx.Node]
    loses_buffers: bool = False
    replaces: Collection[str] = ()
    made: Collection[str] = ()
    hidden: Collection[int] = ()  # the outputs that it lets be None

    def may_lose(self, name: str, tensor: object) -> bool:
        """Whether a tensor that was read may be read no more."""
        if self.loses_buffers and not isinstance(tensor, torch.nn.Parameter):
            return True
        return _in(name, self.replaces) and not _in(name, self.made)

    def place(self, node: fx.Node) -> str:
        """Site and line that a fault at ``node`` is blamed on: the owner of the nodes around it, else the nearest."""
        near = [origin(n) for n in (node, *node.all_input_nodes) if n in self.inserted]
        owner = near[0].owner if near else origin(node).owner
        site = max(self.sites, key=lambda s: (owner + ".").startswith(s.owner + "."), default=None)
        return f"{self.rewrite} at {site.key} {site.line}".strip() if site else self.rewrite


def verify(program: Program, before: Before, rewrite: Suspect) -> None:
    """Raise GraphError if the program is ill-formed: it names the rewrite, the guilty site and its line."""
    _order(program, rewrite)
    _names(program, rewrite)
    _shapes(program, before, rewrite)
    _kept(program, before, rewrite)


def _fail(rewrite: Suspect, what: str, node: fx.Node, found: str, do: str = "") -> GraphError:
    return GraphError(what, where=rewrite.place(node), found=f"{found}\n{window(node)}", do=do)


def _order(program: Program, rewrite: Suspect) -> None:
    defined: set[fx.Node] = set()
    for node in program.graph.nodes:
        for used in node.all_input_nodes:
            if used not in defined:
                raise _fail(
                    rewrite,
                    "a value is used before it is defined",
                    node,
                    f"{node.name} reads {used.name}, which is computed later or not at all",
                    "insert new nodes behind everything that they read (edit.call does)",
                )
        defined.add(node)
    try:
        program.graph.lint()
    except RuntimeError as e:
        raise _fail(rewrite, "the graph is not well formed", program.graph.output_node(), str(e)) from e


def _names(program: Program, rewrite: Suspect) -> None:
    for node in program.graph.nodes:
        if node.op != "get_attr" or str(node.target) in program.constants:
            continue
        for root in (program.module, program.graph_module):
            try:
                attribute(root, str(node.target))
                break
            except AttributeError:
                continue
        else:
            raise _fail(
                rewrite,
                "a parameter does not exist",
                node,
                f"{node.target} is named by the graph, the module has no such tensor",
                "make new modules with edit.module",
            )


def _shapes(program: Program, before: Before, rewrite: Suspect) -> None:
    """Run every new or re-wired node on the fake values of its inputs; what it gives must be what is recorded."""
    for node in program.graph.nodes:
        if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        if node not in rewrite.inserted and before.arguments.get(node) == tuple(node.all_input_nodes):
            continue
        recorded = fake(node)
        if recorded is None:
            continue
        _shape(node, recorded, rewrite)


def _shape(node: fx.Node, recorded: torch.Tensor, rewrite: Suspect) -> None:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    mode = detect_fake_mode([recorded])
    try:
        # Without Python's decompositions some operators ask for the number behind a symbolic size, and fix it.
        with mode or torch.no_grad(), enable_python_dispatcher(), free_lengths():
            got = cast("Callable[..., Any]", node.target)(*args, **kwargs)
    except Exception as e:
        raise _fail(rewrite, "an operator does not accept its inputs", node, f"{type(e).__name__}: {e}") from e
    if not isinstance(got, torch.Tensor) or _differs(got, recorded):
        raise _fail(
            rewrite,
            "a value has another shape or dtype than before",
            node,
            renamed(f"{_kind_of(got)}, recorded {_kind_of(recorded)}", size_names(node.graph)),
        )


def _differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.dim() != b.dim():
        return True
    # Symbolic sizes are compared as expressions: asking whether they are equal would add a guard.
    return any(str(x) != str(y) for x, y in zip(a.shape, b.shape, strict=True))


def _kept(program: Program, before: Before, rewrite: Suspect) -> None:
    output = program.graph.output_node()
    # Compared as text and only now: what a rewrite found out about a symbolic size holds for both.
    then = str(tuple([None if i in rewrite.hidden else kind for i, kind in enumerate(before.outputs)]))
    now = str(tuple(_kind(o) for o in program.outputs))
    if now != then:
        raise _fail(rewrite, "the outputs changed", output, renamed(f"{now}, before {then}", size_names(program.graph)))
    live = _live_parameters(program)
    gone = before.parameters - set(live)
    if lost := sorted(name for name in gone if not rewrite.may_lose(name, _tensor(program, name))):
        guilty = next((n for n in program.graph.nodes if program.path(n) == lost[0]), output)
        reader = next(iter(guilty.users), guilty)
        raise _fail(
            rewrite,
            "the graph lost a parameter",
            reader,
            f"{', '.join(lost)} no longer takes part in the output",
            "keep the old value in the new expression, or declare the loss in the rewrite",
        )


def _in(name: str, paths: Collection[str]) -> bool:
    """Whether a tensor is one of these or belongs to one of these modules; "" is the root."""
    return any(not path or f"{name}.".startswith(f"{path}.") for path in paths)


def _tensor(program: Program, name: str) -> object:
    return None if name in program.constants else attribute(program.module, name)


def _kind(output: Any) -> tuple[tuple[Any, ...], str] | None:
    if not isinstance(output, fx.Node):
        return None
    value = fake(output)
    return None if value is None else (tuple(value.shape), str(value.dtype))


def _kind_of(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)


def _live_parameters(program: Program) -> frozenset[str]:
    """The names of the tensors that reach an output, or an operator that writes in place."""
    live: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node in live or node.op == "output" or node.is_impure():
            live.update(node.all_input_nodes)
            live.add(node)
    return frozenset(path for n in live if (path := program.path(n)) is not None)
