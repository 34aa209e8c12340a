"""Mask: which keys a query may see, proved by evaluating the mask sub-graph (never guessed from a name)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Mask:
    """``kind`` is the pattern without padding; ``window`` is the number of keys that a query sees in a sliding window.
    ``padding``: the mask also depends on a padding mask that is an input; with ``both``, queries that are padding see
    nothing. ``bias``: finite values are added to allowed
    scores as well (ALiBi, relative positions). ``unknown`` means that nothing was proved, ``reason`` says why.
    ``asserted``: the graph is given the mask as a tensor, and the kind was proved in a larger graph: whoever relies on
    it must assert the form of the tensor on every call (`gatecc.ops.sequences`).
    """

    kind: Literal["bidirectional", "causal", "sliding_window", "packed", "unknown"]
    window: int | None = None
    padding: bool = False
    both: bool = False
    bias: bool = False
    reason: str = ""
    asserted: bool = False

    def __str__(self) -> str:
        text = self.kind if self.window is None else f"{self.kind}({self.window})"
        return text + "+padding" * self.padding + "+bias" * self.bias

    @property
    def causal(self) -> bool:
        """Whether it is proved that no query sees a later key."""
        return self.kind in ("causal", "sliding_window", "packed")
