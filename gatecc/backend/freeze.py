"""freeze: what lowerings compute of parameters alone is computed once, and again when a parameter has changed.

A lowering may concatenate or stack weights in the graph. Under ``gatecc.freeze`` and without gradients this part
becomes a graph of its own, whose results are kept beside the compiled code and handed to it as inputs. The parameters
stay inputs too, so each call sees whether they are the ones of before (gatecc.backend.stamps).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._guards import TracingContext
from torch._ops import OpOverload
from torch.utils.weak import WeakIdKeyDictionary

from gatecc.backend.stamps import Stamp
from gatecc.ir.ops import VIEWS, mutates, opname
from gatecc.ir.program import fake, origin

_FREE = VIEWS - frozenset("contiguous clone repeat repeat_interleave tile index_select index gather roll flip".split())


@dataclass(frozen=True, eq=False)
class Frozen:
    """What of a graph depends on parameters alone. ``graph`` takes the inputs of before and then the results of
    ``early``, which takes the inputs at ``places``."""

    graph: fx.GraphModule
    early: fx.GraphModule
    places: tuple[int, ...]

    def examples(self) -> list[torch.Tensor]:
        """Fake tensors of the results of ``early``, for the compiler that stands behind."""
        context = TracingContext.try_get()
        mode = None if context is None else context.fake_mode
        made: list[torch.Tensor] = []
        for node in self.graph.graph.find_nodes(op="placeholder")[-self.count :]:
            value = node.meta["val"]
            with mode or value.fake_mode:
                made.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device))
        return made

    @property
    def count(self) -> int:
        """The number of results of ``early``."""
        results: Any = self.early.graph.output_node().args[0]
        return len(results)

    def run(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The function of the inputs of before, around the compiled ``graph``."""
        kept: Any = WeakIdKeyDictionary()  # by the first parameter: layers of one structure share compiled code

        def call(*inputs: Any) -> Any:
            weights = [inputs[place] for place in self.places]
            state: _State | None = kept.get(weights[0])
            if state is None or not state.holds(weights):
                with torch.no_grad():
                    state = _State(self.early.forward(*weights), tuple(map(Stamp.of, weights)))
                kept[weights[0]] = state
            return compiled(*inputs, *state.made)

        return call


def freeze(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Frozen | None:
    """Take out, in place, what lowerings compute of parameters alone; None if there is no such thing."""
    graph = graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")
    parameters = {
        node: i for i, (node, value) in enumerate(zip(placeholders, inputs, strict=True)) if _fit(node, value)
    }
    early = _early(graph, parameters)
    results = [n for n, computed in early.items() if computed and any(user not in early for user in n.users)]
    if not results:
        return None
    own, places = _own_graph(early, results, parameters)
    for result in results:
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            handed = graph.placeholder(f"frozen_{result.name}")
        handed.meta = dict(result.meta)
        result.replace_all_uses_with(handed)
    for node in reversed(early):
        if not node.users:
            graph.erase_node(node)
    graph_module.recompile()
    return Frozen(graph_module, own, places)


def _fit(node: fx.Node, value: Any) -> bool:
    """Whether an input is a parameter whose changes are noticed: one of inference mode has no version."""
    return isinstance(value, nn.Parameter) and not value.is_inference() and not _written(node)


def _written(node: fx.Node) -> bool:
    """Whether the graph itself writes into a value, or into a view of it."""
    return any(mutates(user) or (opname(user) in VIEWS and _written(user)) for user in node.users)


def _early(graph: fx.Graph, parameters: dict[fx.Node, int]) -> dict[fx.Node, bool]:
    """The nodes of lowerings that depend on parameters alone, and whether something is computed: views are free."""
    early: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op != "call_function" or not sources or not origin(node).inserted_by or not _same_each_time(node):
            continue
        if all(source in parameters or source in early for source in sources) and fake(node) is not None:
            early[node] = opname(node) not in _FREE or any(early.get(source) for source in sources)
    return early


def _same_each_time(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload) or mutates(node):
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def _own_graph(
    early: dict[fx.Node, bool], results: list[fx.Node], parameters: dict[fx.Node, int]
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    graph = fx.Graph()
    read = [node for node in parameters if any(user in early for user in node.users)]
    copied = {node: graph.placeholder(node.name) for node in read}
    for node in early:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[result] for result in results))
    graph.eliminate_dead_code()
    return fx.GraphModule(nn.Module(), graph), tuple(parameters[node] for node in read)


@dataclass(frozen=True, eq=False)
class _State:
    """Results for parameters, and how these were."""

    made: tuple[torch.Tensor, ...]
    stamps: tuple[Stamp, ...]

    def holds(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether nothing has changed, as far as it can be seen."""
        return all(stamp.holds(weight) for stamp, weight in zip(self.stamps, weights, strict=True))
