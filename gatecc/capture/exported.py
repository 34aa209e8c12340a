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

from gatecc.ir.program import Program

_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def exported_program(program: Program) -> ExportedProgram:
    """A program whose outputs are a flat tuple of tensors as an ExportedProgram; the program itself stays as it is.

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
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(copied[node].name), None) for node in program.outputs]
    arguments = [f"leaves_{i}" for i in range(len(program.example))]  # as the guards know them
    in_spec = pytree.tree_structure((tuple(program.example), {}))
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict={name: _tensor(program, held[kind][name]) for kind in _KINDS[:2] for name in held[kind]},
        range_constraints=_ranges(program),
        module_call_graph=[ModuleCallEntry("", ModuleCallSignature([], [], in_spec, program.out_spec, arguments))],
        example_inputs=(tuple(program.example), {}),
        constants={name: _tensor(program, nodes) for name, nodes in held[_KINDS[2]].items()},
        verifiers=[TrainingIRVerifier],  # operators may write in place
    )


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
