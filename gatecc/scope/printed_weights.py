"""How a printed graph gets the parameters and buffers of the live module that it is called with."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_GETATTR = nn.Module.__getattr__  # torch.fx puts another in its place while it traces

Read = Callable[[nn.Module], tuple[Tensor, ...]]


class Weights:
    """``weights(module)``: the tensors at ``paths``, in that order; ``names`` are what the graph calls them.

    ``nn.Module.__getattr__`` costs as much as a small operator, and a path is several of them: tensors are read from
    the dicts where modules keep them, wherever attributes of ``module`` come from there. Tracers, which record
    attributes, get attributes.
    """

    def __init__(self, module: nn.Module, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self.names = tuple(f"w{i}_{re.sub(r'[^0-9A-Za-z]', '_', path)}" for i, path in enumerate(paths))
        self.by_attribute = _compiled(module, self.paths, direct=False)
        self.from_dicts = _compiled(module, self.paths, direct=True)

    def __call__(self, module: nn.Module) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling() or nn.Module.__getattr__ is not _GETATTR:
            return self.by_attribute(module)
        return self.from_dicts(module)


def _compiled(module: nn.Module, paths: Sequence[str], direct: bool) -> Read:
    """A function that reads every holder on the way once."""
    rows: list[str] = []
    names: dict[str, str] = {}

    def read(path: str) -> str:
        """The expression of what lies at a path."""
        above, _, name = path.rpartition(".")
        holder = "module"
        if above:
            if above not in names:
                expression = read(above)
                names[above] = f"m{len(names)}"
                rows.append(f"    {names[above]} = {expression}")
            holder = names[above]
        kept = _kept_in(operator.attrgetter(above)(module) if above else module, name) if direct else ""
        return f"{holder}.{kept}[{name!r}]" if kept else f"getattr({holder}, {name!r})"

    values = [read(path) for path in paths]
    rows.append(f"    return ({''.join(f'{value}, ' for value in values)})")
    space: dict[str, Any] = {}
    exec(compile("\n".join(["def weights(module):", *rows]), "<gatecc weights>", "exec"), space)
    return space["weights"]


def _kept_in(holder: Any, name: str) -> str:
    """The dict of a module from which an attribute comes; "" if it is a property, a plain attribute or a script's."""
    if not isinstance(holder, nn.Module):
        return ""
    for kept in ("_parameters", "_buffers", "_modules"):
        values = vars(holder).get(kept)
        if type(values) is dict and name in values and getattr(holder, name) is values[name]:
            return kept
    return ""
