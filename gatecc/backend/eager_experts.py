"""Loops over experts in transformers, while Dynamo traces a model for this backend.

``experts_implementation="eager"`` loops over the experts that were hit, a number that no graph knows: Dynamo gives the
whole module up and runs it in Python. transformers has the same function in grouped products, which is one graph. It is
traced in the place of the loop, for this backend alone: other backends, and calls that are not compiled, run what the
model says.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator

_BACKEND = "gatecc.backend"  # explain, too
_MODULE = "transformers.integrations.moe"
_OPEN = "grouped_mm"  # the implementation that a graph can show


def install() -> None:
    """Let the experts of transformers ask who compiles them, as soon as transformers is loaded."""
    module = sys.modules.get(_MODULE)
    if module is None:
        sys.meta_path.insert(0, _Later())
    else:
        _open(module)


class _Later(MetaPathFinder):
    """Sees the module being imported, once."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader = spec.loader
            run = loader.exec_module

            def run_and_open(module: ModuleType) -> None:
                run(module)
                _open(module)

            loader.exec_module = run_and_open
        return spec


def _open(module: ModuleType) -> None:
    interface = getattr(module, "ExpertsInterface", None)
    if interface is None:  # a transformers before version 5 has no such choice
        return
    get_interface = interface.get_interface

    def asking(self: Any, experts_implementation: str, default: Any) -> Any:
        if experts_implementation == "eager" and torch.compiler.is_dynamo_compiling() and _is_ours():
            experts_implementation = _OPEN
        return get_interface(self, experts_implementation, default)

    interface.get_interface = asking


@torch.compiler.assume_constant_result
def _is_ours() -> bool:
    """Whether the graph that Dynamo traces now is for this backend. Dynamo keeps what it compiled by backend."""
    compiler = InstructionTranslator.current_tx().output.compiler_fn
    while (inner := getattr(compiler, "_torchdynamo_orig_backend", None)) is not None:
        compiler = inner
    function = getattr(compiler, "compiler_fn", compiler)  # torch.compile wraps it, with its options
    return str(getattr(function, "__module__", "")).startswith(_BACKEND)
