"""autocast: the casts that torch.autocast makes inside operators, as nodes of the graph.

torch.export records what a region of autocast calls before autocast casts its arguments. Outside of the region the same
call computes in other dtypes. Which arguments are cast, and to what, is read off the dispatcher (which operators
autocast knows) and off the dtype that the recorded result has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from gatecc.ir.loops import free_lengths
from gatecc.ir.program import META, Program, fake


def spell_casts(
    program: Program, nodes: Iterable[fx.Node], device: str, dtype: torch.dtype, casts: set[fx.Node]
) -> None:
    """Cast the arguments of nodes, given in their order, as autocast to ``dtype`` does; ``casts`` are all so far.

    The nodes' recorded values are those under autocast. Afterwards they compute the same with autocast off.
    """
    for node in nodes:
        target = casts_to(node, device, dtype)
        if target is not None:
            _cast(program, node, target, device, casts)


def casts_to(node: fx.Node, device: str, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype that autocast casts a node's arguments to, None if it leaves them."""
    if not isinstance(node.target, OpOverload) or not _known(node.target, device):
        return None
    given = [held for held in map(fake, node.all_input_nodes) if held is not None and is_cast(held, device)]
    recorded = _dtypes(node.meta.get("val"))
    if not given or not recorded:
        return None
    mixed = len({held.dtype for held in given}) > 1
    trials = (dtype, torch.float32, None) if mixed else (None, dtype, torch.float32)
    return next((target for target in trials if _result(node, target, device) == recorded), None)


def _known(target: OpOverload, device: str) -> bool:
    """Whether autocast has a kernel of its own for an operator."""
    key = f"Autocast{device.upper()}"
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key)
    except RuntimeError:
        return False


def is_cast(held: torch.Tensor, device: str) -> bool:
    """Whether autocast of a device type casts a tensor at all."""
    return held.device.type == device and held.is_floating_point() and held.dtype != torch.float64


def _result(node: fx.Node, target: torch.dtype | None, device: str) -> list[torch.dtype]:
    """The dtypes of a node's results with its arguments cast and autocast off; empty if it does not take them."""

    def value(source: fx.Node) -> Any:
        held = source.meta.get("val")
        if target is None or not isinstance(held, torch.Tensor) or not is_cast(held, device):
            return held
        return held.to(target)

    mode = detect_fake_mode([held for held in map(fake, node.all_input_nodes) if held is not None])
    with ExitStack() as stack:
        for context in (mode or torch.no_grad(), torch.no_grad(), enable_python_dispatcher(), free_lengths()):
            stack.enter_context(context)
        stack.enter_context(torch.autocast(device, enabled=False))
        try:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            made = cast("Callable[..., Any]", node.target)(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError):
            return []
    return _dtypes(made)


def _dtypes(value: Any) -> list[torch.dtype]:
    return [x.dtype for x in _tensors(value)]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def _cast(program: Program, node: fx.Node, target: torch.dtype, device: str, casts: set[fx.Node]) -> None:
    made: dict[fx.Node, fx.Node] = {}
    for source in node.all_input_nodes:
        held = fake(source)
        if held is None or not is_cast(held, device) or held.dtype == target:
            continue
        twice = [u for u in source.users if u in casts and u < node and u.args[1] == target]
        if twice and program.tensor(source) is not None:  # autocast keeps the casts of weights, and only these
            made[source] = twice[0]
            continue
        with node.graph.inserting_before(node):
            copy = node.graph.call_function(torch.ops.aten.to.dtype, (source, target))
        copy.meta = {k: v for k, v in node.meta.items() if k in (META, "nn_module_stack", "stack_trace")}
        copy.meta["val"] = held.to(target)
        made[source] = copy
        casts.add(copy)
    for source, copy in made.items():
        node.replace_input_with(source, copy)
