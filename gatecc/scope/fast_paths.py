"""Fast paths of torch that read weights past the modules which hold them, switched off where a scope would be missed.

With gradients off, or with every weight frozen, nn.TransformerEncoderLayer hands the weights of its submodules to one
fused operator and calls none of them; nn.TransformerEncoder makes a nested tensor of a padded batch, which only that
operator takes. Both have a plain attribute that says whether they may, which costs a call nothing, is copied and
pickled with the module and is left alone by torch.compile and torch.export.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from gatecc.scope.state import scopes

_SWITCHES: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


class Switch(NamedTuple):
    """One attribute that was changed: the module's FQN, the name, and the value that it had."""

    fqn: str
    name: str
    value: Any


def fast_paths_off(model: nn.Module) -> list[Switch]:
    """Switch off for good the fast paths that go past a scope of ``model``; returns what was changed.

    A module that is a scope itself runs its graphs and keeps its attributes.
    """
    changed: list[Switch] = []
    for fqn in dict.fromkeys(outer for scope, _, _ in scopes(model) for outer in _outer(scope)):
        module = model.get_submodule(fqn)
        for kind, name, off in _SWITCHES:
            value = getattr(module, name, off)
            if isinstance(module, kind) and value != off:
                setattr(module, name, off)
                changed.append(Switch(fqn, name, value))
    return changed


def fast_paths_on(model: nn.Module, changed: Iterable[Switch]) -> None:
    """Give the attributes back the values that they had."""
    for fqn, name, value in changed:
        setattr(model.get_submodule(fqn), name, value)


def _outer(fqn: str) -> Iterator[str]:
    while fqn:
        fqn = fqn.rpartition(".")[0]
        yield fqn
