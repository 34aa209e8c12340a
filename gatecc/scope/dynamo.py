"""Dynamo: a kind of call that a scope has not seen, met while torch.compile traces.

Breaking the graph there would cost more than one call: a break inside a loop over layers makes Dynamo give the whole
model up for good. So the variant is made while tracing stands still, for every layer that shares captures with this
one, and Dynamo traces its frame again from the top, now with something to find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gatecc.capture.signature import CONSTANTS, OpaqueArgumentError
from gatecc.errors import GateccError
from gatecc.scope.traced import outside

Learn = Callable[[nn.Module, nn.Module, tuple[Any, ...], dict[str, Any]], bool]
"""``learn(root, module, args, kwargs)`` makes a variant of this call, and for layers of root like it; False if none."""


def learn_while_tracing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], learn: Learn) -> None:
    """Called in code that Dynamo traces: learn from stand-ins of the traced arguments, then let Dynamo start again.

    Does nothing if an argument is not known while tracing, or if there is nothing to learn: then the graph breaks.
    """
    from torch._dynamo.comptime import comptime

    comptime(_learn)


def _learn(context: Any) -> None:
    from torch._dynamo.exc import UnspecializeRestartAnalysis

    translator = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    local = translator.symbolic_locals
    try:
        module, args, kwargs, learn = (_value(local[name]) for name in ("module", "args", "kwargs", "learn"))
        root = _root(translator.output.root_tx, module)
        learned = outside(module, args, kwargs, lambda a, k: learn(root, module, a, k))
    except (GateccError, OpaqueArgumentError):
        return
    if learned:
        raise UnspecializeRestartAnalysis(restart_reason="gatecc captured a kind of call that a scope had not seen")


def _root(translator: Any, module: nn.Module) -> nn.Module:
    """The module whose forward Dynamo compiles; the scope itself if it is none."""
    try:
        root = _value(translator.symbolic_locals["self"])
    except (KeyError, OpaqueArgumentError):
        return module
    return root if isinstance(root, nn.Module) else module


def _value(tracker: Any) -> Any:
    """What a variable of the traced code holds: fake tensors, and the real thing for everything else."""
    from torch._dynamo import variables as v

    tracker = tracker.realize()
    if tracker.is_tensor():
        return tracker.as_proxy().node.meta["example_value"]
    if isinstance(tracker, v.UnspecializedNNModuleVariable | v.NNModuleVariable):
        return tracker.value
    if isinstance(tracker, v.UserFunctionVariable):
        return tracker.get_function()
    if isinstance(tracker, v.TupleVariable | v.ListVariable):
        return tracker.python_type()(map(_value, tracker.items))
    if isinstance(tracker, v.ConstDictVariable):
        return {key.vt.as_python_constant(): _value(item) for key, item in tracker.items.items()}
    if tracker.is_python_constant() and isinstance(
        constant := tracker.as_python_constant(), (*CONSTANTS, type(None), torch.Size)
    ):
        return constant
    raise OpaqueArgumentError(f"an argument of type {tracker.python_type()} while tracing")
