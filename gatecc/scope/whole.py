"""whole_program: a model with all of its rewrites as one canonical graph."""

from __future__ import annotations

from typing import Any

from torch import nn

from gatecc.capture import capture
from gatecc.ir.match import find_sites
from gatecc.ir.program import Program
from gatecc.passes.canonicalize import canonicalize
from gatecc.scope.build import rewrite_program
from gatecc.scope.recurrences import recurrences
from gatecc.scope.scope import Application, Scope, plain, scopes


def whole_program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Capture a model as it is called and canonicalize it; a transformed one with its rewrites done on this graph.

    Scopes that run inline would each see their own inputs only, and a mask that is one of them proves nothing there:
    in the whole graph it is made of positions. Scopes whose weights hold rows of gates run inline nevertheless, for
    the plain graph would not fit these weights. Raises CaptureError, SiteRefusedError, GraphError.
    """
    states = {fqn: state for fqn, _, state in scopes(model)}
    if not states or any(state.widened for state in states.values()):
        with recurrences(model):
            program = capture(model, args, kwargs)
        canonicalize(program)
        return program
    with plain(model), recurrences(model):
        program = capture(model, args, kwargs)
    canonicalize(program)
    rewrite_program(program, _merged(states), find_sites(program).sites)
    return program


def _merged(states: dict[str, Scope]) -> Scope:
    """One scope of the whole model that does what its scopes do, with the modules that they have made."""
    applied = [
        Application(a.rewrite, tuple((_joined(fqn, owner), ordinal) for owner, ordinal in a.sites))
        for fqn, state in states.items()
        for a in state.applied
    ]
    own = {_joined(fqn, path) for fqn, state in states.items() for path in state.own}
    return Scope("", tuple(applied), own=own)


def _joined(fqn: str, path: str) -> str:
    return ".".join(part for part in (fqn, path) if part)
