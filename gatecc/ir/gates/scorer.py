"""Scorer: from features (*positions, C) to scores (*positions, F).

A scorer is a pure function of features and named parameters. Its last affine map is always called ``weight`` and
``bias``: init decides these, and a linear gate has nothing else. Text: ``linear``, ``lowrank(16)``, ``mlp(64)``,
``lookup(10)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.layout import Features
from gatecc.ir.gates.option import Option
from gatecc.ir.gates.source import Cond, Param, Source

Shapes = dict[str, tuple[int, ...]]
Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scorer(Option, slot="scorer"):
    """Base of scorers."""

    constant: ClassVar[str] = "bias"  # the parameter that sets the score where ``weight`` contributes nothing
    trained: ClassVar[bool] = True  # by gradient
    reads_integers: ClassVar[bool] = False

    @property
    def mixes_tokens(self) -> bool:
        """Whether the score of a token may depend on later ones."""
        return False

    def accepts(self, source: Source) -> str:
        """What this scorer expects of a source, "" if this one will do."""
        return "a value to read" if isinstance(source, Param) else ""

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        """Names and shapes of the parameters for C channels, F features and these positions."""
        raise NotImplementedError

    def positions(self, at: str) -> str:
        """The positions of the scores, for features at these positions."""
        return at

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        """x: (*positions, C) -> (*positions, F), F being ``features``."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoScorer(Scorer, tag="none"):
    """The source is the score. With source ``param`` the scores are a parameter."""

    constant: ClassVar[str] = "weight"

    def accepts(self, source: Source) -> str:
        return ""

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        return {}

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        return Features(x.x.expand(*[-1] * len(x.at), features), x.at)


@dataclass(frozen=True)
class Linear(Scorer, tag="linear"):
    """W x + b."""

    bias: bool = True

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        return {"weight": (features, channels)} | ({"bias": (features,)} if self.bias else {})

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        return Features(F.linear(x.x, params["weight"], params.get("bias")), x.at)


@dataclass(frozen=True)
class Cosine(Scorer, tag="cosine"):
    """LN(x) · LN(w_f) / sqrt(C): a row of ``weight`` per feature, both standardised without an affine map (PHATGOOSE).

    A new row is added without a change of the others' scores; a row of zeros scores 0.
    """

    constant: ClassVar[str] = "weight"

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        return {"weight": (features, channels)}

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        size = [x.x.size(-1)]
        weight = F.layer_norm(params["weight"], size)
        return Features(F.linear(F.layer_norm(x.x, size), weight) * size[0] ** -0.5, x.at)


@dataclass(frozen=True)
class LowRank(Scorer, tag="lowrank"):
    """W₂ W₁ x + b through r dimensions."""

    r: int

    def check(self) -> None:
        self.require(self.r > 0, "r", "a positive integer")

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        return {"down": (self.r, channels), "weight": (features, self.r), "bias": (features,)}

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        return Features(F.linear(F.linear(x.x, params["down"]), params["weight"], params["bias"]), x.at)


@dataclass(frozen=True)
class MLP(Scorer, tag="mlp"):
    """Hidden layers of one width, one by default."""

    hidden: int
    activation: Literal["relu", "silu", "gelu", "tanh"] = "relu"
    layers: int = 1

    def check(self) -> None:
        self.require(self.hidden > 0, "hidden", "a positive integer")
        self.require(self.layers > 0, "layers", "a positive integer")

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        inner: Shapes = {}
        for name in self._names:
            inner |= {f"{name}_weight": (self.hidden, channels), f"{name}_bias": (self.hidden,)}
            channels = self.hidden
        return inner | {"weight": (features, self.hidden), "bias": (features,)}

    @property
    def _names(self) -> list[str]:
        return ["hidden", *(f"hidden_{layer}" for layer in range(1, self.layers))]

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        act = {"relu": torch.relu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}[self.activation]
        h = x.x
        for name in self._names:
            h = act(F.linear(h, params[f"{name}_weight"], params[f"{name}_bias"]))
        return Features(F.linear(h, params["weight"], params["bias"]), x.at)


@dataclass(frozen=True)
class Attn(Scorer, tag="attn"):
    """Attention pooling: a learned query weighs the tokens, their average is scored. Varies over samples only."""

    def accepts(self, source: Source) -> str:
        return "" if source.tokens else "a source with tokens or pixels"

    @property
    def mixes_tokens(self) -> bool:
        return True

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        if not at.strip("b"):
            raise ArgumentError("attn pools tokens or pixels", found=f"positions {at or 'none'}", expected="bn or byx")
        return {"query": (1, channels), "weight": (features, channels), "bias": (features,)}

    def positions(self, at: str) -> str:
        return "b" * ("b" in at)

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        tokens = x.x.flatten(1, -2) if x.at[0] == "b" else x.x.flatten(0, -2)
        weights = torch.softmax(F.linear(tokens, params["query"]) * tokens.size(-1) ** -0.5, -2)
        pooled = (weights * tokens).sum(-2)
        return Features(F.linear(pooled, params["weight"], params["bias"]), self.positions(x.at))


@dataclass(frozen=True)
class Lookup(Scorer, tag="lookup"):
    """Row i of a table of n, for an integer input i: a task, a step, a modality.

    With ``first_unknown`` row 0 is for what has no row of its own: its scores are 0, and it is not trained.
    """

    constant: ClassVar[str] = "weight"
    reads_integers: ClassVar[bool] = True
    n: int
    first_unknown: bool = False

    def check(self) -> None:
        self.require(self.n > 0, "n", "a positive integer")

    def accepts(self, source: Source) -> str:
        return "" if isinstance(source, Cond) else "an integer input: cond(NAME)"

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        if channels != 1:
            raise ArgumentError(
                "lookup takes one index", found=f"{channels} channels", expected="one integer a position"
            )
        return {"weight": (self.n, features)}

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        index = x.x.squeeze(-1).long()
        found = F.embedding(index, params["weight"])
        return Features(found * (index != 0).unsqueeze(-1) if self.first_unknown else found, x.at)


