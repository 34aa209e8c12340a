"""Router: a gate over experts. Its spec names what it reads, how that is scored, and how experts are chosen.

``RouterSpec("in", "linear(bias=False)", "softmax_topk(2)")`` is the router of Mixtral. A spec is data, the same in
Python, JSON and text, as a `GateSpec` is.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateModule, GateShape, GateSpec, Ref
from gatecc.ir.gates.choice import Choice, Chosen
from gatecc.ir.gates.init import Init
from gatecc.ir.gates.layout import spread
from gatecc.ir.gates.option import expression
from gatecc.ir.gates.scorer import Scorer
from gatecc.ir.gates.source import Source


@dataclass(frozen=True, init=False)
class RouterSpec:
    """source × scorer × choice × init.

    Each may be given as its object, its text or its JSON. ``source`` is what a gate may read: "in" (the input of an MLP
    or linear site), "cond(task)", "pool(in)", a tuple for a concatenation. Raises ArgumentError.
    """

    source: Source
    scorer: Scorer
    choice: Choice
    init: Init

    def __init__(
        self,
        source: Source | str | tuple[Source | str, ...] | Mapping[str, Any] = "in",
        scorer: Scorer | str | Mapping[str, Any] = "linear(bias=False)",
        choice: Choice | str | Mapping[str, Any] = "softmax_topk(2)",
        init: Init | str | Mapping[str, Any] = "random(0.02)",
    ) -> None:
        values = Source.coerce(source), Scorer.coerce(scorer), Choice.coerce(choice), Init.coerce(init)
        for f, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, f.name, value)
        self.gate  # noqa: B018  # a gate checks that the choices go together

    @property
    def gate(self) -> GateSpec:
        """The gate that yields the logits."""
        return GateSpec(self.source, self.scorer, "expert", "linear", init=self.init)

    @property
    def sources(self) -> tuple[Ref, ...]:
        """The values that the engine must find and hand to the router, in this order."""
        return self.source.refs

    def build(
        self,
        shape: GateShape,
        experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Router:
        """The router among so many experts for a place. Raises ArgumentError if k is larger."""
        return Router(self, shape, experts, device=device, dtype=dtype)

    # -- text and JSON -------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return ", ".join([*map(str, (self.source, self.scorer, self.choice)), f"init={self.init}"])

    @classmethod
    def parse(cls, text: str) -> RouterSpec:
        """The inverse of str: "in, linear(bias=False), softmax_topk(2)"."""
        node = expression(f"router({text})", "router")
        if not isinstance(node, ast.Call) or any(k.arg is None for k in node.keywords):
            raise ArgumentError("cannot read this router", found=repr(text), expected=cls.expected())
        args = [ast.unparse(a) for a in node.args]
        return cls._make(args, {str(k.arg): ast.unparse(k.value) for k in node.keywords})

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {f.name: getattr(self, f.name).to_json() for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RouterSpec:
        """The inverse of to_json; raises ArgumentError for unknown fields."""
        return cls._make([], data)

    @classmethod
    def coerce(cls, value: RouterSpec | str | Mapping[str, Any]) -> RouterSpec:
        """A spec from itself, its text or its JSON."""
        if isinstance(value, RouterSpec):
            return value
        return cls.parse(value) if isinstance(value, str) else cls.from_json(value)

    @classmethod
    def _make(cls, args: list[str], kwargs: Mapping[str, Any]) -> RouterSpec:
        try:
            return cls(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError("cannot read this router", found=str(error), expected=cls.expected()) from None

    @classmethod
    def expected(cls) -> str:
        """How a router is written."""
        return "source, scorer, choice, init="


class Router(GateModule):
    """``forward(value, *sources)`` -> weights (T, k) in float32 and indices (T, k); T counts the positions of value.

    The parameters are those of the scorer, ``weight`` (E, C) for a linear one; buffers are those of the choice.
    """

    def __init__(
        self,
        spec: RouterSpec,
        shape: GateShape,
        experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.slots = spec.choice.slots(experts)
        super().__init__(spec.gate, replace(shape, sizes={**shape.sizes, "e": experts}), device=device, dtype=dtype)
        self.router = spec
        self.experts = experts
        self._state = tuple(made := spec.choice.buffers(experts))
        for name, buffer in made.items():
            self.register_buffer(name, buffer.to(device=device))

    def forward(self, value: Tensor, *given: Tensor | GateShape) -> Chosen:  # pyright: ignore[reportIncompatibleMethodOverride] - a router yields a choice where a gate yields a factor
        logits = self.logits(value, *given)
        return self.router.choice(logits, {name: getattr(self, name) for name in self._state}, self.training)

    def logits(self, value: Tensor, *given: Tensor | GateShape) -> Tensor:
        """Scores (T, E) in float32: softmax and thresholds are decided there whatever the model computes in."""
        sources = [x for x in given if isinstance(x, Tensor)]
        at = next((x for x in given if isinstance(x, GateShape)), self.shape)
        scores = self.score(value, *sources, at=at)
        sizes = {a: value.size(at.axes.index(a)) for a in at.positions}
        return spread(scores, at.positions, sizes).reshape(-1, self.experts).float()

    def extra_repr(self) -> str:
        return f"{self.router}; {self.experts} experts; {self.shape.axes}"


def is_router(module: object) -> bool:
    """Whether a module is a router."""
    return isinstance(cast("Any", module), Router)
