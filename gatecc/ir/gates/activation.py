"""Activation: from scores z (..., F) to gates.

Text: ``sigmoid``, ``sigmoid(scale=2)``, ``1+tanh``, ``softmax(T=2)``, ``topk(4, renorm=False)``, ``logsigmoid(16)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.option import Option
from gatecc.ir.gates.sinkhorn import transport_plan


class Start(NamedTuple):
    """How a gate begins at 1: an activation (its scale adapted) and the score at which it does."""

    activation: Activation
    score: float


@dataclass(frozen=True)
class Activation(Option, slot="activation"):
    """Base of activations."""

    many: ClassVar[bool] = False  # normalises over the features, so that one feature makes no sense
    binary: ClassVar[bool] = False  # yields 0 and 1, without gradient

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        """z: (..., F) -> gates of the same shape."""
        raise NotImplementedError

    def identity(self, bias: float) -> Start | None:
        """The start at 1. An activation that reaches 1 only in the limit starts at the score ``bias``; None: never."""
        del bias
        return None

    def logit(self, z: Tensor) -> Tensor | None:
        """The logit of the probability that a unit is on; None if the activation is no probability."""
        del z
        return None

    @property
    def cut(self) -> float:
        """The probability above which a unit is on."""
        return 0.5


@dataclass(frozen=True)
class Sigmoid(Activation, tag="sigmoid"):
    """scale · σ(slope · z + bias)."""

    scale: float = 1.0
    bias: float = 0.0
    slope: float = 1.0

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        return _scaled(torch.sigmoid(_affine(z, self.slope, self.bias)), self.scale)

    def identity(self, bias: float) -> Start:
        """2σ(0) is exactly 1; a bias of one's own is kept, with its residual."""
        del bias
        return Start(self if self.bias else replace(self, scale=2.0), 0.0)

    def logit(self, z: Tensor) -> Tensor | None:
        return _affine(z, self.slope, self.bias) if self.scale == 1.0 else None


@dataclass(frozen=True)
class Tanh(Activation, tag="tanh"):
    """scale · tanh(z)."""

    scale: float = 1.0

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        return _scaled(torch.tanh(z), self.scale)

    def identity(self, bias: float) -> Start:
        return Start(self, bias)


@dataclass(frozen=True)
class OnePlusTanh(Activation, tag="one_plus_tanh"):
    """1 + tanh(z): between 0 and 2, and exactly 1 at 0."""

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        return 1.0 + torch.tanh(z)

    def identity(self, bias: float) -> Start:
        return Start(self, 0.0)


@dataclass(frozen=True)
class Linear(Activation, tag="linear"):
    """z itself."""

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        return z

    def identity(self, bias: float) -> Start:
        return Start(self, 1.0)


@dataclass(frozen=True)
class Relu(Activation, tag="relu"):
    """max(z, 0)."""

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        return F.relu(z)

    def identity(self, bias: float) -> Start:
        return Start(self, 1.0)


@dataclass(frozen=True)
class Silu(Activation, tag="silu"):
    """z · σ(z), the gate of GLA's output."""

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        return F.silu(z)


@dataclass(frozen=True)
class Gelu(Activation, tag="gelu"):
    """z · Φ(z)."""

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        return F.gelu(z)


@dataclass(frozen=True)
class Decay(Activation, tag="decay"):
    """exp(-c · softplus(z)): a rate in (0, 1), as in HRPO and Griffin (c = 8)."""

    c: float = 8.0

    def check(self) -> None:
        self.require(self.c > 0, "c", "a positive number")

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        return torch.exp(-self.c * F.softplus(z))

    def identity(self, bias: float) -> Start:
        return Start(self, -bias)


@dataclass(frozen=True)
class LogSigmoid(Activation, tag="logsigmoid"):
    """exp(logsigmoid(z) / divisor), the decay of GLA (divisor 16); with ``log`` its logarithm, as in Liger."""

    divisor: float
    log: bool = False

    def check(self) -> None:
        self.require(self.divisor > 0, "divisor", "a positive number")

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        y = F.logsigmoid(z) / self.divisor
        return y if self.log else torch.exp(y)

    def identity(self, bias: float) -> Start | None:
        return None if self.log else Start(self, bias)


