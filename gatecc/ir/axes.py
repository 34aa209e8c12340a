"""Axes: what the axes of a value count, one letter each, in order. These are all the letters:

    b batch, the leading axis in general (flattened tokens and windows are b too)    w window
    n query token    m key token    t time or depth    y height    x width
    h head    r query heads that share one key head, where they have an axis of their own
    d head dimension    c channel    e expert
    g batch and heads merged

Two sorts matter to gates: *positions*, whose sizes change from call to call, and *features*, whose sizes are the
model's. g is of both sorts. The letters of an einsum equation (gatecc.ir.match.product) are no axes: they say nothing
but which axes of two operands meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gatecc.errors import ArgumentError

TOKENS = "nmtyx"
POSITIONS = "bw" + TOKENS
FEATURES = "hrdce"
LETTERS = frozenset(POSITIONS + FEATURES + "g")

Size = TypeVar("Size")


@dataclass(frozen=True, eq=False, repr=False)
class Axes:
    """For example ``Axes("bhnd")``; it equals its text, and is empty where the axes are not known.

    Raises ArgumentError for a letter that counts nothing.
    """

    text: str

    def __post_init__(self) -> None:
        if unknown := set(self.text) - LETTERS:
            raise ArgumentError(
                f"{''.join(sorted(unknown))!r} names no axis", found=repr(self.text), expected="".join(sorted(LETTERS))
            )

    @classmethod
    def of(cls, axes: Axes | str) -> Axes:
        """From axes or their text."""
        return axes if isinstance(axes, Axes) else cls(axes)

    @classmethod
    def of_features(cls, rank: int, channel: int | None) -> Axes:
        """Of a tensor of features: one b, then n or the axes of space, c at ``channel``.

        >>> [str(Axes.of_features(*at)) for at in ((3, 2), (4, 1), (4, 3), (2, None))]
        ['bnc', 'bcyx', 'byxc', 'bc']
        """
        if rank == 1:
            return cls("c")
        channel = (rank - 1 if rank < 4 else 1) if channel is None else channel % max(rank, 1)
        places = {0: "", 1: "n", 2: "yx", 3: "tyx"}.get(rank - 2, "tyx".rjust(rank - 2, "b"))
        letters = list("b" + places) if channel > 0 else list(places + "b")
        letters.insert(channel, "c")
        return cls("".join(letters))

    # --- as a sequence of letters -------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return repr(self.text)

    def __eq__(self, other: object) -> bool:
        return self.text == (other.text if isinstance(other, Axes) else other)

    def __hash__(self) -> int:
        return hash(self.text)

    def __len__(self) -> int:
        return len(self.text)

    def __iter__(self) -> Iterator[str]:
        return iter(self.text)

    def __getitem__(self, at: int) -> str:
        return self.text[at]

    def __contains__(self, letter: str) -> bool:
        return letter in self.text

    def index(self, letter: str) -> int:
        """The (first) axis of a letter. Raises ArgumentError."""
        at = self.text.find(letter)
        if at < 0:
            raise ArgumentError(f"the value has no axis {letter}", found=f"axes {self.text}")
        return at

    def sizes(self, shape: Sequence[Size]) -> dict[str, Size]:
        """The sizes by letter. Raises ValueError if the shape has another number of axes."""
        return dict(zip(self.text, shape, strict=True))

    # --- what they count ----------------------------------------------------------------------------------------------

    @property
    def apart(self) -> Axes:
        """The same with g spelled out as b and h."""
        return Axes(self.text.replace("g", "bh"))

    @property
    def positions(self) -> Axes:
        """The positions, in order: "bhnd" -> "bn"."""
        return Axes("".join(a for a in self.apart if a in POSITIONS))

    @property
    def features(self) -> Axes:
        """The features, in order: "bhnd" -> "hd"."""
        return Axes("".join(a for a in self.apart if a in FEATURES))

    @property
    def per_head(self) -> bool:
        """Whether heads have an axis, or are merged with the batch."""
        return "h" in self.apart.text

    @property
    def per_token(self) -> bool:
        """Whether tokens, or the rows and columns of an image, have an axis."""
        return not set(self.text).isdisjoint(TOKENS)

    def renamed(self, old: str, new: str) -> Axes:
        """One letter (or none, or several) in the place of another."""
        return Axes(self.text.replace(old, new))

    def order(self, wanted: Axes | str) -> list[int]:
        """``p`` so that ``x.permute(p)`` has the axes that are wanted. Raises ArgumentError if one is missing."""
        return [self.index(letter) for letter in wanted]
