"""The torch.compile backend: ``torch.compile(model, backend="gatecc")``.

Dynamo's graph is lowered to the operators that torch.export yields, brought into canonical form, and handed to
Inductor, so that one pass library serves both front ends. Parameters are inputs of a Dynamo graph: layers that share a
compiled graph keep their own, and nothing is baked in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import fx

from gatecc.capture.dynamo import dynamo_program, has_nested_graphs
from gatecc.errors import ArgumentError
from gatecc.ir.program import Program
from gatecc.pipeline import canonical_form

log = logging.getLogger(__name__)

PLAIN = ("aot_eager", "eager")  # modes that run the canonical graph without Inductor


def gatecc(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph.

    ``mode``: one of Inductor's (``torch._inductor.list_mode_options``), or ``"aot_eager"`` or ``"eager"``, which run
    the canonical graph operator by operator. ``options`` are Inductor's. Raises ArgumentError for an unknown mode.
    """
    settings = _settings(mode, options or {})
    program = lower(graph_module, example_inputs)
    lowered = graph_module if program is None else compiled_graph(program)
    if mode == "eager":
        return lowered.forward
    if mode == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(lowered, list(example_inputs))
    from torch._inductor.compile_fx import compile_fx

    return cast("Callable[..., Any]", compile_fx(lowered, list(example_inputs), config_patches=settings))


def lower(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Program | None:
    """A Dynamo graph as a canonical Program; its weights are lifted placeholders. Passes of the backend start here.

    None for a graph with nested graphs (checkpointed regions, custom autograd functions, torch.cond), which is compiled
    as it is: tracing it through would undo what the nesting is for.
    """
    if has_nested_graphs(graph_module):
        log.info("gatecc: a graph goes on to the compiler as it is, because it holds nested graphs")
        return None
    return canonical_form(dynamo_program(graph_module, example_inputs))


def compiled_graph(program: Program) -> fx.GraphModule:
    """What the compiler behind is given: it takes the inputs that Dynamo gives."""
    # A fresh module: Dynamo's own tables describe the nodes of its graph and would be held against ours.
    return fx.GraphModule(program.graph_module, program.graph)


def _settings(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's configuration for a mode and options."""
    if mode is None or mode in PLAIN:
        return dict(options)
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise ArgumentError("unknown mode", found=repr(mode), expected=", ".join([*known, *PLAIN]))
    return {**known[mode], **options}
