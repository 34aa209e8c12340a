"""Mixer: what takes the place of softmax attention, and what it must know of the place before it can be made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from gatecc.ir.gates.option import Option


@dataclass(frozen=True)
class Place:
    """An attention site as a mixer sees it. ``window`` is that of the model's own mask, None if there is none."""

    dim: int  # channels of hidden, 0 if the site has none
    heads: int
    kv_heads: int
    key: int  # width of a query and key head
    value: int  # width of a value head
    scale: float  # what q @ k was multiplied by
    causal: bool
    window: int | None = None
    tokens: int | None = None  # their number, if it is the same in every call


@dataclass(frozen=True)
class Mixer(Option, slot="mixer"):
    """Base of mixers. ``reads`` names the stages of the site that its module takes, in this order.

    The module maps q, k, v as (B, H, N, D), the latter two with their own number of heads, and hidden as (B, N, C), to
    heads (B, H, N, D) or out (B, N, C), as ``stage`` says. The inputs of the model that ``inputs`` names follow as they
    are; where there is padding, a last argument does: (B, N), False at padding.

    A mixer that yields out takes the place of the projections too: what they hold is read no more.
    """

    stage: ClassVar[Literal["heads", "out"]] = "heads"
    fixed_length: ClassVar[bool] = False  # it has parameters for each token
    masks: ClassVar[tuple[str, ...]] = ("causal", "bidirectional")  # patterns that it can keep
    pads: ClassVar[bool] = True  # it can leave padding out

    @property
    def reads(self) -> tuple[str, ...]:
        """The stages of the site that the module takes."""
        return ("q", "k", "v")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs of the model that the module takes, by the names of its parameters: features of pairs of tokens."""
        return ()

    def named(self, values: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """The arguments of the module by their stage, and the padding mask if there is one."""
        count = len(self.reads)
        return dict(zip(self.reads, values[:count], strict=True)), values[count] if len(values) > count else None

    def module(self, place: Place) -> nn.Module:
        """The module, with fresh parameters."""
        raise NotImplementedError
