"""Granularity: over which axes of the value a gate varies.

Granularity names *features*: how many numbers the gate yields at a position.

    scalar, block, step, sample, token, pixel, edge    one
    head                                               one per head
    channel, row, element                              one per channel (for values with heads: heads times their width)
    expert                                             one per expert (axis e then takes the place of the features)

*Positions* follow from the source. A gate that reads ``hidden`` (b, n, c) has another value at each token whatever its
granularity; one that reads ``pool(hidden)`` varies over samples only; ``param`` varies over neither. Some names ask for
positions, and a source that lacks them is refused: token (and pixel: rows and columns), element (every position), edge
(query and key), sample (samples and nothing else). With ``param`` these names give parameters for each place, so that
the value must have a fixed number of them: LINA's ``token*head`` is a parameter (n, h). ``*`` joins names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gatecc.errors import ArgumentError
from gatecc.ir.gates.layout import GateShape

ONE = ("scalar", "block", "step", "sample", "token", "pixel", "edge")
CHANNELS = ("channel", "row", "element")
NAMES = (*ONE, "head", *CHANNELS, "expert")


@dataclass(frozen=True)
class Granularity:
    """One or several of NAMES; raises ArgumentError for others."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names or set(self.names) - set(NAMES) or len(set(self.names)) != len(self.names):
            raise ArgumentError("no such granularity", found=str(self), expected=", ".join(NAMES) + ", joined by *")
        if "sample" in self.names and self.needs_positions:
            raise ArgumentError(
                "one gate per sample cannot vary over positions", found=str(self), expected="one of the two"
            )

    def __str__(self) -> str:
        return "*".join(self.names)

    @classmethod
    def coerce(cls, value: Any) -> Granularity:
        """From "head", "token*head", or itself."""
        if isinstance(value, Granularity):
            return value
        return cls(tuple(name.strip() for name in str(value).split("*")))

    @property
    def needs_positions(self) -> bool:
        """Whether the gate must differ between tokens, pixels or edges."""
        return bool({"token", "pixel", "edge", "element"} & set(self.names))

    @property
    def one(self) -> bool:
        """Whether the gate yields one number at a position."""
        return all(name in ONE for name in self.names)

    def features(self, shape: GateShape) -> str:
        """The feature letters of the gate: a part of the value's, "h" for merged heads, or "e"."""
        if "expert" in self.names:
            return "e"
        if set(self.names) & set(CHANNELS):
            return self._channels(shape)
        if "head" in self.names:
            return "hr" if "r" in shape.axes else "h"
        return ""

    def positions(self, shape: GateShape) -> str:
        """The positions over which the gate must vary."""
        wanted: set[str] = set()
        if "element" in self.names:
            wanted |= set(shape.positions) - {"b"}
        if "token" in self.names:
            wanted |= set("n" if "n" in shape.positions else "yx" if "y" in shape.positions else "m")
        if "pixel" in self.names:
            wanted |= set("yx")
        if "edge" in self.names:
            wanted |= set("nm")
        self._check_positions(wanted, shape)
        return "".join(a for a in shape.positions if a in wanted)

    def _channels(self, shape: GateShape) -> str:
        if found := shape.axes.features.text:
            return found
        raise ArgumentError(f"the value has no channels, so no gate a {self}", found=f"axes {shape.axes}")

    def _check_positions(self, wanted: set[str], shape: GateShape) -> None:
        if missing := wanted - set(shape.positions):
            raise ArgumentError(
                f"the value has no axis for granularity {self}",
                found=f"axes {shape.axes}",
                expected=f"a value with axes {''.join(sorted(missing))}",
            )
