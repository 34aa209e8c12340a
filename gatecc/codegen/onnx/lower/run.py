"""run: all lowerings of a target on one program, each behind those that it comes after."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import fx

from gatecc.codegen.onnx.lower.lowering import GRAPH_LOWERINGS, GraphLowering, Subject
from gatecc.codegen.onnx.lower.write import UnwritableError
from gatecc.ir.ops import DROPOUTS, opname
from gatecc.ir.outcome import Outcome


class FailedLoweringError(Exception):
    """A lowering that raised; what it did to the program is not taken back."""

    def __init__(self, lowering: str, cause: Exception) -> None:
        super().__init__(f"{lowering}: {type(cause).__name__}: {cause}")
        self.lowering, self.cause = lowering, cause


def lower_graph(subject: Subject, without: Collection[str] = ()) -> list[Outcome]:
    """Put what is recognised in the program in the form of ONNX nodes, in place; what was done and what was not.

    ``subject.program`` is canonical; its sites are those of the program as it is. Any Program will do: that of a full
    call or that of a decoder's step. The graph is ready for `gatecc.capture.exported.exported_program` afterwards.
    Lowerings of the names ``without`` do not run. Raises FailedLoweringError.
    """
    outcomes: list[Outcome] = []
    for kind in _order():
        if subject.target not in kind.targets or subject.opset < kind.since or kind.name in without:
            continue
        try:
            outcomes += kind().lower(subject)
            subject.program.graph.eliminate_dead_code(_may_stay)
            subject.program.graph.lint()
        except Exception as e:
            raise FailedLoweringError(kind.name, e) from e
    return outcomes


def _may_stay(node: fx.Node) -> bool:
    """Whether a node does something that nobody reads. Attention and dropout would draw numbers, at a rate above 0."""
    if opname(node) == "scaled_dot_product_attention" and node.args[4] == 0.0:
        return False
    return node.is_impure() and not (opname(node) in DROPOUTS and node.args[2] is False)


def _order() -> Iterator[type[GraphLowering]]:
    done: list[str] = []

    def add(name: str) -> None:
        if name in done:
            return
        for earlier in GRAPH_LOWERINGS[name].after:
            add(earlier)
        done.append(name)

    for name in sorted(GRAPH_LOWERINGS):
        add(name)
    return (GRAPH_LOWERINGS[name] for name in done)


__all__ = ["FailedLoweringError", "UnwritableError", "lower_graph"]
