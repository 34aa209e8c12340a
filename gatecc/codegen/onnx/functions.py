"""functions: the nodes of a rewrite, or of an operator that ONNX has not, as one call of a function of the model's own.

Viewers show its name, and the model is read as it was written. Runtimes put the nodes back in its place, so that
nothing is computed otherwise. Equal places call one function: its weights are arguments.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gatecc.codegen.onnx.marks import OPERATOR, REWRITE, WEIGHT, Mark
from gatecc.codegen.onnx.tidy.unread import drop_unread

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN, VERSION = "gatecc", 1
_SMALL = 1024  # bytes of a constant that a function holds itself
_FEWEST = 2  # nodes: one has a name by itself


def with_functions(model: ir.Model) -> ir.Model:
    """A copy whose marked nodes are calls; weights are shared with the model, which stays as it is."""
    made = model.clone()
    functions = _Functions(made)
    for graph in reversed(list(_graphs(made.graph))):
        for kind in (OPERATOR, REWRITE):  # an operator that a rewrite calls is a call in the body of that
            for mark, nodes in _marked(graph, kind):
                for part in _parts(graph, nodes):
                    if len(part) >= _FEWEST and not (kind == OPERATOR and _is_opaque(part)):
                        functions.put(graph, part, mark)
    drop_unread(made)
    return made


def calls(model: ir.Model) -> dict[str, int]:
    """How often each function is called, in the graph and by other functions."""
    inside = [model.graph, *model.functions.values()]
    found = Counter(n.op_type for each in inside for n in each.all_nodes() if n.domain == DOMAIN)
    return dict(sorted(found.items()))


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph and those that its nodes hold; what a marked node holds is a part of it."""
    yield graph
    for node in graph:
        if OPERATOR not in node.meta and REWRITE not in node.meta:
            for inner in _held(node):
                yield from _graphs(inner)


def _is_opaque(part: Sequence[ir.Node]) -> bool:
    """Whether ONNX's checker would lose the types of what a function within another yields: it knows no operators of
    runtimes."""
    return REWRITE in part[0].meta and any(node.domain for node in _with_inner(part))


def _marked(graph: ir.Graph, kind: str) -> list[tuple[Mark, list[ir.Node]]]:
    found: dict[Mark, list[ir.Node]] = {}
    for node in graph:
        if kind in node.meta:
            found.setdefault(node.meta[kind], []).append(node)
    return list(found.items())


# --- parts ------------------------------------------------------------------------------------------------------------


def _parts(graph: ir.Graph, nodes: Collection[ir.Node]) -> Iterator[list[ir.Node]]:
    """The nodes in parts that hang together and that no path leaves and enters again: each can be one node."""
    inside = set(nodes)
    left: dict[ir.Node, int] = {}  # how often a path to a node has left the nodes
    leader: dict[ir.Node, ir.Node] = {}

    def first(node: ir.Node) -> ir.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in graph:
        before = [p for p in _sources(node) if p in left]
        left[node] = max((left[p] + (p in inside and node not in inside) for p in before), default=0)
        if node in inside:
            leader[node] = node
            for other in before:
                if other in inside and left[other] == left[node]:
                    leader[first(node)] = first(other)
    parts: dict[ir.Node, list[ir.Node]] = defaultdict(list)
    for node in leader:
        parts[first(node)].append(node)
    yield from parts.values()


