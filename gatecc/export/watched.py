"""watched: decode.onnx held against the captured step, call by call, to say where a text first goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from gatecc.codegen.onnx.build import Graph
from gatecc.codegen.onnx.runtime import Session
from gatecc.export.carried import Carried
from gatecc.export.locate import first_difference, values
from gatecc.export.steps import Filled
from gatecc.scope.family import difference

_DERIVED = "each step of the file is as in torch: the derived decoder itself is at fault"


class Watched(Filled):
    """A session that compares what each call gives with what the captured step does, up to the first that differs by
    more than ``limit``. ``told`` then says by which node."""

    def __init__(self, session: Session, unread: Sequence[Carried], graph: Graph, path: Path, limit: float) -> None:
        super().__init__(session, unread)
        self._graph, self._path, self._limit = graph, path, limit
        self.told = _DERIVED

    def run(self, names: Sequence[str], leaves: Sequence[Tensor]) -> list[Tensor]:
        found = super().run(names, leaves)
        if self.told == _DERIVED and self._differs(leaves, found):
            self.told = first_difference(self._graph, self._path, *self.fed(names, leaves))
        return found

    def _differs(self, leaves: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
        _, expected = values(self._graph, leaves)
        return any(not difference(x.cpu(), y) <= self._limit for x, y in zip(expected, found, strict=True))
