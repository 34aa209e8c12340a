"""Running a program as it stands, node by node: the tests' own yardstick, which no pass has touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gatecc.ir.program import Program


def run(program: Program, *inputs: torch.Tensor) -> tuple[Any, ...]:
    """The flat outputs of ``program`` on its flat inputs (the example's without any)."""
    env: dict[fx.Node, Any] = {}
    leaves = iter(inputs or program.example)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(leaves)
        elif node.op == "get_attr":
            env[node] = _held(program, node)
        elif node.op == "call_function":
            assert callable(node.target)
            env[node] = node.target(*fx.map_arg(node.args, env.__getitem__), **fx.map_arg(node.kwargs, env.__getitem__))
    return tuple(env[out] if isinstance(out, fx.Node) else out for out in program.outputs)


def _held(program: Program, node: fx.Node) -> Any:
    name = str(node.target)
    if name in program.constants:
        return program.constants[name]
    body = getattr(program.graph_module, name, None)
    return body if isinstance(body, fx.GraphModule) else program.weight(node)
