"""Compiled modules: what torch.compile made of a model, and how a rewritten model is compiled like it.

A compiled module is a shell around the model, with the compiler and its options beside it. It is not rewritten itself:
each of the calls that a transform makes would compile, minutes for what takes seconds. The model behind it is, and the
same compiler is put around the result. ``module.compile()`` leaves no such shell: the compiled code hides in the
module, is bound to that very module, and is lost in copies. Such modules are refused.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from gatecc.errors import UnsupportedModelError


def behind(model: Any) -> Any:
    """The model that torch.compile was given; any other object as it is."""
    while is_shell(model):
        model = model._orig_mod
    return model


def compiled_like(shell: Any, model: nn.Module) -> Any:
    """``model`` compiled as ``shell`` is (backend, mode, options, fullgraph, dynamic); as it is if that is no shell."""
    if not is_shell(shell):
        return model
    return shell.dynamo_ctx(compiled_like(shell._orig_mod, model))


def is_shell(model: object) -> bool:
    """Whether an object is what torch.compile made of a module. Dynamo is not imported for it."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(model, dynamo.OptimizedModule)


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or a module in it, runs compiled code."""
    return any(is_shell(m) or m._compiled_call_impl is not None for m in model.modules())


def refuse_compiled(model: nn.Module) -> None:
    """Raise UnsupportedModelError if the model, or a module in it, is compiled."""
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if is_shell(module):
            raise UnsupportedModelError(
                "a compiled module is in the way",
                where=where,
                found="torch.compile(module)",
                do="pass the module that was compiled (compiled._orig_mod), and compile what comes of it",
            )
        if module._compiled_call_impl is not None:
            raise UnsupportedModelError(
                "a module was compiled in place: it would go on running the code of before",
                where=where,
                found="module.compile()",
                do="transform or export it first, then compile; module._compiled_call_impl = None takes the code off",
            )
