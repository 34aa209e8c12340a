"""Gate: a spec of six choices, and the module that it builds for a place in a graph.

``GateSpec("hidden", "linear", "head", "sigmoid")`` is Gated Attention's headwise gate. A spec is data: hashable, comparable,
the same in Python, JSON and text. ``spec.build(shape)`` makes the module once the place is known; what the module reads
is ``spec.sources``, in that order.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ir.contract import Contract, changes_function, exact, identity_at_init
from gatecc.ir.gates.activation import Activation, Start
from gatecc.ir.gates.estimator import Estimator
from gatecc.ir.gates.granularity import Granularity
from gatecc.ir.gates.init import Identity, Init, Reuse, fill_inner
from gatecc.ir.gates.layout import Features, GateShape, SourceShape, channels_last, emit, features, width
from gatecc.ir.gates.option import expression
from gatecc.ir.gates.scorer import LeastSquares, NoScorer, Schedule, Scorer
from gatecc.ir.gates.source import Cond, Param, Ref, Source, Stage

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
        check(self)

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
        from gatecc.ir.gates.scorer import Attn, Conv
        from gatecc.ir.gates.source import Pool

        pooled = any(isinstance(part, Pool) for part in self.source.parts)
        return pooled or isinstance(self.scorer, Attn) or (isinstance(self.scorer, Conv) and self.scorer.kernel > 1)

    @property
    def start(self) -> Start | None:
        """The activation and the score at which the gate begins at 1, None if its init does not mean to."""
        return start(self)

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

    Shapes for value "bhnd" and source "bnc": granularity head gives (b, h, n, 1), element (b, h, n, d), token (b, 1, n, 1).
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
        self._names: tuple[str, ...] = ()
        self._make(device, dtype)
        self.reset()

    # -- making --------------------------------------------------------------------------------------------------------

    def _make(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        for name, size in self._parameter_shapes().items():
            if name == "window":  # the schedule's channel numbers: a buffer, so that it moves with the module
                self.register_buffer(
                    name, torch.arange(size[0], device=device, dtype=dtype or torch.get_default_dtype())
                )
                continue
            empty = torch.empty(size, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=self.spec.trainable))
            self._names += (name,)
        for name, buffer in self.spec.estimator.buffers().items():
            self.register_buffer(name, buffer.to(device=device), persistent=False)

    def _parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        spec, shape = self.spec, self.shape
        check_place(spec, shape, self.width)
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

    def forward(self, value: Tensor, *sources: Tensor) -> Tensor:
        """value: axes ``shape.axes``; one tensor for each of ``spec.sources``."""
        return self.from_scores(value, self.score(value, *sources))

    def score(self, value: Tensor, *sources: Tensor) -> Features:
        """Scores (*positions, F)."""
        if isinstance(self.spec.source, Param):
            at = self.spec.granularity.positions(self.shape)
            self._check_places(value, at)
            return Features(self.get_parameter("weight"), at)
        tensors = [self._cast(x, ref) for x, ref in zip(sources, self.spec.sources, strict=True)]
        read = self.spec.source.read(self.shape, self.shape.sources, value, tensors)
        names = self._names or (("window",) if isinstance(self.spec.scorer, Schedule) else ())
        return self.spec.scorer(read, {name: getattr(self, name) for name in names})

    def from_scores(self, value: Tensor, scores: Features) -> Tensor:
        """Gates from scores, for an engine that computes the scores elsewhere (``fuse_into``)."""
        z = scores.x
        gates = self._sample(value, scores) if self.training else self.spec.estimator.decide(z, self.activation)
        return emit(Features(gates, scores.at), self.features, self.shape, value).to(value.dtype)

    def _sample(self, value: Tensor, scores: Features) -> Tensor:
        buffers = {name: getattr(self, name) for name in self.spec.estimator.buffers()}
        return self.spec.estimator.sample(scores.x, self.activation, buffers, lambda: self._response(value, scores.at))

    def _response(self, value: Tensor, at: str) -> Tensor:
        """The mass |value| of each gated feature at the gate's positions: (*at, F)."""
        x, places = channels_last(value.abs(), self.shape.axes, self.shape.sizes)
        if over := [i for i, a in enumerate(places) if a not in at]:
            x = x.sum(over)
        if self.features == features(self.shape.axes):
            return x
        return x.unflatten(-1, (self.width, -1)).sum(-1)

    def _cast(self, x: Tensor, ref: Ref) -> Tensor:
        """Inputs of the model (a timestep, a mask) come in dtypes of their own."""
        if ref.cond is None or not self._names or self.spec.scorer.constant == "weight":
            return x
        return x.to(self.get_parameter("weight").dtype)

    def _check_places(self, value: Tensor, at: str) -> None:
        """Parameters for each token would broadcast in silence over a value of one token."""
        for a in at:
            if a in self.shape.axes:
                torch._check(value.size(self.shape.axes.index(a)) == self.shape.sizes[a])

    def extra_repr(self) -> str:
        return f"{self.spec}; {self.shape.axes}"


# -- which choices go together ---------------------------------------------------------------------------------------------


