"""whole_program: a model with all of its rewrites as one canonical graph."""

from __future__ import annotations

from typing import Any

from torch import nn

from gatecc.capture import capture
from gatecc.ir.edit import Editor
from gatecc.ir.program import Program
from gatecc.ir.weights import joined
from gatecc.pipeline import Application, Prepared, apply, prepare
from gatecc.scope.masks import handed_down
from gatecc.scope.scope import plain
from gatecc.scope.state import Scope, scopes
from gatecc.scope.transformers_loops import transformers_loops


def whole_program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], **how: Any) -> Program:
    """Capture a model as it is called and canonicalize it; a transformed one with its rewrites done on this graph.

    Scopes that run inline would each see their own inputs only, and a mask that is one of them proves nothing there:
    in the whole graph it is made of positions. What rewrites did to weights is taken back while they are done again.
    ``how`` is handed on to `capture`. Raises CaptureError, SiteRefusedError, GraphError.
    """
    return whole_edits(model, args, kwargs, **how)[0].program


def whole_edits(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], **how: Any
) -> tuple[Prepared, list[Editor]]:
    """`whole_program` with its sites, and the edits."""
    states = {fqn: state for fqn, _, state in scopes(model)}
    whole = _merged(states)
    with plain(model):
        with transformers_loops(model):
            prepared = prepare(capture(model, args, kwargs, **how))
        prepared.found = [handed_down(site, prepared.program, whole.masks) for site in prepared.found]
        editors = apply(prepared, whole.applied, own=whole.own)
    return prepared, [editor for of_one in editors for editor in of_one]


def reads_masks(model: nn.Module) -> bool:
    """Whether some rewrite of the model depends on a mask: what it is, is proved in the whole graph alone."""
    return any(a.rewrite.effects().reads_mask for _, _, state in scopes(model) for a in state.applied)


def _merged(states: dict[str, Scope]) -> Scope:
    """One scope of the whole model that does what its scopes do, with the modules that they have made."""
    applied = [
        Application(a.rewrite, tuple((joined(fqn, owner), ordinal) for owner, ordinal in a.sites))
        for fqn, state in states.items()
        for a in state.applied
    ]
    own = {joined(fqn, path) for fqn, state in states.items() for path in state.own}
    masks = {(joined(fqn, at), i): mask for fqn, state in states.items() for (at, i), mask in state.masks.items()}
    return Scope("", tuple(applied), own=own, masks=masks)
