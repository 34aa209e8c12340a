"""steps: a graph that is no single region, such as a gradient, as kernels that run one after the other.

It is cut where a product reads what another one gave: that value is written once. What lies between two cuts is a
region; gradients of weights are sums over rows, each with what it multiplies computed as it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import fx

from gatecc.codegen.regions.over_rows import checked_sums, is_row_product, is_row_sum, operands
from gatecc.codegen.regions.part import print_part
from gatecc.codegen.regions.region import (
    PRODUCTS,
    REDUCTIONS,
    RefusedError,
    Region,
    ancestors,
    checked,
    name_of,
    same_elements,
    shape,
)


class Step(NamedTuple):
    """A kernel: its region, and the nodes of the whole graph that it reads and computes."""

    region: Region
    inputs: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]


def steps_of(graph: fx.Graph, notes: tuple[str, ...]) -> list[Step]:
    """The kernels of a graph. What none of them computes is left to ATen."""
    cuts, found = _cuts(graph), list[Step]()
    level = _levels(graph, cuts)
    targets = [n for n in dict.fromkeys((*cuts, *_results(graph, cuts))) if n.op == "call_function"]
    for at in sorted({level[n] for n in targets}):
        here = sorted((n for n in targets if level[n] == at), key=list(graph.nodes).index)
        tiles = [n for n in here if not is_row_product(n) and not is_row_sum(n)]
        sums = [n for n in here if is_row_sum(n)]
        groups = [tiles, *(_of_width(sums)), *([n] for n in here if is_row_product(n))]
        for group in groups:
            found += _grouped(graph, cuts, group, notes)
    return found


def in_order(graph: fx.Graph, steps: Sequence[Step]) -> Iterator[int | fx.Node]:
    """The numbers of steps, and the nodes that ATen computes between them, each after what it reads."""
    made = {n: i for i, step in enumerate(steps) for n in step.results}
    done = set[int | fx.Node](n for n in graph.nodes if n.op == "placeholder")

    def need(node: fx.Node) -> Iterator[int | fx.Node]:
        what = made.get(node, node)
        if what in done:
            return
        done.add(what)
        for source in node.all_input_nodes if isinstance(what, fx.Node) else steps[what].inputs:
            yield from need(source)
        yield what

    results: Any = graph.output_node().args[0]
    for node in results:
        yield from need(node)


def _cuts(graph: fx.Graph) -> dict[fx.Node, None]:
    """The values that are written: what products read of products, and what is summed over rows."""
    cuts: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        summed = is_row_product(node) or is_row_sum(node)
        if not summed and name_of(node) not in PRODUCTS:
            continue
        read = operands(node) if summed else (same_elements(node.args[-2]),)
        stops = (*PRODUCTS, *REDUCTIONS) if is_row_product(node) else PRODUCTS
        for value in read:
            before = ancestors([value], upto=cuts) - set(cuts)
            if any(n.op == "call_function" and name_of(n) in stops for n in before):
                cuts[value] = None
        if summed:
            cuts[node] = None
    return cuts


def _levels(graph: fx.Graph, cuts: dict[fx.Node, None]) -> dict[fx.Node, int]:
    """How many steps must come before a node's."""
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        level[node] = max((level[n] + (n in cuts) for n in node.all_input_nodes), default=0)
    return level


def _results(graph: fx.Graph, cuts: dict[fx.Node, None]) -> list[fx.Node]:
    """What kernels are to compute of the results: not what comes of sums over rows alone."""
    results: Any = graph.output_node().args[0]
    found = list(map(same_elements, results))
    return [n for n in found if n not in cuts and any(not _summed(x) for x in _read(n, cuts))]


def _summed(node: fx.Node) -> bool:
    return is_row_product(node) or is_row_sum(node)


def _read(node: fx.Node, cuts: dict[fx.Node, None]) -> set[fx.Node]:
    """The inputs and cuts that a value is computed from."""
    inner = ancestors([node], upto=set(cuts) - {node})
    return {n for n in inner if n is not node and (n in cuts or n.op == "placeholder")}


def _of_width(sums: Sequence[fx.Node]) -> list[list[fx.Node]]:
    found: dict[int, list[fx.Node]] = {}
    for node in sums:
        found.setdefault(shape(node)[-1], []).append(node)
    return list(found.values())


def _grouped(graph: fx.Graph, cuts: dict[fx.Node, None], targets: list[fx.Node], notes: tuple[str, ...]) -> list[Step]:
    """Values in as few kernels as there can be; those that none can compute are left out."""
    found, left = list[Step](), targets
    while left:
        step, rest = None, list[fx.Node]()
        for node in left:
            more = _step(graph, cuts, (*(() if step is None else step.results), node), notes)
            step, rest = (step, [*rest, node]) if more is None else (more, rest)
        if step is None:
            return found
        found.append(step)
        left = rest
    return found


def _step(
    graph: fx.Graph, cuts: dict[fx.Node, None], results: tuple[fx.Node, ...], notes: tuple[str, ...]
) -> Step | None:
    """The kernel of some values; None if they have none."""
    stops = set(cuts) - set(results)
    inner = ancestors(results, upto=stops)
    copy, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = tuple(n for n in graph.nodes if n in inner and (n in stops or n.op == "placeholder"))
    for node in inputs:
        copied[node] = copy.placeholder(node.name)
        copied[node].name = node.name
        copied[node].meta = dict(node.meta)
    for node in graph.nodes:
        if node in inner and node not in copied:
            copied[node] = copy.node_copy(node, copied.__getitem__)
    copy.output(tuple(copied[n] for n in results))
    try:
        summed = is_row_product(results[0]) or is_row_sum(results[0])
        region = checked_sums(copy, notes) if summed else checked(copy, notes)
        print_part(region)
    except RefusedError:
        return None
    return Step(region, inputs, results)
