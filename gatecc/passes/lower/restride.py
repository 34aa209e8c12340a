"""restride: what a value with other strides means for those that read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode

from gatecc.ir.loops import free_lengths
from gatecc.ir.program import Program, fake


def restride(program: Program, start: fx.Node) -> bool:
    """Record the strides that the readers of a value get, and their readers; False if a view is not possible any more,
    in which case nothing was changed."""
    mode = detect_fake_mode([start.meta["val"]])
    changed: dict[fx.Node, Any] = {start: start.meta["val"]}
    reached = False
    for node in program.graph.nodes:
        reached = reached or node is start
        if not reached or node.op != "call_function" or changed.keys().isdisjoint(node.all_input_nodes):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: changed.get(n, n.meta.get("val")))
        try:
            with mode or torch.no_grad(), enable_python_dispatcher(), free_lengths():
                got = node.target(*args, **kwargs)
        except (RuntimeError, ValueError):  # the second from decompositions of views
            return False
        if not isinstance(got, torch.Tensor) or _strides(got) != _strides(fake(node)):
            changed[node] = got
    for node, value in changed.items():
        node.meta["val"] = value
    return True


def _strides(value: torch.Tensor | None) -> str:
    return "" if value is None else str(value.stride())
