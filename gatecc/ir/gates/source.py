"""Source: what a gate reads.

A source names values that the engine finds (``refs``), in order; ``read`` turns their tensors into features with the
channels last. Text: ``hidden``, ``self``, ``skip+branch``, ``pool(hidden)``, ``pool(in, kind=max)``,
``cond(timestep)``, ``logits``, ``param``.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.layout import Features, GateShape, SourceShape, align, aligned_positions, channels_last, spread
from gatecc.ir.gates.option import Option


@dataclass(frozen=True)
class Ref:
    """A value that the engine hands to the gate: a stage of the site (``self`` is the gated value), an input of the
    model, a value of another site (a selector), or one of the values that a fusion weighs (its number)."""

    stage: str | None = None
    cond: str | None = None
    at: str | None = None
    index: bool = False  # an integer that says where something is: taken in the dtype that it comes in
    fused: int | None = None

    def __str__(self) -> str:
        if self.stage is not None:
            return self.stage
        if self.fused is not None:
            return f"fused({self.fused})"
        return f"cond({self.cond})" if self.cond is not None else f"at({self.at})"


@dataclass(frozen=True)
class Source(Option, slot="source"):
    """Base of sources. ``shapes`` and ``xs`` are those of ``refs``, in order."""

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The values to read."""
        return ()

    @property
    def tokens(self) -> bool:
        """Whether the features still vary over tokens or pixels."""
        return True

    @property
    def mixes_tokens(self) -> bool:
        """Whether what is read at a token may depend on later ones."""
        return False

    @property
    def parts(self) -> tuple[Source, ...]:
        """The sources that are concatenated."""
        return (self,)

    def channels(self, shapes: Sequence[SourceShape]) -> int:
        """How many features ``read`` yields."""
        return shapes[0].channels

    def positions(self, shape: GateShape, shapes: Sequence[SourceShape]) -> str:
        """The positions that ``read`` yields: a part of the value's."""
        return aligned_positions(shapes[0].axes, shape.axes)

    def read(self, shape: GateShape, shapes: Sequence[SourceShape], value: Tensor, xs: Sequence[Tensor]) -> Features:
        """Features (*positions, C) of the tensors behind ``refs``."""
        return align(channels_last(xs[0], shapes[0].axes, shape.sizes), shape, value)

    @classmethod
    def read_node(cls, node: ast.expr) -> Self:
        """``a + b`` is a concatenation, a name that is no source is a stage."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return cls.coerce((cls.read_node(node.left), cls.read_node(node.right)))
        if isinstance(node, ast.Name) and node.id not in cls.choices:
            return cls.make("stage", (node.id,), {})
        if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a word that Python keeps: 'in'
            return cls.make("stage", (node.value,), {})
        return super().read_node(node)

    @classmethod
    def coerce(cls, value: Any) -> Self:
        """As for every option; a tuple or a list is a concatenation."""
        if isinstance(value, (tuple, list)):
            return cls.make("concat", (tuple(value),), {})
        return super().coerce(value)


@dataclass(frozen=True)
class Stage(Source, tag="stage"):
    """A value of the site: "hidden", "skip", "branch", "in", "scores", ...; "self" is the gated value itself."""

    name: str

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (Ref(stage=self.name),)

    def __str__(self) -> str:
        plain = self.name.isidentifier() and self.name not in self.choices
        return self.name if plain else super().__str__()


@dataclass(frozen=True)
class Cond(Source, tag="cond"):
    """A named input of the model: a timestep (b,), a task (b,), a mask (b, n), an embedding (b, c)."""

    name: str

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (Ref(cond=self.name),)


@dataclass(frozen=True)
class At(Source, tag="at"):
    """A value of another site, by its selector: ``at("activation[audio.*].out")``.

    One source for all gated sites, or as many as there are of these: the k-th reads the k-th.
    """

    selector: str

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (Ref(at=self.selector),)


@dataclass(frozen=True)
class Fused(Source, tag="fused"):
    """One of the values that a fusion weighs, by its number: ``fused(0)+fused(1)``, also of values that are new."""

    index: int

    def check(self) -> None:
        self.require(self.index >= 0, "index", "the number of a value, from 0")

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (Ref(fused=self.index),)


@dataclass(frozen=True)
class Param(Source, tag="param"):
    """Nothing: the gate is a learned constant."""

    @property
    def tokens(self) -> bool:
        return False

    def channels(self, shapes: Sequence[SourceShape]) -> int:
        return 0

    def positions(self, shape: GateShape, shapes: Sequence[SourceShape]) -> str:
        return ""


@dataclass(frozen=True)
class Pool(Source, tag="pool"):
    """The mean or maximum of a source over tokens or space, padding included; what is left varies over samples only.

    A pooled gate lets a token see later ones: it is not causal. With ``stop`` no gradient flows to what is read.
    """

    of: Source
    kind: Literal["mean", "max"] = "mean"
    stop: bool = False

    def check(self) -> None:
        if not isinstance(self.of, (Stage, Cond, At, Fused)):
            raise ArgumentError(
                "pool takes one value",
                found=str(self.of),
                expected="a stage, cond(NAME), at(SELECTOR) or fused(NUMBER); pool(a)+pool(b) for several",
            )

    @property
    def refs(self) -> tuple[Ref, ...]:
        return self.of.refs

    @property
    def tokens(self) -> bool:
        return False

    @property
    def mixes_tokens(self) -> bool:
        return True

    def positions(self, shape: GateShape, shapes: Sequence[SourceShape]) -> str:
        return "b" * ("b" in shapes[0].axes or "g" in shapes[0].axes)

    def read(self, shape: GateShape, shapes: Sequence[SourceShape], value: Tensor, xs: Sequence[Tensor]) -> Features:
        x, at = channels_last(xs[0].detach() if self.stop else xs[0], shapes[0].axes, shape.sizes)
        over = [i for i, a in enumerate(at) if a != "b"]
        if not over:
            return Features(x, at)
        return Features(x.mean(over) if self.kind == "mean" else x.amax(over), "b" * ("b" in at))


@dataclass(frozen=True)
class Token(Source, tag="token"):
    """A source at one token of each sample, whose number is an input of the model: ``token(in, at=prompt_end)``.

    What is left varies over samples only. Tokens before that one see it, so such a gate is not causal for them.
    """

    of: Source
    at: str

    def check(self) -> None:
        if not isinstance(self.of, (Stage, At)):
            raise ArgumentError("token takes one value", found=str(self.of), expected="a stage or at(SELECTOR)")

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (*self.of.refs, Ref(cond=self.at, index=True))

    @property
    def tokens(self) -> bool:
        return False

    @property
    def mixes_tokens(self) -> bool:
        return True

    def positions(self, shape: GateShape, shapes: Sequence[SourceShape]) -> str:
        return "b"

    def read(self, shape: GateShape, shapes: Sequence[SourceShape], value: Tensor, xs: Sequence[Tensor]) -> Features:
        x, at = channels_last(xs[0], shapes[0].axes, shape.sizes)
        if at == "b":  # the model has picked a token already
            return Features(x, at)
        if at not in ("bn", "bm"):
            raise ArgumentError("token reads a sequence", found=f"positions {at}", expected="samples and tokens")
        index = xs[1].long().view(-1, 1, 1).expand(-1, 1, x.size(-1))
        return Features(x.gather(1, index).squeeze(1), "b")


@dataclass(frozen=True)
class LogitStatistics(Source, tag="logits"):
    """Confidence of a logits value, without gradient: largest probability, entropy, margin, entropy of p^power.

    The four inputs of JEI-DNN's exit gates. Entropies are divided by log(classes).
    """

    of: str = "logits"
    power: float = 2.0

    def check(self) -> None:
        self.require(self.power > 0, "power", "a positive number")

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (Ref(stage=self.of),)

    def channels(self, shapes: Sequence[SourceShape]) -> int:
        return 4

    def read(self, shape: GateShape, shapes: Sequence[SourceShape], value: Tensor, xs: Sequence[Tensor]) -> Features:
        z, at = align(channels_last(xs[0].detach(), shapes[0].axes, shape.sizes), shape, value)
        return Features(logit_statistics(z, self.power), at)


@dataclass(frozen=True)
class Concat(Source, tag="concat"):
    """Several sources side by side on the channels; those without tokens are repeated at each."""

    of: tuple[Source, ...]

    def check(self) -> None:
        flat = tuple(part for source in self.of for part in source.parts)
        object.__setattr__(self, "of", flat)
        if len(flat) < 2 or any(isinstance(part, (Param, Token)) for part in flat):
            raise ArgumentError(
                "a concatenation takes two or more values", found=str(self), expected="for example skip+branch"
            )

    def __str__(self) -> str:
        return "+".join(map(str, self.of))

    @property
    def parts(self) -> tuple[Source, ...]:
        return self.of

    @property
    def refs(self) -> tuple[Ref, ...]:
        return tuple(ref for part in self.of for ref in part.refs)

    @property
    def tokens(self) -> bool:
        return any(part.tokens for part in self.of)

    @property
    def mixes_tokens(self) -> bool:
        return any(part.mixes_tokens for part in self.of)

    def channels(self, shapes: Sequence[SourceShape]) -> int:
        return sum(part.channels([s]) for part, s in zip(self.of, shapes, strict=True))

    def positions(self, shape: GateShape, shapes: Sequence[SourceShape]) -> str:
        found = "".join(part.positions(shape, [s]) for part, s in zip(self.of, shapes, strict=True))
        return "".join(sorted(set(found), key=shape.positions.index))

    def read(self, shape: GateShape, shapes: Sequence[SourceShape], value: Tensor, xs: Sequence[Tensor]) -> Features:
        read = [p.read(shape, [s], value, [x]) for p, s, x in zip(self.of, shapes, xs, strict=True)]
        at = self.positions(shape, shapes)
        sizes = {a: f.x.size(i) for f in read for i, a in enumerate(f.at)}
        return Features(torch.cat([spread(f, at, sizes) for f in read], -1), at)


def logit_statistics(z: Tensor, power: float = 2.0) -> Tensor:
    """Largest probability, entropy, margin, entropy of p^power, entropies divided by log(C). z: (..., C) -> (..., 4)"""
    log_p = torch.log_softmax(z, -1)
    powered = torch.log_softmax(z * power, -1)
    top = torch.topk(log_p, 2, -1).values.exp()
    margin = top[..., 0] - top[..., 1]
    return torch.stack((top[..., 0], entropy(log_p), margin, entropy(powered)), -1)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy over log(C). log_p: (..., C) -> (...)"""
    return -(log_p.exp() * log_p).sum(-1) / math.log(log_p.size(-1))
