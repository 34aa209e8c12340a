"""The function that torch.compile calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import fx

from gatecc.backend.debugging import Record
from gatecc.backend.freeze import freeze
from gatecc.backend.lower import lower
from gatecc.backend.options import Options, inductor_settings
from gatecc.backend.watched import Watched


def gatecc(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph.

    ``mode``: one of Inductor's (``torch._inductor.list_mode_options``), or ``"aot_eager"`` or ``"eager"``, which run
    the lowered graph operator by operator. ``options``: those called ``gatecc.*`` are `Options`, the others Inductor's.
    Raises ArgumentError for an unknown mode or option.
    """
    settings = inductor_settings(mode, options or {})
    ours = Options.of(options or {})
    record = Record.of(graph_module, example_inputs, options or {})
    lowered = lower(graph_module, example_inputs, ours, record)
    changed = lowered.graph is not graph_module
    frozen = freeze(lowered.graph, example_inputs) if changed and ours.freeze and not lowered.training else None
    record.lowered(lowered.graph, lowered.outcomes)
    extra = [] if frozen is None else frozen.examples()
    run = record.timed(lambda: _compiled(lowered.graph, [*example_inputs, *extra], mode, settings))
    run = run if frozen is None else frozen.run(run)
    if not lowered.assumed:
        return run
    return Watched(run, graph_module.forward, {place: example_inputs[place] for place in lowered.assumed})


def _compiled(
    graph: fx.GraphModule, example_inputs: list[Any], mode: str | None, settings: dict[str, Any]
) -> Callable[..., Any]:
    if mode == "eager":
        return graph.forward
    if mode == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, example_inputs)
    from torch._inductor.compile_fx import compile_fx

    return cast("Callable[..., Any]", compile_fx(graph, example_inputs, config_patches=settings))