def _sources(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes that one reads, also from within its own graphs."""
    for each in _with_inner([node]):
        for value in each.inputs:
            if value is not None and (source := value.producer()) is not None:
                yield source


def _with_inner(nodes: Sequence[ir.Node]) -> Iterator[ir.Node]:
    """Nodes and those of the graphs that they hold."""
    for node in nodes:
        yield node
        for graph in _held(node):
            yield from graph.all_nodes()


def _held(node: ir.Node) -> Iterator[Any]:
    for attribute in node.attributes.values():
        if attribute.type.name == "GRAPH":
            yield attribute.as_graph()
        elif attribute.type.name == "GRAPHS":
            yield from attribute.as_graphs()


# --- functions --------------------------------------------------------------------------------------------------------


class _Functions:
    """Those of one model, by what they compute."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.known: dict[bytes, str] = {}
        self.named: Counter[str] = Counter()
        self.places: Counter[str] = Counter()

    def put(self, graph: ir.Graph, part: list[ir.Node], mark: Mark) -> None:
        """Put a call in the place of the nodes of a part."""
        import onnx_ir as ir

        constants = _own_constants(part)
        given, results = _ends([*constants, *part])
        call = ir.Node(DOMAIN, mark.function, given, num_outputs=len(results))
        _insert(graph, part, call)
        if REWRITE in part[0].meta:
            call.meta[REWRITE] = part[0].meta[REWRITE]
        for value, out in zip(results, call.outputs, strict=True):
            _hand_over(value, out, set(_with_inner(part)))
        graph.remove(part)
        call.op_type = self._function([*constants, *part], given, results, mark)
        call.name = self._place(f"{mark.owner}/{call.op_type}" if mark.owner else call.op_type)
        self.model.opset_imports[DOMAIN] = VERSION

    def _place(self, name: str) -> str:
        number, self.places[name] = self.places[name], self.places[name] + 1
        return f"{name}_{number}" if number else name

    def _function(
        self, part: Sequence[ir.Node], given: Sequence[ir.Value], results: Sequence[ir.Value], mark: Mark
    ) -> str:
        """The name of the function of this body, which is entered if it is new."""
        import onnx_ir as ir
        from onnx_ir import serde

        arguments = {value: ir.Value(name=f"x_{i}") for i, value in enumerate(given)}
        inner = list(_with_inner(part))
        for node in inner:
            for i, value in enumerate(node.inputs):
                if value in arguments:
                    node.replace_input_with(i, arguments[value])
        _name_alike(part)
        used = {n.domain for n in inner}
        opsets = {domain: version for domain, version in self.model.opset_imports.items() if domain in used}
        body = ir.Graph(list(arguments.values()), results, nodes=part, opset_imports=opsets)
        key = serde.serialize_function(ir.Function(DOMAIN, "", graph=body, attributes=[])).SerializeToString(
            deterministic=True
        )
        if key not in self.known:
            number, self.named[mark.function] = self.named[mark.function], self.named[mark.function] + 1
            self.known[key] = f"{mark.function}_{number}" if number else mark.function
            function = ir.Function(DOMAIN, self.known[key], graph=body, attributes=[])
            self.model.functions[function.identifier()] = function
        return self.known[key]


def _ends(part: Sequence[ir.Node]) -> tuple[list[ir.Value], list[ir.Value]]:
    """What nodes read of others, and what others read of them."""
    inner = set(_with_inner(part))
    own = {v for n in part for g in _inner_graphs(n) for v in (*g.inputs, *g.initializers.values())}
    given = dict.fromkeys(
        v for n in _with_inner(part) for v in n.inputs if v is not None and v.producer() not in inner and v not in own
    )
    results = [
        v for n in part for v in n.outputs if v.is_graph_output() or any(user not in inner for user, _ in v.uses())
    ]
    return list(given), results


def _inner_graphs(node: ir.Node) -> Iterator[Any]:
    for graph in _held(node):
        yield graph
        for each in graph:
            yield from _inner_graphs(each)


def _own_constants(part: Sequence[ir.Node]) -> list[ir.Node]:
    """Nodes for the small constants that they read, which are no weights of the model, in the place of these."""
    import onnx_ir as ir

    made: dict[ir.Value, ir.Node] = {}
    for node in _with_inner(part):
        for i, value in enumerate(node.inputs):
            held = None if value is None or value.producer() is not None or WEIGHT in value.meta else value.const_value
            if value is None or held is None or held.nbytes > _SMALL or value.is_graph_input():
                continue
            if value not in made:
                made[value] = ir.node("Constant", [], {"value": ir.Tensor(held.numpy(), name="value")})
                made[value].outputs[0].name = "constant"
            node.replace_input_with(i, made[value].outputs[0])
    return list(made.values())


def _insert(graph: ir.Graph, part: Sequence[ir.Node], call: ir.Node) -> None:
    """Put the call behind the last of its nodes, and what reads them behind the call."""
    inside, later = set(part), dict[Any, None]()
    nodes = list(graph)
    for node in nodes[nodes.index(part[0]) : nodes.index(part[-1])]:
        if node not in inside and any(p in inside or p in later for p in _sources(node)):
            later[node] = None
    graph.insert_after(part[-1], call)
    if later:
        graph.remove(list(later))
        graph.insert_after(call, list(later))


def _hand_over(value: ir.Value, out: ir.Value, inner: Collection[ir.Node]) -> None:
    """Let who reads a value outside of its nodes read a result of the call, by the same name."""
    out.name, out.shape, out.type = value.name, value.shape, value.type
    graph = value.graph
    for node, i in list(value.uses()):
        if node not in inner:
            node.replace_input_with(i, out)
    if value.is_graph_output() and graph is not None:
        for i, each in enumerate(graph.outputs):
            if each is value:
                graph.outputs[i] = out


def _name_alike(part: Sequence[ir.Node]) -> None:
    """Names that say nothing of the place, and shapes neither: equal bodies are to be equal."""
    graphs = [graph for node in part for graph in _inner_graphs(node)]
    for number, graph in enumerate(graphs):
        graph.name = f"graph_{number}"
        for i, value in enumerate(graph.inputs):
            value.name = f"{graph.name}_{i}"
    ends = {value for graph in graphs for value in graph.outputs}
    for number, node in enumerate(_with_inner(part)):
        node.name = f"{node.op_type}_{number}"
        for i, value in enumerate(node.outputs):
            if value.name:
                value.name = f"{node.op_type.lower()}_{number}" + (f"_{i}" if i else "")
            if value not in ends:
                value.shape = None
