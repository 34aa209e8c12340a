"""What one entry of the zoo is: a model, its inputs at any size, and what is known about its attention."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCAB = 97
BATCH = 2
LENGTH = 16


class Inputs(NamedTuple):
    """What a model is called with: itself an `example_inputs` of gatecc."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model in eval mode and a way to make its inputs at any batch size and length.

    `sizes` are (batch, length) pairs that the model also accepts. A model without a sequence axis ignores the length,
    and all its sizes have the length of the example.
    """

    model: nn.Module
    make: Callable[[int, int], Inputs]
    sizes: tuple[tuple[int, int], ...] = ((3, LENGTH), (4, 23))
    causal: bool = False
    """Output n depends on the tokens up to n only (the decoder's, in a seq2seq model). Pointwise models are causal."""
    decoder: bool = False
    """The model has a working `generate`."""

    @property
    def inputs(self) -> Inputs:
        return self.make(BATCH, LENGTH)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.inputs.args

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.inputs.kwargs

    @property
    def dynamic(self) -> list[Inputs]:
        """Inputs at other batch sizes and, where the model has a sequence axis, at another length."""
        return [self.make(batch, length) for batch, length in self.sizes]

    @property
    def sequence(self) -> bool:
        """Whether the length may vary."""
        return any(length != LENGTH for _, length in self.sizes)


@dataclass(frozen=True)
class Spec:
    """One architecture in one attention implementation."""

    name: str
    family: str
    impl: str
    """"sdpa" or "eager" where the library lets one choose, "" where the model is written in one way."""
    factory: Callable[[], Case]
    cores: int
    """Attention cores that run in one forward."""
    others: int = 0
    """Softmaxes that run and are no plain attention: routers, talking heads, pooling, gates."""
    mask: str | None = None
    """What every core masks, where it is one kind (see truth.Core.mask)."""
    notes: str = field(default="", compare=False)

    @property
    def id(self) -> str:
        return f"{self.family}/{self.name}" + (f"-{self.impl}" if self.impl else "")

    def build(self) -> Case:
        """Build the model with random weights. The weights depend on family and name only, not on `impl`."""
        seed = zlib.crc32(f"{self.family}/{self.name}".encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            case = self.factory()
        randomise(case.model, seed)
        case.model.eval()
        return case


def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter a value that matters, in place.

    Fresh models have zero biases, zero relative-position tables, unit norms and near-zero weights, so that a rewrite
    that loses one of them would go unseen. Matrices get variance 1/fan_in, vectors are moved by a tenth.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.dim() < 2:
                parameter.add_(noise, alpha=0.1)
            else:
                parameter.copy_(noise * (parameter.shape[0] / max(parameter.numel(), 1)) ** 0.5)


def tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Token ids that depend on the size and nothing else. -> (B, N) int64 in [5, VOCAB)"""
    generator = torch.Generator().manual_seed(1000 * batch + length + seed)
    return torch.randint(5, VOCAB, (batch, length), generator=generator)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian input that depends on the shape and nothing else."""
    generator = torch.Generator().manual_seed(sum(31**i * n for i, n in enumerate(shape)) + seed)
    return torch.randn(shape, generator=generator)


def padding(batch: int, length: int, *, left: bool = False) -> Tensor:
    """A padding mask whose rows lose 0, 2, 4, ... positions. -> (B, N) bool, True where there is a token"""
    kept = (length - 2 * torch.arange(batch)).clamp(min=1)
    mask = torch.arange(length) < kept[:, None]
    return mask.flip(-1) if left else mask
