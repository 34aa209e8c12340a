"""Contract: what a rewrite promises about the model's function, checked by the engine after every transform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ROUNDING = 1e-6


@dataclass(frozen=True)
class Contract:
    """``exact`` and ``within`` promise it for any parameters, ``identity_at_init`` for freshly made ones.

    ``tolerance`` is the largest absolute difference of an output that the promise allows, relative to max(1,
    max|output|).
    That of ``identity_at_init`` is the residual of one gate if that is more than rounding.
    """

    kind: Literal["exact", "within", "identity_at_init", "changes_function"]
    tolerance: float = ROUNDING

    @property
    def checked(self) -> bool:
        """Whether outputs before and after the rewrite can be compared."""
        return self.kind != "changes_function"

    def allowed(self, sites: int) -> float:
        """The tolerance for so many sites. A residual grows on its way to the output: four times it a site is
        allowed."""
        residual = self.kind == "identity_at_init" and self.tolerance > ROUNDING
        return 4 * self.tolerance * sites if residual else self.tolerance

    def __str__(self) -> str:
        return self.kind if self.kind in ("exact", "changes_function") else f"{self.kind}({self.tolerance:g})"


def exact() -> Contract:
    """The same function up to the rounding of reordered sums."""
    return Contract("exact")


def within(tolerance: float) -> Contract:
    """The same function up to ``tolerance``."""
    return Contract("within", tolerance)


def identity_at_init(residual: float = 0.0) -> Contract:
    """The same function as long as the new parameters keep their initial values, up to ``residual``."""
    return Contract("identity_at_init", max(ROUNDING, residual))


def changes_function() -> Contract:
    """Another function from the start; only shapes, dtypes and finiteness are checked."""
    return Contract("changes_function", float("inf"))