@dataclass(frozen=True)
class Index(Scorer, tag="index"):
    """1 for feature i and 0 for the others, for an integer input i (a modality, a stream). Nothing is learned.

    Features are counted from ``first``: with 1, all features are 0 for the integer 0.
    """

    constant: ClassVar[str] = ""
    trained: ClassVar[bool] = False
    reads_integers: ClassVar[bool] = True
    first: int = 0

    def accepts(self, source: Source) -> str:
        return "" if isinstance(source, Cond) else "an integer input: cond(NAME)"

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        return {}

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        numbers = torch.arange(self.first, self.first + features, device=x.x.device)
        return Features((x.x.long() == numbers).float(), x.at)


@dataclass(frozen=True)
class Schedule(Scorer, tag="schedule"):
    """DTR's channel window, a function of the timestep t without parameters: scores 1 inside it and 0 outside.

    Of F channels ⌊beta·F⌋ are inside, from round((t / steps)^alpha · (F - ⌊beta·F⌋)) on, so that near timesteps share
    most of their channels. With beta 1 all are always inside.
    """

    constant: ClassVar[str] = ""
    trained: ClassVar[bool] = False
    reads_integers: ClassVar[bool] = True
    beta: float = 0.8
    alpha: float = 4.0
    steps: int = 1000

    def check(self) -> None:
        self.require(0 < self.beta <= 1, "beta", "0 < beta <= 1")
        self.require(self.alpha > 0, "alpha", "a positive number")
        self.require(self.steps > 0, "steps", "a positive integer")

    def accepts(self, source: Source) -> str:
        return "" if isinstance(source, Cond) else "a timestep: cond(NAME)"

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        if int(self.beta * features) < 1:
            raise ArgumentError("the channel window is empty", found=f"beta={self.beta} of {features} channels")
        return {}

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        t, inside = x.x.to(torch.float32), int(self.beta * features)
        start = torch.round((t / self.steps) ** self.alpha * (features - inside))
        offset = torch.arange(features, device=t.device) - start
        return Features(((offset >= 0) & (offset < inside)).to(torch.float32), x.at)


@dataclass(frozen=True)
class LeastSquares(Scorer, tag="lstsq"):
    """W x + b, fitted in closed form by ``GateModule.fit``, never by gradient. ``ridge`` penalises W."""

    trained: ClassVar[bool] = False
    ridge: float = 1e-6

    def check(self) -> None:
        self.require(self.ridge >= 0, "ridge", "a number >= 0")

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        return {"weight": (features, channels), "bias": (features,)}

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        return Features(F.linear(x.x, params["weight"], params["bias"]), x.at)

    def solve(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (F, C) and bias (F,) that minimise |W x + b - z|² + ridge |W|² over rows x: (N, C), z: (N, F)."""
        x64, z64 = x.double(), z.double()
        mean_x, mean_z = x64.mean(0), z64.mean(0)
        x0, z0 = x64 - mean_x, z64 - mean_z
        gram = x0.mT @ x0 + self.ridge * torch.eye(x.size(1), dtype=x64.dtype, device=x.device)
        weight = torch.linalg.lstsq(gram, x0.mT @ z0).solution.mT
        return weight, mean_z - weight @ mean_x


@dataclass(frozen=True)
class RNN(Scorer, tag="rnn"):
    """A GRU or LSTM over the tokens, in their order: the score at a token knows those before it."""

    hidden: int
    cell: Literal["gru", "lstm"] = "gru"

    def check(self) -> None:
        self.require(self.hidden > 0, "hidden", "a positive integer")

    def accepts(self, source: Source) -> str:
        return "" if source.tokens else "a source with tokens"

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        if at != "bn":
            raise ArgumentError("rnn runs over a sequence", found=f"positions {at}", expected="positions bn")
        rows = (3 if self.cell == "gru" else 4) * self.hidden
        cell: Shapes = {"input_weight": (rows, channels), "state_weight": (rows, self.hidden)}
        cell |= {"input_bias": (rows,), "state_bias": (rows,)}
        return cell | {"weight": (features, self.hidden), "bias": (features,)}

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        cell = [params[name] for name in ("input_weight", "state_weight", "input_bias", "state_bias")]
        h, _ = torch.ops.gatecc.rnn(x.x, *cell, self.cell)
        return Features(F.linear(h, params["weight"], params["bias"]), x.at)


@dataclass(frozen=True)
class Conv(Scorer, tag="conv"):
    """A convolution over pixels or tokens, padded to keep their number; kernel 1 mixes channels only."""

    kernel: int = 1

    def check(self) -> None:
        self.require(self.kernel > 0 and self.kernel % 2 == 1, "kernel", "an odd positive integer")

    def accepts(self, source: Source) -> str:
        return "" if source.tokens else "a source with tokens or pixels"

    @property
    def mixes_tokens(self) -> bool:
        return self.kernel > 1

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        if at not in ("bn", "byx"):
            raise ArgumentError(
                "conv runs over tokens or pixels", found=f"positions {at}", expected="positions bn or byx"
            )
        return {"weight": (features, channels, *[self.kernel] * (len(at) - 1)), "bias": (features,)}

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        conv = F.conv2d if x.at == "byx" else F.conv1d
        y = conv(x.x.movedim(-1, 1), params["weight"], params["bias"], padding=self.kernel // 2)
        return Features(y.movedim(1, -1), x.at)
