"""Scoped modules, as layers below the scopes see them: those whose forward runs rewritten graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

STATE = "_gatecc"  # where a scoped module keeps its state


def scopes_around(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """The scopes that a submodule lies in, itself included: their names and states, outermost first."""
    parts = name.split(".") if name else []
    for count in range(len(parts) + 1):
        around = ".".join(parts[:count])
        state = vars(model.get_submodule(around)).get(STATE)
        if state is not None:
            yield around, state
