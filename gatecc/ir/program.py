"""Program: the graph of one captured module, with everything that a rewrite needs to know about where it came from.

The graph is a flat function of tensors. Its inputs are the tensor leaves of ``(args, kwargs)`` in pytree order, its
output is the flat tuple of output leaves. Parameters and buffers are ``get_attr`` nodes whose target is relative to
``module``, or placeholders that are `lifted`, as in the graphs of Dynamo; the program holds no copy of them. Constants
that tracing created live in ``constants``. Ask `Program.weight` what a node reads, not its opcode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils._pytree import TreeSpec

from gatecc.ir.boundary import Boundary, copies
from gatecc.ir.functions import FunctionCall, copies_of

META = "gatecc"  # the only key of node.meta that gatecc writes: plain attributes of a node die in deepcopy


@dataclass(frozen=True)
class Origin:
    """Where a node comes from: the module that ran it, the index of that call of the module, and the source line."""

    owner: str  # FQN of the innermost module in the whole model
    call: int = 0
    line: str = ""  # "modeling_llama.py:257", empty if unknown
    inserted_by: str = ""  # the name of the rewrite that made the node, empty for the model's own nodes
    skips: bool = False  # where(condition, value, other), whose value is needed where the condition holds


_NOWHERE = Origin("")


@dataclass
class Program:
    """One captured module. ``fqn`` is its place in the model ("" for the model itself)."""

    module: nn.Module
    graph_module: fx.GraphModule
    fqn: str
    example: list[torch.Tensor]  # one per input
    out_spec: TreeSpec
    paths: list[tuple[Any, ...]] = field(
        default_factory=list[tuple[Any, ...]]
    )  # of each input: parameter name, then steps
    guards: list[str] = field(default_factory=list[str])  # python expressions over L["leaves"], see capture.guards
    constants: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    hooked: frozenset[str] = frozenset()  # submodules, relative to the module, whose hooks are to be called
    boundaries: list[Boundary] = field(default_factory=list[Boundary])  # of their calls, in the order of the calls
    captured: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])  # if there are any: the nodes before edits
    autocast: tuple[str, torch.dtype] | None = None  # what the call was under: the graph runs under it, too
    functions: list[FunctionCall] = field(default_factory=list[FunctionCall])  # custom autograd functions that it calls
    exempt: set[fx.Node] = field(default_factory=set[fx.Node])  # nodes that this autocast must not reach
    lifted: dict[fx.Node, str] = field(default_factory=dict[fx.Node, str])  # weights that are placeholders

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        """The inputs of the call, in order."""
        return [n for n in self.graph.nodes if self.is_input(n)]

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The flat output leaves: nodes, or Python constants such as None."""
        return tuple(cast("tuple[Any, ...]", self.graph.output_node().args[0]))

    def is_input(self, node: fx.Node) -> bool:
        """Whether a node is a tensor of the call: no lifted weight, no size that a graph takes beside its tensors."""
        if node.op != "placeholder" or node in self.lifted:
            return False
        return not isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | int | float)

    def path(self, node: fx.Node) -> str | None:
        """What a node reads from outside the call, by its name relative to the module: a weight, a constant, or the
        body of a higher-order operator. None for inputs and values that are computed."""
        return str(node.target) if node.op == "get_attr" else self.lifted.get(node)

    def weight(self, node: fx.Node) -> torch.Tensor | None:
        """The live parameter or buffer that a node reads; None for constants and other nodes."""
        path = self.path(node)
        if path is None or path in self.constants:
            return None
        try:
            value = attribute(self.module, path)
        except AttributeError:  # the body of a higher-order operator, which lives in the graph module alone
            return None
        return value if isinstance(value, torch.Tensor) else None

    def weight_name(self, node: fx.Node) -> str | None:
        """FQN in the model of the parameter or buffer that a node reads; None for constants and other nodes."""
        return None if self.weight(node) is None else self.full_name(str(self.path(node)))

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether a node reads a parameter, no buffer."""
        return isinstance(self.weight(node), nn.Parameter)

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        """The constant that a node reads."""
        path = self.path(node)
        return None if path is None else self.constants.get(path)

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        """The weight or the constant that a node reads: what it holds is known without a call."""
        constant = self.constant(node)
        return self.weight(node) if constant is None else constant

    def full_name(self, relative: str) -> str:
        """FQN in the model of a name relative to the captured module."""
        return ".".join(part for part in (self.fqn, relative) if part)

    def relative_name(self, full: str) -> str:
        """The inverse of full_name."""
        return full[len(self.fqn) :].lstrip(".") if self.fqn else full

    def inside(self, fqn: str) -> bool:
        """Whether a module of the model lies inside the captured module."""
        return not self.fqn or fqn == self.fqn or fqn.startswith(self.fqn + ".")

    def readers(self, fqn: str) -> list[fx.Node]:
        """The nodes that read a parameter, by its FQN in the model."""
        if not self.inside(fqn):
            return []
        path = self.relative_name(fqn)
        held = [*self.graph.find_nodes(op="get_attr", target=path), *(n for n, of in self.lifted.items() if of == path)]
        return [user for node in held for user in node.users]

    def calls(self) -> Iterator[fx.Node]:
        """The call_function nodes in execution order."""
        return (n for n in self.graph.nodes if n.op == "call_function")


def copy_for(program: Program, module: nn.Module, fqn: str, example: Sequence[torch.Tensor]) -> Program:
    """A copy of a program as that of another module of the same structure, at ``fqn``; it can be edited by itself."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        copied[node] = new = graph.node_copy(node, copied.__getitem__)
        old = origin(node)
        owner = ".".join(part for part in (fqn, program.relative_name(old.owner)) if part)
        new.meta = {**node.meta, META: replace(old, owner=owner)}
        if new.op == "output":
            new.args = fx.map_arg(node.args, copied.__getitem__)
    graph._codegen = program.graph._codegen
    graph_module = fx.GraphModule(nn.Module(), fx.Graph())  # what it holds is shared: constants, bodies of operators
    vars(graph_module).update({**vars(program.graph_module), "_graph": graph})
    paths, guards, constants = list(program.paths), list(program.guards), dict(program.constants)
    made = Program(module, graph_module, fqn, list(example), program.out_spec, paths, guards, constants, program.hooked)
    made.boundaries = copies(program.boundaries, copied)
    made.functions = copies_of(program.functions, copied)
    made.captured = {copied[node]: place for node, place in program.captured.items() if node in copied}
    made.lifted = {copied[node]: path for node, path in program.lifted.items()}
    return made


def origin(node: fx.Node) -> Origin:
    """The origin that capture recorded on a node; nodes that a rewrite inserted inherit that of their site."""
    return node.meta.get(META, _NOWHERE)


def attribute(root: nn.Module, path: str) -> Any:
    """Follow a dotted path from a module."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def shape(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """The recorded (fake, maybe symbolic) shape of a tensor node; raises KeyError if the node holds no tensor."""
    return tuple(node.meta["val"].shape)


def fake(node: fx.Node) -> torch.Tensor | None:
    """The recorded fake tensor of a node, None if the node does not hold one tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None
