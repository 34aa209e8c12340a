"""Estimator: how a gate gets its gradient, and what it samples in training. In eval every gate is deterministic.

With z the score and p = σ(z) the probability that a unit is on, b is 1 or 0 (Bengio et al., Gradients Through
Stochastic Neurons, give reinforce, times_smooth, noise and st). The binary ones yield exact zeros, in training and in
eval. Text: ``exact``, ``st``, ``gumbel(T=0.5, discrete=True)``, ``reinforce``, ``supervised(label=topk_mass(r=0.9))``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.activation import Activation
from gatecc.ir.gates.label import Label, TopKMass
from gatecc.ir.gates.option import Option

Buffers = Mapping[str, Tensor]
Response = Callable[[], Tensor]


@dataclass(frozen=True)
class Estimator(Option, slot="estimator"):
    """Base of estimators."""

    binary: ClassVar[bool] = False  # the activation must be the probability that a unit is on
    one_hot: ClassVar[bool] = False  # a softmax will do too
    trained: ClassVar[bool] = True

    @property
    def hard(self) -> bool:
        """Whether gates are exactly 0 or 1 in eval."""
        return self.binary

    def buffers(self) -> dict[str, Tensor]:
        """Tensors that the gate must hold for this estimator; they are not saved."""
        return {}

    def sample(self, z: Tensor, activation: Activation, buffers: Buffers, response: Response) -> Tensor:
        """Gates in training, from scores z: (*positions, F). ``response()``: the mass of each gated feature."""
        raise NotImplementedError

    def decide(self, z: Tensor, activation: Activation) -> Tensor:
        """Gates in eval."""
        if not self.hard:
            return activation(z)
        return _largest(z) if activation.many else _on(z, activation)


@dataclass(frozen=True)
class Exact(Estimator, tag="exact"):
    """No sampling: the gradient of the activation."""

    def sample(self, z: Tensor, activation: Activation, buffers: Buffers, response: Response) -> Tensor:
        return activation(z, training=True)


@dataclass(frozen=True)
class Frozen(Estimator, tag="frozen"):
    """No sampling, and the gate's parameters are not trained."""

    trained: ClassVar[bool] = False

    def sample(self, z: Tensor, activation: Activation, buffers: Buffers, response: Response) -> Tensor:
        return activation(z)


@dataclass(frozen=True)
class StraightThrough(Estimator, tag="st"):
    """b forwards, the gradient of p (``to="p"``) or of z (``to="logit"``) backwards.

    b ~ Bernoulli(p), or b = 1[p > ½] if not ``stochastic``. With a softmax b is one-hot: sampled, or the largest.
    """

    binary: ClassVar[bool] = True
    one_hot: ClassVar[bool] = True
    to: Literal["p", "logit"] = "p"
    stochastic: bool = True

    def sample(self, z: Tensor, activation: Activation, buffers: Buffers, response: Response) -> Tensor:
        soft = z if self.to == "logit" else activation(z) if activation.many else torch.sigmoid(_logit(z, activation))
        return _through(self._draw(z, activation), soft)

    def _draw(self, z: Tensor, activation: Activation) -> Tensor:
        if not self.stochastic:
            return self.decide(z, activation)
        if activation.many:
            return _largest(torch.log(activation(z)) + _gumbel(z))
        return _bernoulli(torch.sigmoid(_logit(z, activation)))


@dataclass(frozen=True)
class Gumbel(Estimator, tag="gumbel"):
    """The concrete relaxation σ((z + L) / T), L logistic noise, or softmax((log p + G) / T).

    If ``discrete``, the gate is 0 or 1 forwards and in eval, and the relaxation is what has the gradient.
    """

    binary: ClassVar[bool] = True
    one_hot: ClassVar[bool] = True
    T: float = 1.0
    discrete: bool = False

    @property
    def hard(self) -> bool:
        return self.discrete

    def check(self) -> None:
        self.require(self.T > 0, "T", "a positive number")

    def sample(self, z: Tensor, activation: Activation, buffers: Buffers, response: Response) -> Tensor:
        soft = self._relaxed(z, activation)
        if not self.discrete:
            return soft
        return _through(_largest(soft) if activation.many else (soft > activation.cut).to(z.dtype), soft)

    def _relaxed(self, z: Tensor, activation: Activation) -> Tensor:
        if activation.many:
            return torch.softmax((torch.log(activation(z)) + _gumbel(z)) / self.T, -1)
        return torch.sigmoid((_logit(z, activation) + _gumbel(z) - _gumbel(z)) / self.T)


