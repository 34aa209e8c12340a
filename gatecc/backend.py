"""The torch.compile backend: ``torch.compile(model, backend="gatecc")``.

Dynamo's graph is lowered to the operators that torch.export yields, brought into canonical form, and handed to
Inductor, so that one pass library serves both front ends. Parameters are inputs of a Dynamo graph: layers that share a
compiled graph keep their own, and nothing is baked in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch.fx.traceback as fx_traceback
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from gatecc.errors import ArgumentError
from gatecc.ir.program import Program
from gatecc.passes.canonicalize import canonicalize

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
    lowered = lower(graph_module)
    if mode == "eager":
        return lowered.forward
    if mode == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(lowered, list(example_inputs))
    from torch._inductor.compile_fx import compile_fx

    return cast("Callable[..., Any]", compile_fx(lowered, list(example_inputs), config_patches=settings))


def lower(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A Dynamo graph as a canonical graph of ATen operators, before autograd and functionalization; owners are kept.

    A graph with nested graphs (checkpointed regions, custom autograd functions, torch.cond) comes back as it is:
    tracing it through would undo what the nesting is for.
    """
    nested = [name for name, child in graph_module.named_modules() if name and isinstance(child, fx.GraphModule)]
    if nested:
        log.info("gatecc: a graph goes on to the compiler as it is, because it holds nested graphs: %s", nested)
        return graph_module
    placeholders = _placeholders(graph_module)
    values = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders]
    # The mode of Dynamo's own values: by now the tracing context has another one, for the compiler behind us.
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()

    def run(*arguments: Any) -> Any:
        return fx.Interpreter(graph_module).run(*arguments)

    with fx_traceback.preserve_node_meta(), mode:
        traced = make_fx(run, pre_dispatch=True)(*values)
    for source, node in zip(placeholders, _placeholders(traced), strict=True):
        node.meta.update(source.meta)
    canonicalize(Program(nn.Module(), traced, "", [], pytree.tree_structure(0)))
    # A fresh module: Dynamo's own tables describe the nodes of its graph and would be held against ours.
    return fx.GraphModule(traced, traced.graph)


def _placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph_module.graph.nodes if n.op == "placeholder"]


def _settings(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's configuration for a mode and options."""
    if mode is None or mode in PLAIN:
        return dict(options)
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise ArgumentError("unknown mode", found=repr(mode), expected=", ".join([*known, *PLAIN]))
    return {**known[mode], **options}
