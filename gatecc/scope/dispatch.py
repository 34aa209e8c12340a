"""Dispatch: which way a call of a scope takes: a variant that is known, a new one, or the Python path."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch._C import _len_torch_function_stack
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing Dynamo for it

from gatecc.capture.neutral import neutral_weights
from gatecc.capture.reads import Seen, reads_of
from gatecc.capture.shield import apart, random_states_kept
from gatecc.capture.signature import Key, NestedTensorError, OpaqueArgumentError, flatten, neutral_inputs
from gatecc.errors import CallNotCapturedError, CaptureError
from gatecc.scope.family import Entry
from gatecc.scope.key import call_key
from gatecc.scope.learn import entry_for, known_entry, lookup
from gatecc.scope.python_path import REMEDY, run_python
from gatecc.scope.state import STATE, Scope, base_forward
from gatecc.scope.traced import is_traced, outside
from gatecc.scope.variant import Variant


def known(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Variant, list[torch.Tensor]] | None:
    """`lookup`, unseen by function modes: sizes and dtypes that are read for the key are no part of the model."""
    if torch.compiler.is_dynamo_compiling() or not _len_torch_function_stack():
        return lookup(module, args, kwargs)
    with torch._C.DisableTorchFunction():
        return lookup(module, args, kwargs)


@_disable_dynamo
def first_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of a kind that this scope has not seen: share, capture, or take the Python path.

    Dynamo does not trace into it: where `learn` found nothing to do, the graph breaks here.
    """
    state = cast("Scope", getattr(module, STATE))
    try:
        with torch._C.DisableTorchFunction():
            key, leaves = call_key(module, args, kwargs)
            refused = state.refused.find(key, leaves, module)
    except NestedTensorError as e:
        raise CallNotCapturedError(
            "torch's fused operators alone take nested tensors, and they know nothing of the rewrite",
            where=state.fqn or type(module).__name__,
            found=str(e),
            do="pass a padded tensor (torch.nested.to_padded_tensor) and a padding mask",
        ) from e
    except OpaqueArgumentError as e:
        return _python(module, state, args, kwargs, str(e), e.do)
    if refused is not None:
        return _python(module, state, args, kwargs, refused)
    if is_traced(leaves):
        return _traced(module, state, key, args, kwargs, leaves)
    seen: Seen = {}
    try:
        entry = apart(lambda: _learn(module, state, key, args, kwargs, seen))
    except CaptureError as e:
        state.refused.add(key, leaves, reads_of(seen), e.found)
        return _python(module, state, args, kwargs, e.found)
    return entry.variant(module, leaves)


def _learn(
    module: nn.Module, state: Scope, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Seen
) -> Entry:
    """Behind the shield: an entry for a call, made with ordinary tensors in the place of the caller's."""
    with random_states_kept(), neutral_weights(module):
        args, kwargs = neutral_inputs(args, kwargs)
        leaves = flatten(args, kwargs)[1]
        known = known_entry(module, state, key, leaves)  # another thread may have captured it, while this one waited
        return known or entry_for(module, state, key, args, kwargs, leaves, seen)


def _traced(
    module: nn.Module, state: Scope, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[torch.Tensor]
) -> Any:
    """Inside someone's torch.export: capture outside of it, and run the variant inside."""

    def work(real_args: tuple[Any, ...], real_kwargs: dict[str, Any]) -> Entry:
        real = flatten(real_args, real_kwargs)[1]
        return entry_for(module, state, key, real_args, real_kwargs, real)

    try:
        entry = outside(module, args, kwargs, work)
    except CaptureError as e:
        return _python(module, state, args, kwargs, e.found)
    return entry.variant(module, leaves)


def _python(
    module: nn.Module, state: Scope, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str, do: str = ""
) -> Any:
    if state.python.refused and reason:
        raise CallNotCapturedError(
            "this call cannot become a graph, and the rewrite cannot be done in Python",
            where=state.fqn or type(module).__name__,
            found=f"{reason}; {state.python.refused}",
            do=do or REMEDY,
        )
    return run_python(state.python, module, base_forward(module), args, kwargs, state.fqn)
