"""exported_program: a Program as an ExportedProgram of torch, for what takes nothing else (torch.onnx)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx, nn
from torch._export.verifier import TrainingIRVerifier
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from gatecc.ir.program import Program, origin

_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def exported_program(program: Program, in_spec: pytree.TreeSpec | None = None) -> ExportedProgram:
    """A program whose outputs are tensors as an ExportedProgram; the program itself stays as it is.

    ``in_spec``: the structure of (args, kwargs) in which its inputs are handed over; flat and positional by default.

    Weights go by their names relative to the module with ``m.`` in front, as in an export of a module around it.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    specs: list[InputSpec] = []
    held = _held(program)
    for kind in _KINDS:
        for name, nodes in held[kind].items():
            node = graph.placeholder(kind.name[0].lower() + "_" + re.sub(r"\W", "_", name))
            node.meta = dict(nodes[0].meta)
            copied.update(dict.fromkeys(nodes, node))
            specs.append(InputSpec(kind, TensorArgument(node.name), name, kind is InputKind.BUFFER or None))
    for node in program.placeholders:
        copied[node] = graph.node_copy(node, copied.__getitem__)
        specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(copied[node].name), None))
    for node in program.graph.nodes:
        if node not in copied:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            copied[node].meta.update(_whence(node))
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(copied[node].name), None) for node in program.outputs]
    flat = pytree.tree_structure((tuple(program.example), {}))
    named, in_spec = in_spec is not None, in_spec or flat
    args, kwargs = example = pytree.tree_unflatten(list(program.example), in_spec)
    arguments = [*(f"leaves_{i}" for i in range(len(args))), *kwargs]
    made = ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict={name: _tensor(program, held[kind][name]) for kind in _KINDS[:2] for name in held[kind]},
        range_constraints=_ranges(program),
        module_call_graph=[ModuleCallEntry("", ModuleCallSignature([], [], in_spec, program.out_spec, arguments))],
        example_inputs=example,
        constants={name: _tensor(program, nodes) for name, nodes in held[_KINDS[2]].items()},
        verifiers=[TrainingIRVerifier],  # operators may write in place
    )
    if named:
        made._guards_code = [_told_by_name(code, example) for code in made._guards_code]
    return made


def _whence(node: fx.Node) -> dict[str, Any]:
    """Where a node comes from, as torch's own exports say it; nothing for one that says so already, or of that nobody
    knows it."""
    of = origin(node)
    found: dict[str, Any] = {}
    if of.owner and not node.meta.get("nn_module_stack"):
        found["nn_module_stack"] = {of.owner: (f"m.{of.owner}", "torch.nn.modules.module.Module")}
    if of.line and not node.meta.get("stack_trace"):
        file, _, number = of.line.rpartition(":")
        found["stack_trace"] = f'File "{file}", line {number}, in forward'
    return found


def _told_by_name(code: str, example: tuple[Any, ...]) -> str:
    """A guard that reads the flat inputs, with the names that they have in the call."""
    for i, (path, _) in enumerate(pytree.tree_flatten_with_path(example)[0]):
        keys: tuple[Any, ...] = path
        side, place, *rest = keys
        name = f"leaves_{place.idx}" if side.idx == 0 else place.key
        code = code.replace(f"L['leaves'][{i}]", f"L['{name}']{pytree.keystr(tuple(rest))}")
    return code


def _held(program: Program) -> dict[InputKind, dict[str, list[fx.Node]]]:
    """The nodes that read a tensor of the program, by kind and name."""
    held: dict[InputKind, dict[str, list[fx.Node]]] = {kind: {} for kind in _KINDS}
    for node in program.graph.nodes:
        path, weight = program.path(node), program.weight(node)
        if weight is not None:
            kind = InputKind.PARAMETER if isinstance(weight, nn.Parameter) else InputKind.BUFFER
            held[kind].setdefault(f"m.{path}", []).append(node)
        elif path is not None and program.constant(node) is not None:
            held[InputKind.CONSTANT_TENSOR].setdefault(path, []).append(node)
    return held


def _tensor(program: Program, nodes: list[fx.Node]) -> Any:
    return program.tensor(nodes[0])


def _ranges(program: Program) -> dict[Any, Any]:
    """What is known of the sizes of the inputs."""
    ranges: dict[Any, Any] = {}
    for node in program.placeholders:
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt):
                environment: Any = size.node.shape_env
                ranges.update({symbol: environment.var_to_range[symbol] for symbol in size.node.expr.free_symbols})
    return ranges
