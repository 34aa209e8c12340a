"""The function that torch.compile calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import fx

from gatecc.backend.lower import lower
from gatecc.backend.options import Options, inductor_settings


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
    graph = lower(graph_module, example_inputs, Options.of(options or {})).graph
    if mode == "eager":
        return graph.forward
    if mode == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, list(example_inputs))
    from torch._inductor.compile_fx import compile_fx

    return cast("Callable[..., Any]", compile_fx(graph, list(example_inputs), config_patches=settings))
