"""Mixer: what takes the place of softmax attention, and what it must know of the place before it can be made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ir.gates.option import Option
from gatecc.ops.state_space import StateSpace


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
    layers: int = 1  # of a stack of recurrent layers
    grid: tuple[int, int] = (1, 1)  # height and width of a window, for mixers of windows


class MixerModule(nn.Module):
    """Base of the modules of mixers."""

    tag = ""  # the mixer's

    def state_space(self, *values: Tensor) -> StateSpace:
        """The mixer on these arguments of its forward as h_t = A_t h_(t-1) + B_t u_t, y_t = C_t h_t + D_t u_t.

        Raises ArgumentError if it has no such form.
        """
        raise ArgumentError(f"{self.tag} has no state space form", found=self.tag, do="leave this site out")

    def finished(self, y: Tensor) -> Tensor:
        """What the forward makes of the recurrence's output."""
        return y


@dataclass(frozen=True)
class Mixer(Option, slot="mixer"):
    """Base of mixers. ``reads`` names the stages of the site that its module takes, in this order.

    The module maps q, k, v as (B, H, N, D), the latter two with their own number of heads, and hidden as (B, N, C), to
    heads (B, H, N, D) or out (B, N, C), as ``stage`` says. The inputs of the model that ``inputs`` names follow as they
    are. Where there is padding, a last argument does: (B, N), False at padding, or for a mixer that ``packs`` integers,
    see `gatecc.passes.mix.mixers.packed`; for a mixer of ``windows`` (B, 1 or H, N, N), False where a key is hidden.

    A mixer that yields out takes the place of the projections too: what they hold is read no more.
    """

    site: ClassVar[str] = "attention"  # the kind of site that it takes the place of
    stage: ClassVar[Literal["heads", "out"]] = "heads"
    fixed_length: ClassVar[bool] = False  # it has parameters for each token
    masks: ClassVar[tuple[str, ...]] = ("causal", "bidirectional")  # patterns that it can keep
    pads: ClassVar[bool] = True  # it can leave padding out
    packs: ClassVar[bool] = False  # it can keep several sequences in a row apart
    windows: ClassVar[bool] = False  # it works on windows of an image, whose masks it takes as they are

    @property
    def regions(self) -> bool:
        """Whether it takes two steps over a window, so that masks must tell regions apart."""
        return False

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

    def module(self, place: Place) -> MixerModule:
        """The module, with fresh parameters."""
        raise NotImplementedError
