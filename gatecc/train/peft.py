"""peft: LoRA by the library of that name, for students that are Python modules."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from gatecc.errors import ArgumentError, MissingPackageError
from gatecc.train.layers import is_scope
from gatecc.train.lora import Lora, adapted


def inject(student: nn.Module, spec: Lora) -> None:
    """Replace the Linears whose weights are targets by peft's wrappers, in place; done once.

    A wrapper inside a scope would change what the scope's graph was made from, so such targets are refused.
    Raises ArgumentError, MissingPackageError.
    """
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as e:
        raise MissingPackageError("peft is not installed", do="pip install 'gatecc[peft]', or Lora()") from e
    if any(".lora_" in n for n, _ in student.named_parameters()):
        return
    names = [n.removesuffix(".weight") for n in adapted(student, spec.targets)]
    for name in names:
        above = ["", *(name[:i] for i, c in enumerate(name) if c == "."), name]
        scope = next((p for p in above if is_scope(student.get_submodule(p))), None)
        if scope is not None:
            raise ArgumentError(
                "peft cannot wrap a module inside a rewritten one",
                where=name,
                found=f"{scope or 'the whole model'} is one graph",
                do='Lora(...) without package="peft" adapts it',
            )
    config = peft.LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=names)
    peft.inject_adapter_in_model(config, student)