@dataclass(frozen=True)
class Reinforce(Estimator, tag="reinforce"):
    """b ~ Bernoulli(p); the gradient of z is (b - p) (L - baseline), unbiased, whatever stands behind the gate.

    L is the loss of each sample, given by ``gatecc.train.set_reward(model, loss)`` between forward and backward.
    Baselines: "mean" is the running mean of earlier batches, "leave_one_out" the mean of the other samples,
    "min_variance" the same weighted by (b - p)². At most ``capacity`` samples a batch.
    """

    binary: ClassVar[bool] = True
    baseline: Literal["mean", "none", "leave_one_out", "min_variance"] = "mean"
    capacity: int = 1024

    def check(self) -> None:
        self.require(self.capacity > 0, "capacity", "a positive integer")

    def buffers(self) -> dict[str, Tensor]:
        return {
            "reward": torch.zeros(self.capacity),
            "reward_count": torch.zeros((), dtype=torch.int64),
            "reward_state": torch.zeros(3),
        }

    def sample(self, z: Tensor, activation: Activation, buffers: Buffers, response: Response) -> Tensor:
        told = (buffers["reward"], buffers["reward_count"], buffers["reward_state"])
        return torch.ops.gatecc.reinforce_sample(_logit(z, activation), torch.rand_like(z), *told, self.baseline)


@dataclass(frozen=True)
class TimesSmooth(Estimator, tag="times_smooth"):
    """b · √p with b ~ Bernoulli(√p), whose mean is p; the smooth factor has the gradient. In eval 1[√p > ½] · √p."""

    binary: ClassVar[bool] = True

    def sample(self, z: Tensor, activation: Activation, buffers: Buffers, response: Response) -> Tensor:
        root = torch.sqrt(torch.sigmoid(_logit(z, activation)))
        return _bernoulli(root) * root

    def decide(self, z: Tensor, activation: Activation) -> Tensor:
        root = torch.sqrt(torch.sigmoid(_logit(z, activation)))
        return (root > activation.cut).to(z.dtype) * root


@dataclass(frozen=True)
class Noise(Estimator, tag="noise"):
    """The activation of z plus Gaussian noise: units near their threshold are explored."""

    std: float = 1.0

    def check(self) -> None:
        self.require(self.std >= 0, "std", "a number >= 0")

    def sample(self, z: Tensor, activation: Activation, buffers: Buffers, response: Response) -> Tensor:
        return activation(z + self.std * torch.randn_like(z), training=True)


@dataclass(frozen=True)
class Supervised(Estimator, tag="supervised"):
    """b = 1[p > t], learned from labels: binary cross entropy times ``weight``, whose gradient enters in the backward
    pass.

    The task loss does not reach the gate, unless ``joint`` lets it through straight.
    """

    binary: ClassVar[bool] = True
    label: Label = TopKMass()
    weight: float = 1.0
    joint: bool = False

    def check(self) -> None:
        self.require(self.weight > 0, "weight", "a positive number")

    def sample(self, z: Tensor, activation: Activation, buffers: Buffers, response: Response) -> Tensor:
        label = self.label(response().detach())
        logit = torch.ops.gatecc.inject_bce(_logit(z, activation), label, self.weight)
        soft = torch.sigmoid(logit)
        # Without the task's gradient the product with zero still links the logit to the loss, so that its own is
        # injected.
        return _through(self.decide(z, activation), soft) if self.joint else self.decide(z, activation) + 0.0 * soft


Estimator.aliases = {"ST": "st"}


def _logit(z: Tensor, activation: Activation) -> Tensor:
    logit = activation.logit(z)
    if logit is None:
        raise ArgumentError(
            "this estimator needs a probability", found=str(activation), expected="sigmoid or threshold"
        )
    return logit


def _on(z: Tensor, activation: Activation) -> Tensor:
    return (torch.sigmoid(_logit(z, activation)) > activation.cut).to(z.dtype)


def _largest(z: Tensor) -> Tensor:
    return torch.zeros_like(z).scatter(-1, z.argmax(-1, keepdim=True), 1.0)


def _bernoulli(p: Tensor) -> Tensor:
    return (torch.rand_like(p) < p).to(p.dtype)


def _gumbel(z: Tensor) -> Tensor:
    uniform = torch.rand_like(z).clamp_min(torch.finfo(z.dtype).tiny)
    return -torch.log(-torch.log(uniform))


def _through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard``, the gradient of ``soft``: soft - soft is exactly 0."""
    return hard.detach() + (soft - soft.detach())
