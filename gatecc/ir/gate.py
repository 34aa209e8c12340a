"""Gate: a spec of six choices, and the module that it builds for a place in a graph.

``GateSpec("hidden", "linear", "head", "sigmoid")`` is Gated Attention's headwise gate. A spec is data: hashable,
comparable, the same in Python, JSON and text. ``spec.build(shape)`` makes the module once the place is known; what the
module reads is ``spec.sources``, in that order.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ir.contract import Contract, changes_function, exact, identity_at_init
from gatecc.ir.gates import hashing as hashing  # its scorers, by name
from gatecc.ir.gates import linear_by as linear_by
from gatecc.ir.gates import rules
from gatecc.ir.gates.activation import Activation, Start
from gatecc.ir.gates.estimator import Estimator
from gatecc.ir.gates.granularity import Granularity
from gatecc.ir.gates.init import Identity, Init, fill_inner
from gatecc.ir.gates.layout import Features, GateShape, SourceShape, channels_last, emit, width
from gatecc.ir.gates.option import expression
from gatecc.ir.gates.scorer import LeastSquares, Schedule, Scorer
from gatecc.ir.gates.source import Param, Ref, Source

__all__ = ["GateModule", "GateShape", "GateSpec", "Ref", "SourceShape"]


@dataclass(frozen=True, init=False)
class GateSpec:
    """source × scorer × granularity × activation × estimator × init.

    Each may be given as its object, its text ("softmax(T=2)") or its JSON; a tuple of sources is their concatenation.
    ``fuse_into`` names the linear whose matrix should hold the gate's rows ("q"); the engine does it.

    Raises ArgumentError for choices that do not go together, with what would.
    """

    source: Source
    scorer: Scorer
    granularity: Granularity
    activation: Activation
    estimator: Estimator
    init: Init
    fuse_into: str | None

    def __init__(
        self,
        source: Source | str | tuple[Source | str, ...] | Mapping[str, Any],
        scorer: Scorer | str | Mapping[str, Any] = "linear",
        granularity: Granularity | str = "element",
        activation: Activation | str | Mapping[str, Any] = "sigmoid",
        estimator: Estimator | str | Mapping[str, Any] = "exact",
        init: Init | str | Mapping[str, Any] = "identity",
        fuse_into: str | None = None,
    ) -> None:
        values = (
            Source.coerce(source),
            Scorer.coerce(scorer),
            Granularity.coerce(granularity),
            Activation.coerce(activation),
            Estimator.coerce(estimator),
            Init.coerce(init),
            fuse_into,
        )
        for f, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, f.name, value)
        rules.check(self)

    @property
    def sources(self) -> tuple[Ref, ...]:
        """The values that the engine must find and hand to the gate, in this order."""
        return self.source.refs

    @property
    def trainable(self) -> bool:
        """Whether the gate has parameters that gradients train."""
        return self.scorer.trained and self.estimator.trained

    @property
    def mixes_tokens(self) -> bool:
        """Whether a gate may depend on later tokens: a gate that pools is not causal."""
        return self.source.mixes_tokens or self.scorer.mixes_tokens

    @property
    def start(self) -> Start | None:
        """The activation and the score at which the gate begins at 1, None if its init does not mean to."""
        return rules.start(self)

    @property
    def fold_factor(self) -> float:
        """What the weight of the next linear must be multiplied by: 2 for a plain σ folded, else 1."""
        return 2.0 if isinstance(self.init, Identity) and self.init.how == "fold" else 1.0

    @property
    def residual(self) -> float:
        """|gate - 1| at init and in eval, ``fold_factor`` included, for a gate whose init is identity."""
        if (at := self.start) is None:
            raise ArgumentError("the gate does not start at 1", found=f"init={self.init}", expected="init=identity")
        z = torch.full((2,), at.score)
        return float((self.estimator.decide(z, at.activation) * self.fold_factor - 1).abs().max())

    def contract(self) -> Contract:
        """Identity at init with its residual, exact if every gate is always 1, else a change of the function."""
        if isinstance(self.scorer, Schedule):
            return exact() if self.scorer.beta == 1 else changes_function()
        return changes_function() if self.start is None else identity_at_init(self.residual)

    def build(
        self, shape: GateShape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GateModule:
        """The gate for a place; raises ArgumentError if the place lacks an axis or a size that the gate needs."""
        return GateModule(self, shape, device=device, dtype=dtype)

    # -- text and JSON -------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        first = (self.source, self.scorer, self.granularity, self.activation)
        rows = [str(value) for value in first]
        rows += [f"estimator={self.estimator}"] if str(self.estimator) != "exact" else []
        rows += [f"init={self.init}"] if str(self.init) != "identity" else []
        rows += [f"fuse_into={self.fuse_into}"] if self.fuse_into else []
        return ", ".join(rows)

    @classmethod
    def parse(cls, text: str) -> GateSpec:
        """The inverse of str: "hidden, linear, head, sigmoid, init=identity(how=fold)"."""
        node = expression(f"gate({text})", "gate")
        if not isinstance(node, ast.Call) or any(k.arg is None for k in node.keywords):
            raise ArgumentError("cannot read this gate", found=repr(text), expected=cls.expected())
        args = [ast.unparse(a) for a in node.args]
        return cls._make(args, {str(k.arg): ast.unparse(k.value) for k in node.keywords})

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.to_json() if hasattr(v, "to_json") else v and str(v) for k, v in options.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GateSpec:
        """The inverse of to_json; raises ArgumentError for unknown fields."""
        return cls._make([], data)

    @classmethod
    def coerce(cls, value: GateSpec | str | Mapping[str, Any]) -> GateSpec:
        """A spec from itself, its text or its JSON."""
        if isinstance(value, GateSpec):
            return value
        return cls.parse(value) if isinstance(value, str) else cls.from_json(value)

    @classmethod
    def _make(cls, args: list[str], kwargs: Mapping[str, Any]) -> GateSpec:
        try:
            return cls(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError("cannot read this gate", found=str(error), expected=cls.expected()) from None

    @classmethod
    def expected(cls) -> str:
        """How a gate is written."""
        return "source, scorer, granularity, activation, estimator=, init=, fuse_into="


class GateModule(nn.Module):
    """A gate at a place. ``forward(value, *sources)`` yields what to multiply ``value`` by, broadcastable to it.

    For value "bhnd" and source "bnc", granularity head gives (b, h, n, 1), element (b, h, n, d), token (b, 1, n, 1).
    The parameters are those of the scorer: ``weight`` and ``bias`` for a linear one.
    """

    def __init__(
        self,
        spec: GateSpec,
        shape: GateShape,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.shape = shape
        self.features = spec.granularity.features(shape)
        self.width = width(self.features, shape)
        self.activation = spec.activation if spec.start is None else spec.start.activation
        self._names = self._make(device, dtype)
        self._buffer_names = tuple(spec.estimator.buffers())
        self.reset()

    # -- making --------------------------------------------------------------------------------------------------------

    def _make(self, device: torch.device | str | None, dtype: torch.dtype | None) -> tuple[str, ...]:
        shapes = self._parameter_shapes()
        for name, size in shapes.items():
            empty = torch.empty(size, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=self.spec.trainable))
        for name, buffer in self.spec.estimator.buffers().items():
            self.register_buffer(name, buffer.to(device=device), persistent=False)
        return tuple(shapes)

    def _parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        spec, shape = self.spec, self.shape
        rules.check_place(spec, shape, self.width)
        if isinstance(spec.source, Param):
            at = spec.granularity.positions(shape)
            return {
                "weight": (*shape.size(at, f"a fixed size: parameters vary over it ({spec.granularity})"), self.width)
            }
        at = spec.source.positions(shape, shape.sources)
        return spec.scorer.shapes(spec.source.channels(shape.sources), self.width, at)

    @torch.no_grad()
    def reset(self) -> None:
        """Write the initial parameters."""
        params = {name: getattr(self, name) for name in self._names}
        if not params:
            return
        fill_inner(params)
        start = self.spec.start
        self.spec.init.fill(params, start.score if start else 0.0, self.spec.scorer.constant)

    @torch.no_grad()
    def reuse(self, weight: Tensor) -> None:
        """Copy a weight of the model into the scorer (init=reuse(NAME)); raises ArgumentError if its shape differs."""
        mine: Tensor = self.get_parameter("weight")
        if weight.shape != mine.shape:
            raise ArgumentError(
                "the weight to reuse has another shape",
                found=f"{tuple(weight.shape)}",
                expected=f"{tuple(mine.shape)}",
            )
        mine.copy_(weight)

    @torch.no_grad()
    def fit(self, target: Tensor, value: Tensor, *sources: Tensor) -> None:
        """Fit a least-squares scorer in closed form. target: (*positions, F), the scores that it should give."""
        scorer = self.spec.scorer
        if not isinstance(scorer, LeastSquares):
            raise ArgumentError("only lstsq is fitted in closed form", found=str(scorer), expected="scorer=lstsq")
        x = self.spec.source.read(self.shape, self.shape.sources, value, sources).x
        weight, bias = scorer.solve(x.flatten(0, -2), target.reshape(-1, self.width))
        self.get_parameter("weight").copy_(weight)
        self.get_parameter("bias").copy_(bias)

    # -- running -------------------------------------------------------------------------------------------------------

    def forward(self, value: Tensor, *given: Tensor | GateShape) -> Tensor:
        """value: axes ``shape.axes``; one tensor for each of ``spec.sources``.

        A shape behind them says how this call is laid out, where it is not as it was when the gate was made: attention
        that also returns its weights is spelled in another way.
        """
        sources = [x for x in given if isinstance(x, Tensor)]
        at = next((x for x in given if isinstance(x, GateShape)), self.shape)
        return self.from_scores(value, self.score(value, *sources, at=at), at)

    def score(self, value: Tensor, *sources: Tensor, at: GateShape | None = None) -> Features:
        """Scores (*positions, F)."""
        shape = at or self.shape
        if isinstance(self.spec.source, Param):
            places = self.spec.granularity.positions(shape)
            self._check_places(value, places, shape)
            return Features(cast("Tensor", self.weight), places)
        tensors = [self._cast(x, ref) for x, ref in zip(sources, self.spec.sources, strict=True)]
        read = self.spec.source.read(shape, shape.sources, value, tensors)
        return self.spec.scorer(read, {name: getattr(self, name) for name in self._names}, self.width)

    def from_scores(self, value: Tensor, scores: Features, at: GateShape | None = None) -> Tensor:
        """Gates from scores, for an engine that computes the scores elsewhere (``fuse_into``)."""
        shape = at or self.shape
        if self.training:
            gates = self._sample(value, scores, shape)
        else:
            gates = self.spec.estimator.decide(scores.x, self.activation)
        laid = emit(Features(gates, scores.at), self.spec.granularity.features(shape), shape, value)
        return laid if laid.dtype == value.dtype else laid.to(value.dtype)

    def _sample(self, value: Tensor, scores: Features, shape: GateShape) -> Tensor:
        buffers = {name: getattr(self, name) for name in self._buffer_names}
        return self.spec.estimator.sample(
            scores.x, self.activation, buffers, lambda: self._response(value, scores.at, shape)
        )

    def _response(self, value: Tensor, at: str, shape: GateShape) -> Tensor:
        """The mass |value| of each gated feature at the gate's positions: (*at, F)."""
        x, places = channels_last(value.abs(), shape.axes, shape.sizes)
        if over := [i for i, a in enumerate(places) if a not in at]:
            x = x.sum(over)
        if self.spec.granularity.features(shape) == shape.axes.features.text:
            return x
        return x.unflatten(-1, (self.width, -1)).sum(-1)

    def _cast(self, x: Tensor, ref: Ref) -> Tensor:
        """What is read in the dtype of the parameters, unless autocast casts both.

        Inputs of the model (a timestep, a mask) come in dtypes of their own, and so do values of mixed models.
        """
        if not self._names or self.spec.scorer.reads_integers or ref.index:
            return x
        dtype = getattr(self, self._names[0]).dtype  # functional_call puts plain tensors in the place of parameters
        own = x.dtype == dtype or (ref.cond is None and torch.is_autocast_enabled(x.device.type))
        return x if own or (ref.cond is None and not x.is_floating_point()) else x.to(dtype)

    def _check_places(self, value: Tensor, at: str, shape: GateShape) -> None:
        """Parameters for each token would broadcast in silence over a value of one token."""
        for a in at:
            if a in shape.axes:
                torch._check(value.size(shape.axes.index(a)) == self.shape.sizes[a])

    def extra_repr(self) -> str:
        return f"{self.spec}; {self.shape.axes}"
