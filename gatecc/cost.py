"""cost: operations, bytes and wall time of the path that a run took, beside the path with nothing left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gatecc.capture.compiled import behind, is_compiled
from gatecc.capture.shield import random_states_kept
from gatecc.capture.signature import copied, split_inputs
from gatecc.engine.analyse import Inputs, evaluation
from gatecc.engine.put_off import on_meta
from gatecc.engine.spent import fastest, masked_forms, metered
from gatecc.errors import ArgumentError, ExampleInputsError, UnsupportedModelError
from gatecc.ops import paths
from gatecc.ops.registry import Operator
from gatecc.report.cost import RunCost, Spent

Call = Callable[[], Any]

_COMPILED = (
    "operations and what was taken are those of the model uncompiled: compiled code leaves out what operators do, and "
    "computes what exits and other Python code would leave out"
)


def cost(
    model: nn.Module,
    inputs: Inputs,
    *,
    rounds: int = 5,
    each: bool = False,
    samples: int | None = None,
    label: str = "",
    accuracy: float | None = None,
) -> RunCost:
    """What one run costs per sample: operations, bytes and wall time of the path that it took, beside the full path.

    The model runs in evaluation mode and without gradients, as it is: experts that nobody chose, blocks that samples
    skip, exits that are taken, columns that are left out cost nothing. The full path is the same call with everything
    computed and masked. What was taken is told by site (``cost.taken``). A model with nothing to choose has one path.

    ``rounds``: the time is the least of so many runs, both paths in turns; 0 measures none. ``each`` also counts every
    sample alone (``cost.each``), cut from the inputs along their first axis. ``samples``: how many the inputs hold, if
    that is not the size of the first axis of the first tensor. ``label`` and ``accuracy`` are kept with the result:
    ``report.costs.append(cost)`` draws accuracy against operations. A model behind torch.compile is counted uncompiled
    and timed compiled; a note says so where the two may differ.

    Raises ExampleInputsError if the model does not run, ArgumentError for inputs without samples, UnsupportedModelError
    for what is no model or has no weights yet.
    """
    args, kwargs = split_inputs(inputs)
    plain = _checked(model)
    count = _samples(args, kwargs) if samples is None else samples
    if count < 1 or rounds < 0:
        raise ArgumentError(
            "a cost is one per sample", found=f"samples={count}, rounds={rounds}", expected="samples > 0"
        )
    device = next((t.device for t in (*plain.parameters(), *plain.buffers())), torch.device("cpu"))

    def runner(shell: Any, given: tuple[Any, dict[str, Any]]) -> Call:
        def call() -> Any:
            its_args, its_kwargs = copied(given)  # a cache that is passed in grows
            return shell(*its_args, **its_kwargs)

        return call

    call = runner(plain, (args, kwargs))
    with torch.no_grad(), evaluation(plain), random_states_kept():
        _first(plain, call)
        meter, profile = metered(call, plain)
        ran = Spent(meter.flops / count, meter.bytes / count)
        full, notes = ran, list[str]()
        if chose := bool(meter.chose or profile.rows):
            whole, _ = metered(call, plain, whole=True)
            full = Spent(whole.flops / count, whole.bytes / count)
        if rounds:
            timed, note = _times(runner(model, (args, kwargs)), list(meter.chose), chose, rounds, device)
            ran, full = (replace(s, seconds=t and t / count) for s, t in zip((ran, full), timed, strict=True))
            notes += note
        if chose and is_compiled(model):
            notes.append(_COMPILED)
        alone = tuple(float(_alone(runner, plain, args, kwargs, i, count)) for i in range(count if each else 0))
    return RunCost(
        type(plain).__name__,
        count,
        ran,
        full,
        tuple(profile.rows.values()),
        alone,
        tuple(meter.uncounted),
        tuple(notes),
        label,
        accuracy,
    )


def _checked(model: object) -> nn.Module:
    plain = behind(model)
    if not isinstance(plain, nn.Module):
        raise UnsupportedModelError("not a model", found=type(plain).__name__, expected="a torch.nn.Module")
    if on_meta(plain):
        raise UnsupportedModelError(
            "a model without weights cannot run",
            found="parameters on the meta device",
            do="gatecc.materialise it first",
        )
    return plain


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    first = next((x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()), None)
    if first is None:
        raise ArgumentError("no input has a row for each sample", do="say how many there are: samples=1")
    return first.size(0)


def _first(model: nn.Module, call: Call) -> None:
    """Run it once unwatched: a first call captures."""
    try:
        call()
    except Exception as e:
        first = (str(e).strip().splitlines() or [""])[0]
        raise ExampleInputsError(
            "the model does not run on these inputs",
            where=type(model).__name__,
            found=f"{type(e).__name__}: {first}",
            expected="inputs with which model(*args, **kwargs) runs",
            do="a tuple is positional, a dict is keyword arguments, (tuple, dict) is both",
        ) from e


def _times(
    call: Call, chose: list[Operator], two: bool, rounds: int, device: torch.device
) -> tuple[tuple[float, float | None], list[str]]:
    """Seconds of the path and of the full one."""
    call()  # a compiled model compiles
    if not two:
        (one,) = fastest([call], rounds, device)
        return (one, one), []
    lacking = [str(entry.overload) for entry in chose if entry.masked is None]
    if lacking:
        (one,) = fastest([call], rounds, device)
        return (one, None), [f"the full path was not timed: {', '.join(lacking)} has no masked form"]

    def whole() -> None:
        with paths.whole(), masked_forms(chose, device.type):
            call()

    whole()
    one, other = fastest([call, whole], rounds, device)
    return (one, other), []


def _alone(runner: Callable[[Any, Any], Call], model: nn.Module, args: Any, kwargs: Any, index: int, count: int) -> int:
    def cut(x: Tensor) -> Tensor:
        return x[index : index + 1] if x.dim() and x.size(0) == count else x

    call = runner(model, pytree.tree_map_only(Tensor, cut, (args, kwargs)))
    _first(model, call)
    return metered(call, model)[0].flops
