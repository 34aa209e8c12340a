"""Copies of a transformed model for tests that share its transform.

``copy.deepcopy`` gives a copy that shares the captures: what one learns, the others have learned. A test of a first
call wants a copy that has what the transform captured and learns the rest by itself, as a model of its own would.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

from gatecc.scope.family import Family
from gatecc.scope.state import scopes


def learning_alone(model: Any) -> Any:
    """A copy of a transformed model whose layers share captures with each other and with no other model."""
    made: nn.Module = copy.deepcopy(model)
    families: dict[int, Family] = {}
    for _, _, state in scopes(made):
        entries = OrderedDict((key, list(of_kind)) for key, of_kind in state.family.entries.items())
        state.family = families.setdefault(id(state.family), Family(entries))
    return made
