"""Rules: which choices of a gate go together, and which gates can stand where."""

from __future__ import annotations

from typing import Protocol

import torch

from gatecc.errors import ArgumentError
from gatecc.ir.gates.activation import Activation, Linear, Start
from gatecc.ir.gates.estimator import Estimator, Reinforce, Supervised
from gatecc.ir.gates.granularity import Granularity
from gatecc.ir.gates.init import First, Identity, Init, Reuse
from gatecc.ir.gates.layout import GateShape
from gatecc.ir.gates.scorer import NoScorer, Schedule, Scorer
from gatecc.ir.gates.source import Cond, Param, Ref, Source, Stage


class Choices(Protocol):
    """What is chosen of a gate: a `GateSpec`, which asks these rules while it is made."""

    @property
    def source(self) -> Source: ...
    @property
    def sources(self) -> tuple[Ref, ...]: ...
    @property
    def scorer(self) -> Scorer: ...
    @property
    def granularity(self) -> Granularity: ...
    @property
    def activation(self) -> Activation: ...
    @property
    def estimator(self) -> Estimator: ...
    @property
    def init(self) -> Init: ...
    @property
    def fuse_into(self) -> str | None: ...


def check(spec: Choices) -> None:
    """Raise ArgumentError for choices that do not go together."""
    if isinstance(spec.source, Param) and not isinstance(spec.scorer, NoScorer):
        raise _clash(spec, "a learned constant has no scorer", "scorer=none")
    if expected := spec.scorer.accepts(spec.source):
        raise _clash(spec, f"scorer {spec.scorer} cannot read {spec.source}", expected)
    if isinstance(spec.scorer, Schedule) and not isinstance(spec.activation, Linear):
        raise _clash(spec, "a schedule yields the gate itself", "activation=linear")
    _check_granularity(spec)
    _check_estimator(spec)
    _check_init(spec)
    if spec.fuse_into and (spec.scorer.tag != "linear" or not isinstance(spec.source, Stage)):
        raise _clash(spec, "only a linear gate of one stage can share another linear's matrix", "scorer=linear")
    if spec.fuse_into and isinstance(spec.init, Reuse):
        raise _clash(spec, "rows in another linear's matrix start as rows, not as a copy of a weight", "another init")


def _check_granularity(spec: Choices) -> None:
    constant = isinstance(spec.source, Param)
    if spec.activation.many and spec.granularity.one:
        raise _clash(
            spec, f"{spec.activation} of one number is constant", "granularity head, channel, element or expert"
        )
    if constant and spec.activation.tag == "sinkhorn":
        raise _clash(spec, "sinkhorn balances positions, and a learned constant has one", "a value to read")
    if "sample" not in spec.granularity.names:
        return
    varies = any(part.tokens and not isinstance(part, Cond) for part in spec.source.parts)
    if constant or (varies and not _pools(spec)):
        raise _clash(spec, "one gate per sample needs a source that varies over samples only", "pool(...), cond(NAME)")


def _pools(spec: Choices) -> bool:
    return spec.scorer.tag == "attn" or spec.source.tag == "logits"


def _check_estimator(spec: Choices) -> None:
    estimator, activation = spec.estimator, spec.activation
    if estimator.binary and activation.logit(torch.zeros(1)) is None and not (estimator.one_hot and activation.many):
        accepted = "sigmoid, threshold" + ", softmax" * estimator.one_hot
        raise _clash(spec, f"estimator {estimator} needs the probability of a unit", f"activation {accepted}")
    if isinstance(estimator, Reinforce) and isinstance(spec.source, Param):
        raise _clash(spec, "reinforce needs gates that differ between samples", "a value to read")
    if isinstance(estimator, Supervised) and (spec.granularity.one or "expert" in spec.granularity.names):
        raise _clash(spec, "labels choose among features of the value", "granularity head, channel or element")
    if activation.binary and not estimator.binary and estimator.trained and spec.scorer.trained:
        raise _clash(
            spec, f"{activation} has no gradient", "estimator=st, supervised, reinforce, gumbel, times_smooth or frozen"
        )


def _check_init(spec: Choices) -> None:
    if isinstance(spec.init, Reuse) and spec.scorer.tag not in ("linear", "conv", "lookup"):
        raise _clash(spec, f"scorer {spec.scorer} has no weight to copy into", "scorer=linear, conv or lookup")
    biased = spec.scorer.tag in ("none", "lookup") or (
        spec.scorer.constant == "bias" and getattr(spec.scorer, "bias", 1)
    )
    if isinstance(spec.init, First) and not biased:
        raise _clash(spec, "the first feature is preferred by a bias", "a scorer that has one")
    if not isinstance(spec.init, Identity) or isinstance(spec.scorer, Schedule):
        return
    at = start(spec)
    if at is None:
        raise _clash(spec, f"{spec.activation} cannot start at 1", "init=zero, uniform, random(std) or reuse(NAME)")
    if at.score and not getattr(spec.scorer, "bias", True):
        raise _clash(spec, f"{spec.activation} starts at 1 through its bias", "scorer=linear with its bias")
    if isinstance(spec.scorer, NoScorer) and not isinstance(spec.source, Param):
        raise _clash(spec, "a gate without parameters starts where its source is", "init=zero")


def start(spec: Choices) -> Start | None:
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


def check_place(spec: Choices, shape: GateShape, width: int) -> None:
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
        raise ArgumentError("one gate per sample", found=f"a source that varies over {at}", expected="pool(...)")
    if isinstance(spec.estimator, Reinforce) and at[:1] != "b":
        raise ArgumentError("reinforce needs gates that differ between samples", found=f"positions {at or 'none'}")
    channels = spec.source.channels(shape.sources)
    if isinstance(spec.scorer, NoScorer) and channels not in (1, width):
        raise ArgumentError(
            "scorer none takes the source as it is", found=f"{channels} channels", expected=f"1 or {width}"
        )


def _clash(spec: Choices, what: str, expected: str) -> ArgumentError:
    return ArgumentError(what, found=str(spec), expected=expected)
