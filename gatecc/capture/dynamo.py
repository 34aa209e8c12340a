"""A graph of Dynamo as a Program: ATen operators, owners by FQN, weights and constants as lifted placeholders.

Dynamo hands a backend the graph and its inputs, not the model. What a placeholder is, its source says, a Python
expression over the frame: ``L['self']._modules['layers']._modules['0']._parameters['weight']`` is the weight
``layers.0.weight`` of the model ``L['self']``. The module of the program is a skeleton that is built of these names: it
holds the live tensors, and containers are containers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from gatecc.capture.origins import OriginWriter, module_stack
from gatecc.ir.program import Program

_STEP = re.compile(r"\.(\w+)|(\[[^\]]*\])")
_HOLDERS = ("_modules", "_parameters", "_buffers")
_CALL_SUFFIX = re.compile(r"@\d+$")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Steps = tuple[str, ...]


def has_nested_graphs(graph_module: fx.GraphModule) -> bool:
    """Whether a graph calls graphs of its own (checkpointed regions, custom autograd functions, torch.cond)."""
    return any(name and isinstance(child, fx.GraphModule) for name, child in graph_module.named_modules())


def dynamo_program(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Program:
    """The Program of a Dynamo graph without nested graphs, before autograd and functionalization.

    The placeholders and their order stay, so that what is compiled from the program takes the inputs that Dynamo gives.
    """
    traced = _traced(graph_module)
    placeholders = traced.graph.find_nodes(op="placeholder")
    sources = [_source(node) for node in placeholders]
    names = _Names(sources)
    skeleton = _Skeleton()
    for node in traced.graph.nodes:
        _rename_stack(node, names, skeleton)
    lifted: dict[fx.Node, str] = {}
    constants: dict[str, torch.Tensor] = {}
    example: list[torch.Tensor] = []
    paths: list[tuple[Any, ...]] = []
    for node, source, value in zip(placeholders, sources, inputs, strict=True):
        if not isinstance(value, torch.Tensor):
            continue  # a size
        name = names.weight(source)
        if name is not None:
            lifted[node] = name
            skeleton.hold(name, value, node)
        elif source[:1] == ("L",) and not names.inside(source):
            example.append(value)
            paths.append(_path(source))
        else:  # a tensor of a Python list, or a global one
            lifted[node] = str(node.target)
            constants[str(node.target)] = value
    for node in traced.graph.find_nodes(op="get_attr"):
        held = getattr(traced, str(node.target), None)
        if isinstance(held, torch.Tensor):
            constants[str(node.target)] = held
    origins = OriginWriter()
    for node in traced.graph.nodes:
        origins.write(node, _owner(node))
    spec = pytree.tree_structure((0,) * len(pytree.tree_leaves(traced.graph.output_node().args[0])))
    program = Program(skeleton.module(), traced, "", example, spec, paths, constants=constants)
    program.lifted = lifted
    return program


def _traced(graph_module: fx.GraphModule) -> fx.GraphModule:
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    values = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders]
    # The mode of Dynamo's own values: by now the tracing context has another one, for the compiler behind us.
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()

    def run(*arguments: Any) -> Any:
        return fx.Interpreter(graph_module).run(*arguments)

    with fx_traceback.preserve_node_meta(), mode:
        traced = make_fx(run, pre_dispatch=True)(*values)
    for source, node in zip(placeholders, traced.graph.find_nodes(op="placeholder"), strict=True):
        node.meta.update(source.meta)
    return traced


# --- names ------------------------------------------------------------------------------------------------------------


def _source(placeholder: fx.Node) -> Steps:
    """The expression that a placeholder stands for, step by step."""
    argument = placeholder.meta.get("grapharg")
    source = getattr(argument, "source", None) or getattr(placeholder, "_dynamo_source", None)
    return () if source is None else _steps(source.name)


def _steps(expression: str) -> Steps:
    """``L['self'].layers[0]`` as ``("L", "self", "layers", "[0]")``: in frames and modules, keys are names."""
    first = re.match(r"\w+", expression)
    if first is None:
        return ()
    steps, of_names = [first[0]], True
    for attribute, item in _STEP.findall(expression):
        if attribute != "__dict__":
            steps.append(attribute or (_key(item) if of_names else item))
        of_names = attribute == "__dict__" or steps[-1] in _HOLDERS
    return tuple(steps)


def _key(item: str) -> str:
    """``['layers']`` as ``layers``, ``[0]`` as ``0``."""
    return item[1:-1].strip("'\"")


def _path(source: Steps) -> tuple[Any, ...]:
    """Where an input stands in the call: the name of a parameter, then keys."""
    steps = source[2:] if source[1:2] == ("kwargs",) and len(source) > 2 else source[1:]
    return tuple(_key(step) if step.startswith("[") else step for step in steps)


@dataclass(frozen=True)
class _Names:
    """The names of weights and modules in the model: their paths from its root.

    The root is what all modules hang on. A graph of several models has several; each then keeps its own name in front.
    """

    sources: Iterable[Steps]
    roots: list[Steps] = field(default_factory=list[Steps])

    def __post_init__(self) -> None:
        found = {s[:at] for s in self.sources if (at := next((i for i, x in enumerate(s) if x in _HOLDERS), None))}
        self.roots.extend(sorted(root for root in found if not any(root[:i] in found for i in range(len(root)))))

    def inside(self, steps: Steps) -> bool:
        """Whether something hangs on a model."""
        return any(steps[: len(root)] == root for root in self.roots)

    def module(self, steps: Steps) -> str:
        """FQN of a module."""
        root = next((root for root in self.roots if steps[: len(root)] == root), None)
        if root is None:  # a module without weights, or one of a graph that reads none
            return ".".join(steps[2:])
        own = root[-1:] if len(self.roots) > 1 else ()
        path = (_key(step) if step.startswith("[") else step for step in steps[len(root) :] if step not in _HOLDERS)
        return ".".join((*own, *path))

    def weight(self, steps: Steps) -> str | None:
        """FQN of a parameter, buffer or plain attribute; None for what is no attribute of a module."""
        if not self.inside(steps):
            return None
        return None if steps[-1].startswith("[") else self.module(steps)


def _rename_stack(node: fx.Node, names: _Names, skeleton: _Skeleton) -> None:
    """Write the modules that ran a node as a capture does: ``m.layers.0`` in the place of ``L['self'].layers[0]``."""
    renamed: dict[str, tuple[str, Any]] = {}
    for key, (path, cls) in module_stack(node).items():
        name = names.module(_steps(_CALL_SUFFIX.sub("", str(path))))
        renamed[key] = ("m." + name if name else "m", cls)
        skeleton.classes[name] = cls
    if renamed:
        node.meta["nn_module_stack"] = renamed


def _owner(node: fx.Node) -> str:
    last = next(reversed(module_stack(node).values()), None)
    return "" if last is None else last[0].removeprefix("m").lstrip(".")


# --- the skeleton -----------------------------------------------------------------------------------------------------


@dataclass
class _Skeleton:
    """The modules that are known of a model. ``classes`` of those that ran, by FQN; ``weights`` by FQN."""

    classes: dict[str, Any] = field(default_factory=dict[str, Any])
    weights: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    def hold(self, name: str, tensor: torch.Tensor, node: fx.Node) -> None:
        """Note a weight, and the names by which others know it: Dynamo lifts a tied one once, by its first name.

        A layer of torch's own that reads the weight of another layer holds it, too.
        """
        self.weights[name] = tensor
        holder, _, own = name.rpartition(".")
        for owner in {_owner(user) for user in node.users}:
            forward = getattr(self.classes.get(owner), "forward", None)
            if getattr(forward, "__module__", "").startswith("torch.nn.") and not f"{holder}.".startswith(f"{owner}."):
                self.weights.setdefault(f"{owner}.{own}", tensor)

    def module(self) -> nn.Module:
        """A module of this structure with the live tensors. What holds modules and never ran is a container."""
        held = {name for path in (*self.classes, *(w.rpartition(".")[0] for w in self.weights)) for name in _up(path)}
        parents = {name.rpartition(".")[0] for name in held if name}
        stand_ins: dict[Any, type[nn.Module]] = {}
        made: dict[str, nn.Module] = {"": nn.Module()}
        for name in sorted(held - {""}, key=lambda name: name.count(".")):
            cls = self.classes.get(name, nn.ModuleList if name in parents else nn.Module)
            above, _, own = name.rpartition(".")
            base = next((container for container in _CONTAINERS if issubclass(cls, container)), nn.Module)
            made[name] = stand_ins.setdefault(cls, type(cls.__name__, (base,), {}))()
            made[above].add_module(own, made[name])
        for name, tensor in self.weights.items():
            above, _, own = name.rpartition(".")
            if isinstance(tensor, nn.Parameter):
                made[above].register_parameter(own, tensor)
            else:
                made[above].register_buffer(own, tensor)
        return made[""]


def _up(path: str) -> Iterable[str]:
    """A module and those around it."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""
