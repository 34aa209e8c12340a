"""Learn: entries for calls that a scope has not seen: shared with another layer where that is proved, else captured."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from gatecc.capture.reads import Seen, recorded_reads
from gatecc.capture.signature import Key, OpaqueArgumentError
from gatecc.errors import CallNotCapturedError, CaptureError
from gatecc.ir.weights import suspended
from gatecc.scope.build import build
from gatecc.scope.family import Entry, proves
from gatecc.scope.key import call_key, fresh, hooked_in
from gatecc.scope.state import STATE, Scope, base_forward, scope_of, scopes
from gatecc.scope.variant import Variant


def lookup(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Variant, list[torch.Tensor]] | None:
    """The trusted variant for a call and the call's tensors, if there is one. Written so that Dynamo can trace it."""
    state = cast("Scope", getattr(module, STATE))
    try:
        key, leaves = call_key(module, args, kwargs)
    except OpaqueArgumentError:
        return None
    entry = known_entry(module, state, key, leaves)
    return None if entry is None else (entry.variant, leaves)


def known_entry(module: nn.Module, state: Scope, key: Key, leaves: list[torch.Tensor]) -> Entry | None:
    """The trusted entry for a call, if there is one. Written so that Dynamo can trace it."""
    for entry in state.family.find(key, leaves):
        if entry in state.trusted and fresh(entry.variant, module):
            return entry
    return None


def entry_for(
    module: nn.Module,
    state: Scope,
    key: Key,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: list[torch.Tensor],
    seen: Seen | None = None,
) -> Entry:
    """An entry of the family that is proved for this layer, or a new capture. Raises CaptureError; ``seen`` then holds
    the attributes that were read."""
    shared = _share(module, state, key, args, kwargs, leaves) or _with_gradients(
        module, state, key, args, kwargs, leaves
    )
    if shared is not None:
        return shared
    entry = build(module, state, args, kwargs, seen=seen, hooks=hooked_in(key)).entry
    state.family.add(key, entry)
    state.trust(entry)
    return entry


def _share(
    module: nn.Module, state: Scope, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[torch.Tensor]
) -> Entry | None:
    """An entry of another layer of the family, or of the same call with gradients, proved for this call now."""
    for entry in state.family.find(key, leaves):
        with suspended(module, state.changes):
            proved = entry not in state.trusted and proves(entry, module, base_forward(module), args, kwargs, leaves)
        if proved:
            state.trust(entry)
            return entry
    return _without_gradients(module, state, key, args, kwargs, leaves)


def _without_gradients(
    module: nn.Module, state: Scope, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[torch.Tensor]
) -> Entry | None:
    """For a call without gradients, the graph of the same call with them, if it is proved to be this call's function.

    Most modules do the same in both, and a proof costs two runs instead of a capture. Not the other way round: a graph
    that was captured without gradients forgets which of its regions had none.
    """
    call, gradients, *modes = key
    if gradients:
        return None
    seen: Seen = {}

    def forward(*its_args: Any, **its_kwargs: Any) -> Any:
        """The module's own; its reads are recorded here alone, for objects have other classes while they are."""
        with recorded_reads(module) as reads:
            output = base_forward(module)(*its_args, **its_kwargs)
        seen.update(reads)
        return output

    for known in state.family.find((call, True, *modes), leaves):
        seen.clear()
        with suspended(module, state.changes):
            proved = proves(known, module, forward, args, kwargs, leaves)
        if proved and seen.keys() <= {(read.path, read.name) for read in known.plain.reads}:
            entry = Entry(known.variant, known.plain)
            entry.layers.add(module)
            state.family.add(key, entry)
            state.trust(entry)
            return entry
    return None


def _with_gradients(
    module: nn.Module, state: Scope, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[torch.Tensor]
) -> Entry | None:
    """For a call without gradients, a capture of the same call with them, if it is proved to be this call's function.

    Whichever grad mode is called first, both then run the same graph: without gradients a module may take a fused path
    that hides its sites.
    """
    call, gradients, *modes = key
    if gradients:
        return None
    try:
        with torch.enable_grad():
            entry_for(module, state, (call, True, *modes), args, kwargs, leaves)
    except (CaptureError, CallNotCapturedError):
        return None
    return _without_gradients(module, state, key, args, kwargs, leaves)


def learn(root: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Make an entry for a call of a scope, and prove it for the layers that share captures with it.

    Those are found under ``root``, and among the layers that the scope's entries were proved for: each layer may be
    compiled by itself. Returns False if the scope knew this call: there is nothing to learn. Raises CaptureError.
    """
    state = cast("Scope", getattr(module, STATE))
    if lookup(module, args, kwargs) is not None:
        return False
    like = {id(m): m for entry in state.trusted for m in entry.layers}
    like |= {id(m): m for _, m, its in scopes(root) if its.family is state.family}
    key, leaves = call_key(module, args, kwargs)
    entry_for(module, state, key, args, kwargs, leaves)
    for other in like.values():
        its = scope_of(other)
        alike = [type(p) for p in other.parameters()] == [
            type(p) for p in module.parameters()
        ]  # not: sharded at present
        if alike and its is not None and its.family is state.family and lookup(other, args, kwargs) is None:
            _share(other, its, call_key(other, args, kwargs)[0], args, kwargs, leaves)
    return True
