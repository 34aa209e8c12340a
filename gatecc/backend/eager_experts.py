"""Loops over experts in transformers, while Dynamo traces a model for this backend.

``experts_implementation="eager"`` loops over the experts that were hit, a number that no graph knows: Dynamo gives the
whole module up and runs it in Python. transformers has the same function in grouped products, which is one graph. It is
traced in the place of the loop, for this backend alone: other backends, and calls that are not compiled, run what the
model says.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch._dynamo.callback import callback_handler
from torch._dynamo.symbolic_convert import InstructionTranslator

_NAME = "gatecc"
_OPEN = "grouped_mm"  # the implementation that a graph can show


def watch() -> None:
    """Let the experts of transformers ask who compiles them: now, or when a compilation begins after transformers was
    loaded. Called with every graph, for ``torch._dynamo.reset`` forgets who waits for compilations."""
    _install()
    if _install not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_install)


def _install(*_: object) -> None:
    moe = sys.modules.get("transformers.integrations.moe")
    interface = getattr(moe, "ExpertsInterface", None)
    if interface is None or hasattr(interface.get_interface, "_gatecc"):
        return
    get_interface = interface.get_interface

    def asking(self: Any, experts_implementation: str, default: Any) -> Any:
        if experts_implementation == "eager" and torch.compiler.is_dynamo_compiling() and _is_ours():
            experts_implementation = _OPEN
        return get_interface(self, experts_implementation, default)

    asking._gatecc = True  # pyright: ignore[reportFunctionMemberAccess]  a mark, so that it is done once
    interface.get_interface = asking


@torch.compiler.assume_constant_result
def _is_ours() -> bool:
    """Whether the graph that Dynamo traces now is for this backend. Dynamo keeps what it compiled by backend."""
    compiler = InstructionTranslator.current_tx().output.compiler_fn
    while (inner := getattr(compiler, "_torchdynamo_orig_backend", None)) is not None:
        compiler = inner
    return str(getattr(compiler, "compiler_name", getattr(compiler, "__name__", ""))).startswith(_NAME)


watch()