@dataclass(frozen=True)
class Softmax(Activation, tag="softmax"):
    """scale · softmax(pre_activation(z) / T) over the features of a position.

    ``scale="size"`` multiplies by their number, so that equal scores give exactly 1 (the feature gate of TSMixer).
    Squashing the scores first restores polynomial rates of estimation (temperature in softmax Gaussian MoE, paper 18).
    """

    many: ClassVar[bool] = True
    T: float = 1.0
    scale: float | Literal["size"] = 1.0
    pre_activation: Literal["none", "tanh", "sigmoid", "gelu"] = "none"

    def check(self) -> None:
        self.require(self.T > 0, "T", "a positive number")

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        z = self._squash(z) if self.T == 1.0 else self._squash(z) / self.T
        if self.scale != "size":
            return _scaled(torch.softmax(z, -1), self.scale)
        e = torch.exp(z - z.amax(-1, keepdim=True).detach())
        return e / e.mean(-1, keepdim=True)  # n · softmax, without the rounding of n · (1/n)

    def identity(self, bias: float) -> Start:
        return Start(replace(self, scale="size"), 0.0)

    def _squash(self, z: Tensor) -> Tensor:
        if self.pre_activation == "none":
            return z
        return {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": F.gelu}[self.pre_activation](z)


@dataclass(frozen=True)
class TopK(Activation, tag="topk"):
    """softmax(z), kept for the k largest features and exactly 0 elsewhere; ``renorm`` makes the kept ones sum to 1."""

    many: ClassVar[bool] = True
    k: int
    renorm: bool = True

    def check(self) -> None:
        self.require(self.k > 0, "k", "a positive integer")

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        if self.k > z.size(-1):
            raise ArgumentError("topk keeps more than there is", found=f"k={self.k} of {z.size(-1)}")
        top, index = torch.topk(z if self.renorm else torch.softmax(z, -1), self.k, -1)
        kept = torch.softmax(top, -1) if self.renorm else top
        return torch.zeros_like(z).scatter(-1, index, kept)


@dataclass(frozen=True)
class Normalized(Activation, tag="normalized"):
    """σ(z) divided by its sum, in each of ``splits`` parts of the features (Poly, MHR)."""

    many: ClassVar[bool] = True
    splits: int = 1

    def check(self) -> None:
        self.require(self.splits > 0, "splits", "a positive integer")

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        g = torch.sigmoid(z).unflatten(-1, (self.splits, -1))
        return (g / g.sum(-1, keepdim=True)).flatten(-2)


@dataclass(frozen=True)
class Threshold(Activation, tag="threshold"):
    """1 where σ(z) > t, else exactly 0."""

    binary: ClassVar[bool] = True
    t: float = 0.5

    def check(self) -> None:
        self.require(0 <= self.t < 1, "t", "0 <= t < 1")

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        return (torch.sigmoid(z) > self.t).to(z.dtype)

    def identity(self, bias: float) -> Start:
        return Start(self, bias)

    def logit(self, z: Tensor) -> Tensor | None:
        return z

    @property
    def cut(self) -> float:
        return self.t


@dataclass(frozen=True)
class Sinkhorn(Activation, tag="sinkhorn"):
    """A transport plan between positions and features: rows sum to 1, columns to positions/F (Selective Sinkhorn
    Routing).

    Used in a fraction p of training steps; otherwise, and always in eval, it is softmax(z / eps).
    """

    many: ClassVar[bool] = True
    iters: int = 20
    eps: float = 1.0
    p: float = 1.0

    def check(self) -> None:
        self.require(self.iters > 0, "iters", "a positive integer")
        self.require(self.eps > 0, "eps", "a positive number")
        self.require(0 < self.p <= 1, "p", "0 < p <= 1")

    def __call__(self, z: Tensor, training: bool = False) -> Tensor:
        log = torch.log_softmax(z / self.eps, -1)
        if not training:
            return log.exp()
        plan = transport_plan(log.reshape(-1, z.size(-1)), self.iters).reshape(z.shape)
        if self.p == 1.0:
            return plan
        return torch.where(torch.rand((), device=z.device) < self.p, plan, log.exp())


Activation.aliases = {"1+tanh": "one_plus_tanh", "logsigmoid/16": "logsigmoid(16)", "swish": "silu"}


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else scale * x


def _affine(z: Tensor, slope: float, bias: float) -> Tensor:
    z = _scaled(z, slope)
    return z + bias if bias else z