def check(spec: GateSpec) -> None:
    """Raise ArgumentError for choices that do not go together."""
    if isinstance(spec.source, Param) != isinstance(spec.scorer, NoScorer) and isinstance(spec.source, Param):
        raise _clash(spec, "a learned constant has no scorer", "scorer=none")
    if expected := spec.scorer.accepts(spec.source):
        raise _clash(spec, f"scorer {spec.scorer} cannot read {spec.source}", expected)
    _check_granularity(spec)
    _check_estimator(spec)
    _check_init(spec)
    if spec.fuse_into and (spec.scorer.tag != "linear" or not isinstance(spec.source, Stage)):
        raise _clash(spec, "only a linear gate of one stage can share another linear's matrix", "scorer=linear")


def _check_granularity(spec: GateSpec) -> None:
    constant = isinstance(spec.source, Param)
    if spec.activation.many and spec.granularity.one:
        raise _clash(
            spec, f"{spec.activation} of one number is constant", "granularity head, channel, element or expert"
        )
    if "sample" not in spec.granularity.names:
        return
    if constant or (spec.source.tokens and not _pools(spec) and not isinstance(spec.source, Cond)):
        raise _clash(spec, "one gate a sample needs a source that varies over samples only", "pool(...), cond(NAME)")


def _pools(spec: GateSpec) -> bool:
    return spec.scorer.tag == "attn" or spec.source.tag == "logits"


def _check_estimator(spec: GateSpec) -> None:
    estimator, activation = spec.estimator, spec.activation
    if estimator.binary and activation.logit(torch.zeros(1)) is None and not (estimator.one_hot and activation.many):
        accepted = "sigmoid, threshold" + ", softmax" * estimator.one_hot
        raise _clash(spec, f"estimator {estimator} needs the probability of a unit", f"activation {accepted}")
    if activation.binary and not estimator.binary and estimator.trained and spec.scorer.trained:
        raise _clash(
            spec, f"{activation} has no gradient", "estimator=st, supervised, reinforce, gumbel, times_smooth or frozen"
        )


def _check_init(spec: GateSpec) -> None:
    if isinstance(spec.init, Reuse) and spec.scorer.tag not in ("linear", "conv", "lookup"):
        raise _clash(spec, f"scorer {spec.scorer} has no weight to copy into", "scorer=linear, conv or lookup")
    if not isinstance(spec.init, Identity) or isinstance(spec.scorer, Schedule):
        return
    at = start(spec)
    if at is None:
        raise _clash(spec, f"{spec.activation} cannot start at 1", "init=zero, uniform, random(std) or reuse(NAME)")
    if at.score and not getattr(spec.scorer, "bias", True):
        raise _clash(spec, f"{spec.activation} starts at 1 through its bias", "scorer=linear with its bias")
    if isinstance(spec.scorer, NoScorer) and not isinstance(spec.source, Param):
        raise _clash(spec, "a gate without parameters starts where its source is", "init=zero")


def start(spec: GateSpec) -> Start | None:
    """See GateSpec.start."""
    if not isinstance(spec.init, Identity) or isinstance(spec.scorer, Schedule):
        return None
    if spec.estimator.binary:  # the probability of being on is near 1; it must stay a probability
        return None if spec.activation.many else Start(spec.activation, spec.init.bias)
    if spec.init.how == "auto":
        return spec.activation.identity(spec.init.bias)
    if spec.activation.tag != "sigmoid":
        return None
    return Start(spec.activation, 0.0 if spec.init.how == "fold" else spec.init.bias)


def check_place(spec: GateSpec, shape: GateShape, width: int) -> None:
    """Raise ArgumentError if a gate cannot stand at a place."""
    if len(shape.sources) != len(spec.sources):
        raise ArgumentError(
            "the gate reads another number of sources",
            found=f"{len(shape.sources)}",
            expected=f"{[*map(str, spec.sources)]}",
        )
    if isinstance(spec.source, Param):
        return
    source_at = spec.source.positions(shape, shape.sources)
    at = spec.scorer.positions(source_at)
    if set(at) - set(shape.positions):
        raise ArgumentError("the source varies over an axis that the value lacks", found=at, expected=shape.positions)
    if missing := set(spec.granularity.positions(shape)) - set(at):
        raise ArgumentError(
            f"a gate a {spec.granularity} needs a source that varies over {''.join(sorted(missing))}",
            found=f"{spec.source}, which varies over {at or 'nothing'}",
            expected="a source that is not pooled",
        )
    if "sample" in spec.granularity.names and at not in ("b", ""):
        raise ArgumentError("one gate a sample", found=f"a source that varies over {at}", expected="pool(...)")
    channels = spec.source.channels(shape.sources)
    if isinstance(spec.scorer, NoScorer) and channels not in (1, width):
        raise ArgumentError(
            "scorer none takes the source as it is", found=f"{channels} channels", expected=f"1 or {width}"
        )


def _clash(spec: GateSpec, what: str, expected: str) -> ArgumentError:
    return ArgumentError(what, found=str(spec), expected=expected)
