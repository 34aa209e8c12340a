"""parts: what rewrites change in the parts of a model, so that rounding is told from another function."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from gatecc.capture.signature import copied, map_tensors
from gatecc.ir.weights.aside import modules_of
from gatecc.scope.family import Family
from gatecc.scope.learn import lookup
from gatecc.scope.scope import plain
from gatecc.scope.state import scope_of, scopes
from gatecc.scope.variant import Variant

Call = tuple[tuple[Any, ...], dict[str, Any]]
Run = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


def worst_part(
    model: nn.Module, calls: Sequence[Call], tolerance: float, run: Run, compare: Callable[[Any, Any], float]
) -> float:
    """The largest difference between a rewritten part and the original's; infinite if it cannot be told.

    Part by part, on what the original gives to each: where all parts are equal the model is, and what its outputs
    differ by is rounding that has added up. A part that differs by more than ``tolerance`` is looked at again in
    float64; one that does not run there tells nothing.
    """
    try:
        return max(_difference(module, given, tolerance, run, compare) for module, given in _given(model, calls, run))
    except Exception:
        return float("inf")


def _given(model: nn.Module, calls: Sequence[Call], run: Run) -> Iterator[tuple[nn.Module, list[Call]]]:
    """The outermost scopes, with what they are called with in the original."""
    outermost: dict[str, nn.Module] = {}
    for fqn, module, _ in scopes(model):
        if not any(not outer or fqn.startswith(f"{outer}.") for outer in outermost):
            outermost[fqn] = module
    seen = {fqn: list[Call]() for fqn in outermost}

    def keep(fqn: str) -> Callable[..., None]:
        return lambda module, args, kwargs: seen[fqn].append(copied((args, kwargs)))

    with plain(model):
        handles = [m.register_forward_pre_hook(keep(fqn), with_kwargs=True) for fqn, m in outermost.items()]
        try:
            for args, kwargs in calls:
                run(model, args, kwargs)
        finally:
            for handle in handles:
                handle.remove()
    for fqn, module in outermost.items():
        yield module, seen.pop(fqn)


def _difference(
    module: nn.Module, given: list[Call], tolerance: float, run: Run, compare: Callable[[Any, Any], float]
) -> float:
    found = _compared(module, given, run, compare)
    if found <= tolerance:
        return found
    with torch.no_grad():
        known = [lookup(module, *call) for call in given]
    with _doubled(module):
        doubled = [map_tensors(_wide, call) for call in given]
        graphs = [None if one is None else _graph(module, *one) for one in known]
        found = _compared(module, doubled, run, compare, graphs)
        return found if found <= tolerance else _compared(module, doubled, run, compare)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def _graph(module: nn.Module, variant: Variant, leaves: list[torch.Tensor]) -> Callable[[], Any]:
    """The graph that the part has already, on wide numbers: most hold no dtype, and need not be captured again."""
    return lambda: variant(module, [_wide(x) for x in leaves])


@contextmanager
def _doubled(module: nn.Module) -> Generator[None]:
    """A part in float64 for a while. A number of fewer bits comes back bitwise, so no copy of large weights is held."""
    states = [(state, state.family, state.trusted) for m in module.modules() if (state := scope_of(m)) is not None]
    holders = list(modules_of(module))
    found = {id(p): p for m in holders for p in m._parameters.values() if p is not None and p.is_floating_point()}
    parameters = [(p, p.dtype) for p in sorted(found.values(), key=torch.Tensor.numel)]  # the largest is changed alone
    buffers = [(m, name, b) for m in holders for name, b in m._buffers.items()]
    family = Family()  # of its own, for what is learned in float64 is not to stay
    try:
        for state, _, _ in states:
            state.family, state.trusted = family, []
        for p, _ in reversed(parameters):
            p.data = p.data.double()
        module.double()  # the rest, each as it sees fit
        yield
    finally:
        for p, dtype in parameters:
            p.data = p.data.to(dtype)
            if p.grad is not None:
                p.grad.data = p.grad.data.to(dtype)
        for holder, name, buffer in buffers:
            holder._buffers[name] = buffer
        for state, its, trusted in states:
            state.family, state.trusted = its, trusted


def _compared(
    module: nn.Module,
    given: Sequence[Call],
    run: Run,
    compare: Callable[[Any, Any], float],
    graphs: Sequence[Callable[[], Any] | None] = (),
) -> float:
    """The part as it was against what it is, on each of its calls; by ``graphs`` where it has one."""
    worst = 0.0
    for (args, kwargs), graph in zip_longest(given, graphs):
        with plain(module):
            expected = run(module, args, kwargs)
        if graph is None:
            got = run(module, args, kwargs)
        else:
            with torch.no_grad():
                got = graph()
        worst = max(worst, compare(expected, got))
    return worst
